"""Log-probabilities of generated tokens in the form of OpenAI's chat and responses."""

from __future__ import annotations

from collections.abc import Callable

from asyncllm.api.common.answer import Choice, Vocab


def scored(
    vocab: Vocab, choice: Choice, first: int = 0, *, name: Callable[[int], str] | None = None
) -> list[dict[str, object]]:
    """The generated tokens from ``first`` on with their log-probabilities.

    ``name``: what a token is called; None: its text.
    """
    name = name or vocab.text

    def entry(token: int, logprob: float | None) -> dict[str, object]:
        raw = list(vocab.piece(token))
        return {"token": name(token), "logprob": logprob, "bytes": raw}

    tokens = choice.tokens
    return [
        entry(tokens.ids[i], tokens.logprob(i))
        | {"top_logprobs": [entry(*best) for best in tokens.top(i)]}
        for i in range(first, len(tokens.ids))
    ]
