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


def test_a_length_penalty_ends_an_answer_soon_after_its_start(server: Server) -> None:
    body: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 60, "temperature": 0}
    free = server.post(COMPLETIONS, body)
    assert free["usage"]["completion_tokens"] > 25
    short = server.post(COMPLETIONS, {**body, "exponential_decay_length_penalty": [8, 3.0]})
    assert short["choices"][0]["finish_reason"] == "stop"
    assert 9 <= short["usage"]["completion_tokens"] <= 20
    assert free["choices"][0]["text"].startswith(short["choices"][0]["text"])
    parameters = {"exponential_decay_length_penalty": [8, 3.0], "max_new_tokens": 60}
    native = server.post("/generate", {"inputs": body["prompt"], "parameters": parameters})
    assert native["count_output_tokens"] == short["usage"]["completion_tokens"]
