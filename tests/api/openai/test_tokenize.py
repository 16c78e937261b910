"""Token ids in bodies: what is one, and how long a long prompt of them takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.openai.tokenize import detokenize
from asyncllm.errors import RequestError
from tests.api.harness import SERVED
from tests.speed import quickest

LONG = replace(SERVED, max_len=1 << 19, vocab_size=1 << 18)


def prompt(ids: list[Any]) -> list[int]:
    return list(openai.completion({"prompt": ids}, SERVED).prompts[0].ids or ())


def inputs(ids: list[Any]) -> list[int]:
    return list(lightllm.generate({"inputs": ids}, SERVED, stream=False).prompts[0].ids or ())


def tokens(ids: list[Any]) -> list[int]:
    return list(detokenize({"tokens": ids}, SERVED))


@pytest.mark.parametrize("read", [prompt, inputs, tokens])
@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([0, 1, 99], ""), ([5, 6.0], ""), ([7, 0.0, 1.0], ""),
        ([5, 100], "100 is not below the vocabulary size 100"), ([5, 100.0], "100 is not below"),
        ([3, -1], "[1]: -1 is not a token id"), ([3, -1.0], "[1]: -1.0 is not a token id"),
        ([3, 1 << 31], "[1]: 2147483648 is not"), ([3.0, 10**399], "[1]: 1000"), ([1e300], "[0]: 1e+300"),
        ([3, True], "[1] must be an integer, not true"), ([3.0, False], "[1] must be an integer"),
        ([3, 1.5], "[1] must be an integer, not 1.5"), ([3, "4"], '[1] must be an integer, not "4"'),
        ([3.0, None], "[1] must be an integer, not null"), ([3, [4]], "[1] must be an integer"),
    ],
)  # fmt: skip
def test_what_is_a_token_id(read: Any, ids: list[Any], why: str) -> None:
    if not why:
        assert read(ids) == ids
        return
    with pytest.raises(RequestError) as caught:
        read(ids)
    assert why in caught.value.message
    assert (caught.value.param or "").startswith(read.__name__)


@pytest.mark.parametrize("kind", [int, float])
def test_many_token_ids_take_no_object_each(kind: type) -> None:
    """The event loop reads them: 4 ms for 262,144, 12 ms if some are written as 3.0."""
    ids, limit_s = [kind(i) for i in range(1 << 18)], 0.02 if kind is int else 0.05
    assert quickest(lambda: detokenize({"tokens": ids}, LONG), limit_s) < limit_s
    assert quickest(lambda: openai.completion({"prompt": ids}, LONG), limit_s) < limit_s
