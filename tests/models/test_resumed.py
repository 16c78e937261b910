"""Requests that begin with tokens of their own output, or move, go on as if nothing had been."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from asyncllm.codec import i32
from asyncllm.constrain.factory import ConstraintFactory
from asyncllm.constrain.llguidance_backend import GrammarEngine
from asyncllm.constrain.reasoning import ReasoningMarks, ReasoningTags
from asyncllm.constrain.vocabulary import Vocabulary
from asyncllm.core.request import SamplingParams
from asyncllm.engine.device import CpuDevice
from asyncllm.messages import Finished, Submit, Tokens
from tests.actors.fake_device import World
from tests.actors.fake_transfer import RANKS, Client, FakeRank, Pair
from tests.models.harness import make_device, random_ids

SIZE, EOS = 320, 301
# bytes, and some longer ones that begin a call, or end reasoning, in the midst of a token
LONGER = (b"A{", b"Ab", b'A{"', b"</", b"</t>", b"</t>{", b"</t>x", b"xx", b"ab")
PIECES = [*(bytes([i]) for i in range(256)), *LONGER]
VOCAB = Vocabulary(PIECES, SIZE)
TAGS = ReasoningTags(begins=(b"<t>",), ends=(b"</t>",), close=b"</t>")
CALLS = 'A\n[{"begin": "{", "schema": {"type": "object", "properties": {"a": {"enum": ["bb", "cc"]}}, "required": ["a"], "additionalProperties": false}, "style": "json", "end": "}"}]'  # fmt: skip


@cache
def grammars() -> GrammarEngine:
    return GrammarEngine(PIECES, SIZE, (EOS,))


class EngineWorld(World):
    """Scheduler and allocator on a device that computes."""

    def __init__(self, device: CpuDevice, **how: Any) -> None:
        super().__init__(
            num_slots=4000, num_lanes=32, batch_max_tokens=256, eos_ids={EOS}, vocab=SIZE, **how
        )
        self.device = device  # type: ignore[assignment]
        self.scheduler._constrain = ConstraintFactory(
            SIZE, (EOS,), grammars().constrain, ReasoningMarks(VOCAB, TAGS, (EOS,)), VOCAB
        ).of
        self.got: dict[int, list[tuple[int, float]]] = {}

    def ask(self, rid: int, like: Submit, outputs: list[int]) -> None:
        self.got[rid] = []
        self.tell(replace(like, rid=rid, outputs=i32(outputs)))

    def check(self) -> None:
        pass

    def _detokenize(self, endpoint: int, msg: Tokens | Finished) -> None:
        if isinstance(msg, Finished):
            self.finished[msg.rid] = msg
            return
        scores = msg.logprobs.chosen if msg.logprobs else array("f", bytes(4 * len(msg.rids)))
        for rid, token, score in zip(msg.rids, msg.tokens, scores, strict=True):
            self.got[rid].append((token, score))


class EngineRank(FakeRank):
    """Moves what the layers have in a slot."""

    def read(self, slot: int, position: int) -> list[Tensor]:
        return [tensor[slot].clone() for tensor in self._tensors()]

    def write(self, slot: int, entry: list[Tensor]) -> None:
        for tensor, value in zip(self._tensors(), entry, strict=True):
            tensor[slot] = value

    def _tensors(self) -> list[Tensor]:
        device: Any = self.world.device
        return [tensor for layer in device.engine.kv for tensor in layer]


@pytest.fixture(scope="module")
def devices(tiny_dir: Path) -> Iterator[list[CpuDevice]]:
    made = []
    for _ in range(2):
        device = make_device(
            tiny_dir, "fp32", "cpu", num_slots=4000, num_lanes=32, max_len=2048, eos_ids=(EOS,)
        )
        assert isinstance(device, CpuDevice)
        made.append(device)
    yield made
    for device in made:
        device.close()


SEEDED = {"temperature": 1.0, "seed": 11}
BIASED = ((65, 6.0), (256, 6.0), (257, 6.0), (258, 6.0))  # calls begin soon
CLOSES = ((259, 5.0), (260, 5.0), (261, 5.0), (262, 5.0), (ord("<"), 4.0))
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 2},
    "seeded": {**SEEDED, "top_k": 50, "top_p": 0.95, "logprobs": 0},
    "prompt scores": {**SEEDED, "prompt_logprobs": 1},
    "penalties": {**SEEDED, "temperature": 0.3, "presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.5, "penalize_prompt": True, "logprobs": 0},
    "min_new_tokens": {**SEEDED, "min_new_tokens": 7, "logit_bias": ((EOS, 6.0),)},
    "stop tokens": {**SEEDED, "stop_token_ids": tuple(range(0, 320, 9)), "min_new_tokens": 2},
    "length penalty": {**SEEDED, "length_penalty": (2, 2.0)},
    "listed": {**SEEDED, "ignore_eos": True, "allowed_token_ids": (5, 6, 7, 8), "repetition_penalty": 1.3},
    "regex": {**SEEDED, "grammar": ("regex", "(ab|x[0-9]{2})*!"), "logprobs": 0},
    "schema": {**SEEDED, "grammar": ("schema", '{"type": "array", "items": {"enum": ["xx", 12]}, "minItems": 1, "maxItems": 4}')},
    "calls": {**SEEDED, "grammar": ("calls", CALLS), "logit_bias": BIASED},
    "thinking": {**SEEDED, "seed": 2, "max_thinking_tokens": 4, "thoughts": "open"},
    "thinking, then a form": {**SEEDED, "grammar": ("regex", "x+y"), "logit_bias": CLOSES, "max_thinking_tokens": 6, "thoughts": "open"},
    "healing": {**SEEDED, "healed": (b"a", b"bx", b"x"), "max_new_tokens": 6},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_is_cut_anywhere_goes_on_by_the_same_tokens(
    kind: str, devices: list[CpuDevice]
) -> None:
    like, whole = alone(kind, devices[0])
    tokens = [token for token, _ in whole.got[1]]
    end = whole.finished[1]
    parts = EngineWorld(devices[0])
    for k in range(len(tokens) + 1):
        parts.ask(k, like, tokens[:k])
    parts.run()
    for k in range(len(tokens) + 1):
        assert [token for token, _ in parts.got[k]] == tokens[k:], k
        scores = [score for _, score in parts.got[k]]
        assert scores == pytest.approx([score for _, score in whole.got[1][k:]], abs=1e-4)
        assert parts.finished[k].num_tokens == len(tokens)
        assert parts.finished[k].reason == end.reason


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_moves_gives_the_tokens_of_one_server(
    kind: str, devices: list[CpuDevice]
) -> None:
    """Also where K/V do not come in time, and it is tried again behind the first tokens."""
    like, whole = alone(kind, devices[0])
    p, d = (EngineWorld(device, reader="agent", num_ranks=RANKS) for device in devices)
    pair = Pair(random.Random(5), p, d, EngineRank)
    for number in range(6):
        client = Client(list(like.prompt), like.params, thoughts=like.thoughts, healed=like.healed)
        client.attempts, pair.lapses = -99, 0.03 if number % 2 else 0.0
        pair.ask(client)
        pair.run()
        assert client.end is not None
        assert client.tokens == [token for token, _ in whole.got[1]]
        assert client.logprobs == pytest.approx([score for _, score in whole.got[1]], abs=1e-4)
        assert client.end.reason == whole.finished[1].reason
        assert client.end.num_tokens == len(whole.got[1])
    assert d.core.moves.imports >= 4
    assert d.core.prompt_tokens == 0


def alone(kind: str, device: CpuDevice) -> tuple[Submit, EngineWorld]:
    """A request of a kind, and how one server answers it, as request 1."""
    asked = {"max_new_tokens": 12, **KINDS[kind]}
    thoughts, healed = asked.pop("thoughts", ""), asked.pop("healed", ())
    params = SamplingParams(**asked)
    if params.grammar:
        grammars().keep(*params.grammar, grammars().build(*params.grammar))
    prompt = i32(random_ids(21, 256, 5))
    like = Submit(0, prompt, params, thoughts, healed=healed)
    whole = EngineWorld(device)
    whole.ask(1, like, [])
    whole.run()
    end = whole.finished[1]
    assert end.failure is None
    assert len(whole.got[1]) == end.num_tokens > 1
    return like, whole
