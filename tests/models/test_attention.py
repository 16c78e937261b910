"""What attention backends refuse, what windows and caps hide, and how often a model plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asyncllm.core.windows import PerSpace
from asyncllm.engine.attention_cpu import TorchAttention, TorchPairs
from asyncllm.engine.build import make_model
from asyncllm.engine.parallel import SingleRank
from asyncllm.errors import StartupError
from asyncllm.kernels.attention.quantize import dequantize_ref, quantize_ref
from asyncllm.models.attention import ELEMENTS, AttentionBackend, Batch, HostRows, KvPairs
from asyncllm.models.kv_format import FORMATS, KvFormat
from asyncllm.models.rope import Rope
from asyncllm.models.spec import AttentionSpec, ModelSpec
from tests.models.harness import Driver, Sequence, make_device, random_ids
from tests.models.test_llama import VOCAB, make_checkpoint, make_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = AttentionSpec(
    kind="gqa", num_q_heads=6, num_kv_heads=2, head_dim=16, v_dim=16, scale=0.25,
    rope=Rope(theta=10000.0, dim=16),
)  # fmt: skip
BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"sinks": True}, "has attention sinks"),
    ({"kind": "mla"}, "is of kind 'mla'"),
    ({"rope": None}, "has no rotary embedding"),
    ({"rope": Rope(theta=1e4, dim=16, interleaved=True)}, "turns neighbouring elements"),
    ({"kv_rank": 32}, "has latents"),
    ({"q_rank": 32}, "has latents"),
    ({"v_dim": 8}, "has values of 8 and keys of 16"),
]


def backend(device: torch.device) -> tuple[type[AttentionBackend], type[KvPairs]]:
    if device.type == "cpu":
        return TorchAttention, TorchPairs
    # not at the top: tests of kernels want to be the first to import Triton
    from asyncllm.engine.attention_cuda import TritonAttention, TritonPairs

    return TritonAttention, TritonPairs


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize(("changes", "reason"), BEYOND, ids=str)
def test_nothing_of_a_spec_is_ignored(
    device: torch.device, changes: dict[str, Any], reason: str
) -> None:
    attention, pairs = backend(device)
    layout = pairs([PLAIN], torch.float32)
    assert attention.refuse(PLAIN, layout, device) is None
    assert attention.refuse(replace(PLAIN, **changes), layout, device) == reason


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_layout_or_device_of_another_kind_is_refused(device: torch.device) -> None:
    attention, pairs = backend(device)
    other = KvPairs([PLAIN], torch.float32)
    reason = attention.refuse(PLAIN, other, device)
    assert reason == f"has its K/V in KvPairs on {device.type}"
    elsewhere = CUDA if device is CPU else CPU
    assert attention.refuse(PLAIN, pairs([PLAIN], torch.float32), elsewhere) is not None


def test_the_kernels_refuse_large_heads() -> None:
    attention, pairs = backend(CUDA)
    large = replace(PLAIN, head_dim=320, v_dim=320)
    reason = attention.refuse(large, pairs([large], torch.float32), CUDA)
    assert reason == "has heads of 320, more than 256"


def expected(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, Hq * D] of q [n, Hq, D] and k, v [n, Hk, D]: one row from its first token on."""
    group = spec.num_q_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("thd,nhd->htn", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    behind = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (behind >= 0) & (behind < (spec.window or len(q)))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("htn,nhd->thd", weights, v).flatten(1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
def test_windows_and_caps(
    window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the table says of a position that no new token sees is far outside."""
    monkeypatch.setattr("asyncllm.engine.attention_cpu.WINDOW_QUERIES", 3)
    monkeypatch.setattr("asyncllm.engine.attention_cpu.SCORES", 200)
    spec = replace(PLAIN, window=window, softcap=softcap)
    got, turned = run_two_rows(spec, None)
    for row, heads in zip(got, turned, strict=True):
        want = expected(spec, heads[:, :6], heads[:, 6:8], heads[:, 8:])
        torch.testing.assert_close(torch.cat(row), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("window", [None, 16])
def test_rows_in_8_bits(window: int | None, fmt: KvFormat) -> None:
    """A row of one token reads all of its K/V in 8 bits; more tokens read their own as they are."""
    spec = replace(PLAIN, window=window)
    got, turned = run_two_rows(spec, fmt)
    for lane, (parts, heads) in enumerate(zip(got, turned, strict=True)):
        exact = heads[:, 6:]
        kind = ELEMENTS[fmt.element]
        rounded = dequantize_ref(*quantize_ref(exact, kind, fmt.group), torch.float32)
        assert not torch.equal(exact, rounded)
        steps = [row for step in STEPS for row in step if row[0] == lane]
        for part, (_, start, count) in zip(parts, steps, strict=True):
            own = rounded if count == 1 else exact
            kv = torch.cat([rounded[:start], own[start : start + count]])
            want = expected(spec, heads[: start + count, :6], kv[:, :2], kv[:, 2:])[start:]
            torch.testing.assert_close(part, want, atol=2e-5, rtol=1e-4)


# lane, first position and number of new tokens, step by step: chunks, decode beside chunks
STEPS = [
    [(0, 0, 20), (1, 0, 13)],
    [(1, 13, 1), (0, 20, 24)],
    *([(0, 44 + i, 1), (1, 14 + i, 1)] for i in range(3)),
    [(1, 17, 13)],
]


def on_cpu(spec: AttentionSpec, fmt: KvFormat | None) -> TorchAttention:
    return TorchAttention([spec], TorchPairs([spec], torch.float32, fmt), 64, CPU)


def run_two_rows(
    spec: AttentionSpec,
    fmt: KvFormat | None,
    make: Callable[[AttentionSpec, KvFormat | None], AttentionBackend] = on_cpu,
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """For each lane what the steps gave, and its q, k and v [n, heads, D], rotated."""
    torch.manual_seed(0)
    attention = make(spec, fmt)
    [kv] = attention.layout.allocate(PerSpace(101, 101), CPU)
    qkv = [torch.randn(n, 10, 16) * 2 for n in (47, 30)]
    slots = torch.randperm(100).int()
    mine = [slots[:47], slots[47:77]]
    cos, sin = on_cpu(spec, fmt).angles[spec.rope].chunk(2, -1)
    turned = []
    for x in qkv:
        low, high = x[:, :8].chunk(2, -1)
        c, s = cos[: len(x), None], sin[: len(x), None]
        moved = torch.cat([low * c - high * s, high * c + low * s], -1)
        turned.append(torch.cat([moved, x[:, 8:]], 1))
    got: list[list[Tensor]] = [[], []]
    for rows in STEPS:
        table = torch.full((2, 64), 1 << 30, dtype=torch.int32)
        for lane, start, count in rows:
            first = max(0, start + 1 - (spec.window or 64))
            table[lane, first : start + count] = mine[lane][first : start + count]
        lanes, starts, counts = (list(column) for column in zip(*rows, strict=True))
        num = sum(count == 1 for count in counts)
        parts = [slice(start, start + count) for _, start, count in rows]
        batch = Batch(
            tokens=torch.empty(0),
            table=table,
            positions=torch.cat([torch.arange(p.start, p.stop) for p in parts]),
            slots=torch.cat([mine[lane][p] for lane, p in zip(lanes, parts, strict=True)]),
            decode_lanes=torch.tensor(lanes[:num], dtype=torch.int32),
            decode_lens=torch.tensor(starts[:num], dtype=torch.int32) + 1,
            prefill_cu=torch.tensor([num, *counts[num:]], dtype=torch.int32).cumsum(0).int(),
            prefill_lanes=torch.tensor(lanes[num:], dtype=torch.int32),
            prefill_starts=torch.tensor(starts[num:], dtype=torch.int32),
            max_count=max(counts),
            host=HostRows(lanes, starts, counts),
        )
        new = torch.cat([qkv[lane][p] for lane, p in zip(lanes, parts, strict=True)])
        out = attention.plan(spec, batch).run(new.flatten(1), kv)
        for lane, part in zip(lanes, out.split(counts), strict=True):
            got[lane].append(part)
    return got, turned


def test_one_layer_that_cannot_run_ends_the_start() -> None:
    spec = ModelSpec.from_hf(make_config().to_dict(), {})
    odd = replace(spec, layers=(*spec.layers[:2], replace(spec.layers[2], sinks=True)))
    with pytest.raises(StartupError) as error:
        make_model(
            odd, SingleRank(), dtype="fp32", device=CPU, max_len=64, where=torch.device("meta")
        )
    assert str(error.value) == (
        "attention of LlamaForCausalLM that has attention sinks is not supported"
    )


def test_layers_that_attend_alike_share_the_plan_of_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    planned: list[AttentionSpec] = []
    plan = TorchAttention.plan

    def noted(self: TorchAttention, spec: AttentionSpec, batch: Batch) -> Any:
        planned.append(spec)
        return plan(self, spec, batch)

    monkeypatch.setattr(TorchAttention, "plan", noted)
    read = ModelSpec.from_dir
    alike = Sequence(0, random_ids(9, VOCAB, 0))
    Driver(make_device(tmp_path, "fp32", "cpu"), 1024).generate([alike], 4)
    assert len(planned) == 4  # steps
    assert len(set(planned)) == 1

    def two_kinds(folder: Path) -> ModelSpec:
        spec = read(folder)
        first, *others = spec.layers
        return replace(spec, layers=(replace(first, scale=first.scale / 2), *others))

    monkeypatch.setattr(ModelSpec, "from_dir", two_kinds)
    planned.clear()
    differ = Sequence(0, random_ids(9, VOCAB, 0))
    Driver(make_device(tmp_path, "fp32", "cpu"), 1024).generate([differ], 4)
    assert len(planned) == 8
    assert len(set(planned)) == 2
    assert differ.logprobs != alike.logprobs
