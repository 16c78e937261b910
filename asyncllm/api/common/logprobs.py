"""Log-probabilities of generated tokens in the form of OpenAI's chat and responses."""

from __future__ import annotations

from typing import Any

from asyncllm.api.common.answer import Choice, Vocab


def scored(vocab: Vocab, choice: Choice, first: int = 0) -> list[dict[str, Any]]:
    """The generated tokens from ``first`` on with their log-probabilities."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = list(vocab.piece(token))
        return {"token": vocab.text(token), "logprob": logprob, "bytes": raw}

    tokens = choice.tokens
    return [
        entry(tokens.ids[i], tokens.logprob(i))
        | {"top_logprobs": [entry(*best) for best in tokens.top(i)]}
        for i in range(first, len(tokens.ids))
    ]
