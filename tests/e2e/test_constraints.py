"""What restricts or shifts the tokens of one request, on the embedded model."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from tests.e2e.process import Server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def test_only_allowed_tokens_come(server: Server, tokenizer: Tokenizer) -> None:
    few = [tokenizer.encode(word).ids[0] for word in (" yes", " no", " maybe")]
    ids = tokenizer.encode("Is the sky blue?").ids
    out = server.tokens(ids, 12, allowed_token_ids=few, ignore_eos=True, do_sample=True, seed=1)
    assert set(out) <= set(few)
    assert len(out) == 12
    assert len(set(out)) > 1
    body: dict[str, Any] = {"prompt": "Is the sky blue?", "max_tokens": 3, "temperature": 0}
    (choice,) = server.post(COMPLETIONS, {**body, "allowed_token_ids": few[:1]})["choices"]
    assert choice["text"].split() == ["yes"] * len(choice["text"].split())
