"""Whole models whose K/V are in 8 bits, beside transformers with a cache that rounds as we say."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from asyncllm.models.kv_format import FORMATS, KvFormat, KvMode
from tests.models.families import CASES, PARAMS, VOCAB, Reference, make
from tests.models.harness import Driver, Ranks, Sequence, make_device, random_ids
from tests.models.test_windows import MOST, Serving, prompts_of

Parts = list[list[int]]  # ids of a sequence, as they come to the device


def in_8_bits(x: Tensor, fmt: KvFormat) -> Tensor:
    """x [..., dim] float32, to the nearest number of ``fmt``."""
    parts = x.unflatten(-1, (-1, fmt.group or x.shape[-1]))
    exact = parts.abs().amax(-1, keepdim=True) / (127 if fmt.element == "int8" else 448)
    scale = exact.bfloat16()
    above = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.float() < exact, above, scale).float()
    divided = parts / scale
    whole = divided.round() if fmt.element == "int8" else divided.to(torch.float8_e4m3fn).float()
    return (whole * scale).flatten(-2)


class Rounding(DynamicCache):
    """New tokens see each other as they are and all before them in 8 bits; a single one sees itself
    in 8 bits too."""

    def __init__(self, fmt: KvFormat) -> None:
        super().__init__()
        self.fmt, self.held = fmt, dict[int, list[Tensor]]()

    def update(self, k: Tensor, v: Tensor, layer: int, *args: Any, **more: Any) -> Any:
        super().update(k, v, layer, *args, **more)
        rounded = [in_8_bits(x, self.fmt) for x in (k, v)]
        new = rounded if k.shape[2] == 1 else [k, v]
        old = self.held.get(layer, [x[:, :, :0] for x in new])
        self.held[layer] = [torch.cat(pair, 2) for pair in zip(old, rounded, strict=True)]
        return tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))


def scores(model: PreTrainedModel, parts: Parts, fmt: KvFormat | None) -> Tensor:
    """Log-probability of each id but the first; None: of an exact cache."""
    kv = DynamicCache() if fmt is None else Rounding(fmt)
    with torch.no_grad():
        found = [
            model(input_ids=torch.tensor([part]), cache=kv, use_cache=True).logits[0]
            for part in parts
        ]
    ids = torch.tensor([token for part in parts for token in part][1:])
    return torch.cat(found)[:-1].float().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def cut(seq: Sequence, first: int, chunk: int) -> Parts:
    """A sequence whose ``first`` tokens came in chunks too, and the rest of the prompt after them."""
    prompt = seq.prompt
    ends = [*range(chunk, first, chunk), first, *range(first + chunk, len(prompt), chunk)]
    bounds = [0, *(end for end in ends if 0 < end < len(prompt)), len(prompt)]
    pieces = [prompt[a:b] for a, b in pairwise(bounds)]
    return [*pieces, *([token] for token in seq.outputs)]


CASES_OF_FORMATS = [
    *(("llama", name, 1) for name in FORMATS),
    *(("gemma3", name, 1) for name in FORMATS),
    ("llama", "ppl_int8kv", 2),
    ("llama", "triton_fp8kv", 2),
]


@pytest.mark.parametrize(("name", "fmt", "tp"), CASES_OF_FORMATS)
def test_chunks_hits_and_decode_read_what_was_rounded(
    tmp_path: Path, name: str, fmt: str, tp: int
) -> None:
    """Windows too. Numbers are those of the reference but for the few whose rounding is a tie."""
    model = make(CASES[name], tmp_path)
    mode = KvMode.named([fmt])
    device = Ranks(tmp_path, tp, mode) if tp > 1 else make_device(tmp_path, "fp32", "cpu", kv=mode)
    driver, chunk = Driver(device, 512), 16
    first = Sequence(0, random_ids(61, VOCAB, 1), PARAMS)
    driver.generate([first], 12, chunk)
    hit = Sequence(1, first.prompt[:40] + random_ids(19, VOCAB, 2))
    hit.slots = first.slots[:40]
    driver.run([(hit, 10, 40), (first, 1, 0)])
    driver.generate([hit], 8, chunk)
    device.close()

    def off(seq: Sequence, parts: Parts, rounds: bool) -> float:
        want = scores(model, parts, FORMATS[fmt] if rounds else None)
        got = torch.tensor(seq.prompt_logprobs + seq.logprobs)
        return float((got - want[-len(got) :]).abs().median())

    parts = cut(first, 0, chunk)
    # the hit's first 40 tokens were written by chunks of 16, and its own are 10 and 9
    of_hit = [*cut(Sequence(0, hit.prompt[:40]), 0, chunk), hit.prompt[40:50], hit.prompt[50:]]
    of_hit += [[token] for token in hit.outputs]
    for seq, pieces in ((first, parts), (hit, of_hit)):
        near, exact = (off(seq, pieces, rounds) for rounds in (True, False))
        assert near < min(2e-4, exact / 5)


@pytest.mark.parametrize(
    ("name", "fmt"), [("gemma3", "triton_int8kv"), ("ministral", "ppl_int8kv"), ("mistral", "triton_fp8kv")]
)  # fmt: skip
def test_what_is_preempted_and_found_again_is_near_the_exact_answer(
    tmp_path: Path, name: str, fmt: str
) -> None:
    """Scheduler and allocator on few slots; a slot that is read when it is nobody's is NaN."""
    reference = Reference(make(CASES[name], tmp_path, spread=0.4))
    world = Serving(
        tmp_path, num_slots=200, num_sliding=MOST + 30, num_lanes=6, chunked_prefill_size=16,
        batch_max_tokens=40, headroom=0, kv=KvMode.named([fmt]),
    )  # fmt: skip
    world.serve(prompts_of(12, 1), 20, random.Random(1))
    found = world.differences(reference)
    assert 1e-4 < max(found) < 0.1
    assert world.core.preemptions > 0
    assert world.ledger.hit_tokens > 100
    world.real.close()


def test_latents_on_two_ranks_and_behind_a_hit_are_the_same(tmp_path: Path) -> None:
    """All of a step is read in 8 bits, so that it does not matter which chunk has written it."""
    make(CASES["deepseek v3"], tmp_path)
    mode = KvMode.named(["triton_fp8kv"])
    prompt, found = random_ids(61, VOCAB, 1), []
    devices = [
        make_device(tmp_path, "fp32", "cpu", kv=mode),
        Ranks(tmp_path, 2, mode),
        make_device(tmp_path, "fp32", "cpu"),
    ]
    for device in devices:
        driver = Driver(device, 512)
        chunked = Sequence(0, prompt, PARAMS)
        driver.generate([chunked], 2, 16)
        hit = Sequence(1, prompt)
        hit.slots = chunked.slots[:40]
        driver.run([(hit, 21, 40), (chunked, 1, 0)])
        assert hit.logprobs[0] == pytest.approx(chunked.logprobs[0], abs=5e-3)
        found.append(torch.tensor(chunked.prompt_logprobs))
        device.close()
    one, two, exact = found
    assert float((one - two).abs().median()) < 1e-4
    assert float((one - exact).abs().median()) > 1e-2
