"""A model's outputs with guessed tokens are those without, and as the model distributes them."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from math import exp
from pathlib import Path
from typing import Any

import pytest

from asyncllm.codec import i32
from asyncllm.core import draft_scheduler
from asyncllm.core.ngram_lookup import NgramLookup
from asyncllm.core.request import SamplingParams
from asyncllm.core.speculation import step_rows
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.messages import Finished, Submit, Tokens
from tests.models.harness import make_device
from tests.models.test_resumed import EOS, KINDS, SIZE, EngineWorld, alone

Continue = Callable[["array[int]"], "array[int]"]


class Prophet(NgramLookup):
    """Guesses what the test says; a lookup would have nothing to find in what this model writes."""

    __slots__ = ("_continue",)

    def __init__(self, ids: array[int], most: int, how: Continue) -> None:
        super().__init__(ids, most)
        self._continue = how

    @property
    def guesses(self) -> bool:
        return True

    def chances(self, most: int, ahead: int = 0) -> list[float]:
        return [0.9] * most

    def guess(self, num: int) -> array[int]:
        return self._continue(self.ids)[:num]


def foretold(monkeypatch: pytest.MonkeyPatch, how: Continue) -> None:
    monkeypatch.setattr(
        draft_scheduler, "NgramLookup", lambda ids, most, *_, **__: Prophet(ids, most, how)
    )


def with_drafts(
    device: CpuDevice | CudaDevice, asked: dict[int, Submit], monkeypatch: pytest.MonkeyPatch,
    tokens: dict[int, list[int]], num: int,
) -> EngineWorld:  # fmt: skip
    """All of them together; what is guessed is right but for every fourth token."""
    texts = [[*asked[rid].prompt, *tokens[rid]] for rid in asked]

    def known(ids: array[int]) -> array[int]:
        right = next((text for text in texts if text[: len(ids)] == list(ids)), [])
        rest = enumerate(right[len(ids) :], len(ids))
        guessed = [(token + 1) % SIZE if at % 4 == 3 else token for at, token in rest]
        return i32([*guessed, *[7] * 9])

    foretold(monkeypatch, known)
    world = EngineWorld(device, drafts=num)  # type: ignore[arg-type]
    for rid, like in asked.items():
        world.ask(rid, like, [])
    world.run()
    return world


def check(device: CpuDevice | CudaDevice, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, tokens, scores, ends = {}, {}, {}, {}
    for rid, kind in enumerate(KINDS):
        like, whole = alone(kind, device)  # type: ignore[arg-type]
        asked[rid], ends[rid] = like, whole.finished[1]
        tokens[rid] = [token for token, _ in whole.got[1]]
        scores[rid] = [score for _, score in whole.got[1]]
    world = with_drafts(device, asked, monkeypatch, tokens, num)
    for rid, kind in enumerate(KINDS):
        assert [token for token, _ in world.got[rid]] == tokens[rid], kind
        if asked[rid].params.logprobs >= 0:
            assert [score for _, score in world.got[rid]] == pytest.approx(scores[rid], abs=1e-3)
        assert world.finished[rid].reason == ends[rid].reason, kind
        assert world.finished[rid].num_tokens == ends[rid].num_tokens
    told = {kind: world.finished[rid].accepted for rid, kind in enumerate(KINDS)}
    drafted = ("greedy", "seeded", "penalties", "min_new_tokens", "length penalty", "listed", "regex", "schema")  # fmt: skip
    for kind in drafted:
        assert told[kind] >= len(tokens[list(KINDS).index(kind)]) // 3, told


@pytest.mark.parametrize("num", [1, 5])
def test_outputs_are_those_without_drafts(
    num: int, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_device(
        tiny_dir, "fp32", "cpu", num_slots=4000, num_lanes=32, max_len=2048, eos_ids=(EOS,)
    )
    check(device, num, monkeypatch)
    device.close()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_outputs_are_those_without_drafts_on_a_gpu(
    graphs: bool, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_device(
        tiny_dir, "fp32", "cuda", num_slots=4000, num_lanes=32, max_len=2048, eos_ids=(EOS,),
        num_rows=step_rows(32, 5),
    )  # fmt: skip
    assert isinstance(device, CudaDevice)
    if graphs:
        device.capture(300)
    check(device, 5, monkeypatch)
    device.close()


class Distributions(EngineWorld):
    """Keeps each token with the whole distribution that it was drawn from, without biases."""

    def _detokenize(self, endpoint: int, msg: Tokens | Finished) -> None:
        if isinstance(msg, Tokens):
            assert msg.logprobs is not None
            for i, (rid, token) in enumerate(zip(msg.rids, msg.tokens, strict=True)):
                one = msg.logprobs.slice(i, i + 1)
                self.got[rid].append((token, dict(zip(one.top_ids, one.top, strict=True))))  # type: ignore[arg-type]
        else:
            super()._detokenize(endpoint, msg)


def test_drafts_are_accepted_as_often_as_they_are_likely_and_what_replaces_them_is_as_likely(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four tokens the same one is guessed each time: rejection sampling of a certain guess."""
    four, guessed, num = (40, 50, 60, 70), 50, 500
    biases = tuple((token, 14.0 + 0.3 * i) for i, token in enumerate(four))
    device = make_device(tiny_dir, "fp32", "cpu", num_slots=4000, num_lanes=32, max_len=2048)
    foretold(monkeypatch, lambda ids: i32([guessed]))
    world = Distributions(device, drafts=1)  # type: ignore[arg-type]
    for rid in range(num):
        how: dict[str, Any] = {"temperature": 1.0, "logprobs": SIZE, "logit_bias": biases}
        params = SamplingParams(max_new_tokens=3, seed=rid, use_cache=False, **how)
        world.ask(rid, Submit(rid, i32([9, 8, 7]), params), [])
    world.run()
    device.close()
    seen: dict[int, Counter[int]] = defaultdict(Counter)
    chances: dict[int, dict[int, float]] = {}
    for rid in range(num):
        (first, _), (second, scores), _ = world.got[rid]
        seen[first][second] += 1
        assert isinstance(scores, dict)
        weights = {i: exp(score + dict(biases).get(i, 0.0)) for i, score in scores.items()}
        chances[first] = {i: w / sum(weights.values()) for i, w in weights.items()}
    distance, expected = 0.0, 0.0
    for first, counts in seen.items():
        total = counts.total()
        expected += total * chances[first][guessed]
        for token in four:
            want = total * chances[first][token]
            distance += (counts[token] - want) ** 2 / want
    accepted = sum(end.accepted for end in world.finished.values())
    drafted = sum(end.drafted for end in world.finished.values())
    assert num - 32 <= drafted <= num, "the first step's time is not known"
    assert distance < 40, "12 degrees of freedom: beyond this once in ten thousand"
    assert abs(accepted - expected * drafted / num) < 4 * (num / 4) ** 0.5
