"""K/V through pages from one division of the heads to another: every format, bit for bit."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from asyncllm.core.kv_heads import part
from asyncllm.core.windows import PerSpace
from asyncllm.engine.kv_pages import CpuPages, CudaPages, KvBytes, as_bytes, row_bytes, warm_up
from asyncllm.models.attention import KvLatents, KvLayout, KvPairs, LayerKv
from asyncllm.models.kv_format import FORMATS, KvFormat
from asyncllm.models.rope import Rope
from asyncllm.models.spec import AttentionSpec, shard_heads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS = 23
GQA = AttentionSpec(
    kind="gqa", num_q_heads=8, num_kv_heads=4, head_dim=16, v_dim=16, scale=1.0, rope=None
)
MLA = replace(GQA, kind="mla", num_kv_heads=8, kv_rank=24, rope=Rope(theta=1e4, dim=8))
ODD = replace(GQA, num_q_heads=9, num_kv_heads=3)  # is padded where tp is 2
LAYERS = {"gqa": [GQA, GQA], "mla": [MLA, MLA], "unlike": [GQA, ODD, replace(GQA, head_dim=32)]}
KINDS = [
    (kind, fmt)
    for kind in LAYERS
    for fmt in (None, *FORMATS.values())
    if kind != "mla" or fmt in (None, FORMATS["triton_fp8kv"])
]


def heads_of(spec: AttentionSpec, tp: int) -> list[tuple[int, ...]]:
    if spec.kind == "mla":
        return [(0,)] * tp
    return [shard_heads(spec, tp, rank).kv_heads for rank in range(tp)]


def make_pages(num: int, size: int) -> CpuPages | CudaPages:
    return CudaPages(num, size, DEVICE) if DEVICE.type == "cuda" else CpuPages(num, size)


class Side:
    """The ranks of one server, with noise in all their K/V; what is the same head is the same."""

    def __init__(self, kind: str, fmt: KvFormat | None, tp: int, seed: int) -> None:
        self.layers, self.tp = LAYERS[kind], tp
        self.kv: list[list[LayerKv]] = []
        self.bytes: list[KvBytes] = []
        for rank in range(tp):
            shares = [spec.on(shard_heads(spec, tp, rank)) for spec in self.layers]
            made = KvLatents if kind == "mla" else KvPairs
            layout: KvLayout = made(shares, torch.bfloat16, fmt)
            kv = layout.allocate(PerSpace(NUM_SLOTS, NUM_SLOTS), DEVICE)
            for i, (spec, tensors) in enumerate(zip(self.layers, kv, strict=True)):
                for j, x in enumerate(tensors):
                    self._noise(x, heads_of(spec, tp)[rank], seed + 100 * i + 1000 * j)
            self.kv.append(kv)
            self.bytes.append(KvBytes(kv, layout))

    def _noise(self, x: Tensor, heads: tuple[int, ...], seed: int) -> None:
        rows = as_bytes(x)
        size = rows.shape[1] // len(heads)
        for place, head in enumerate(heads):
            some = torch.Generator().manual_seed(seed + head)
            noise = torch.randint(256, (len(rows), size), generator=some, dtype=torch.uint8)
            rows[:, place * size : (place + 1) * size] = noise.to(DEVICE)

    def snapshot(self, rank: int) -> list[Tensor]:
        return [as_bytes(x).clone() for layer in self.kv[rank] for x in layer]


@pytest.mark.parametrize("tps", [(1, 1), (2, 1), (1, 2), (4, 2), (2, 8), (8, 4), (3, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: f"{k[0]}-{k[1].name if k[1] else 'plain'}")
def test_a_round_trip_moves_each_head_and_nothing_else(
    kind: tuple[str, KvFormat | None], tps: tuple[int, int]
) -> None:
    ours, theirs = Side(*kind, tps[0], seed=1), Side(*kind, tps[1], seed=50_000)
    sources, targets = array("i", [7, 3, 0, 22, 9]), array("i", [1, 20, 4, 5, 17])
    for receiver in range(theirs.tp):
        before = theirs.snapshot(receiver)
        for sender in range(ours.tp):
            parts = [
                part(heads_of(spec, ours.tp), heads_of(spec, theirs.tp), sender, receiver)
                for spec in ours.layers
            ]
            sent = ours.bytes[sender].strips(parts, sent=True)
            taken = theirs.bytes[receiver].strips(parts, sent=False)
            assert sent.width == taken.width
            pages = make_pages(2, 5 * max(sent.width, 1))
            pages.fill(1, sent, sources, host=True).wait()
            copy = make_pages(1, 5 * max(sent.width, 1))
            copy.host(0)[:] = pages.host(1)
            copy.empty(0, taken, targets, host=True).wait()
        expect(ours, theirs, receiver, (before, sources, targets))


def expect(
    ours: Side,
    theirs: Side,
    receiver: int,
    moved: tuple[list[Tensor], array[int], array[int]],
) -> None:
    before, sources, targets = moved
    want = iter(before)
    for i, spec in enumerate(theirs.layers):
        wanted, held = heads_of(spec, theirs.tp)[receiver], heads_of(spec, ours.tp)
        for j, x in enumerate(theirs.kv[receiver][i]):
            rows = next(want)
            size = rows.shape[1] // len(wanted)
            for place, head in enumerate(wanted):
                if head < 0:
                    continue
                rank = next(r for r, heads in enumerate(held) if head in heads)
                at = held[rank].index(head)
                source = as_bytes(ours.kv[rank][i][j])[list(sources), at * size : (at + 1) * size]
                rows[list(targets), place * size : (place + 1) * size] = source
            assert torch.equal(as_bytes(x), rows)


def test_pages_may_lie_in_memory_that_is_shared() -> None:
    memory = torch.zeros(3, row_bytes(40), dtype=torch.uint8)
    pages = CpuPages(3, 40, memory)
    pages.host(2)[:3] = b"abc"
    assert bytes(memory[2, :3].numpy()) == b"abc"
    assert pages.device(2).data_ptr() == memory[2].data_ptr()


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_the_warm_up_changes_nothing(kind: str) -> None:
    side = Side(kind, None, 2, seed=3)
    before = side.snapshot(1)
    whole = side.bytes[1].whole()
    assert whole.width == side.bytes[1].slot_bytes
    warm_up(make_pages(1, whole.width), side.bytes[1], NUM_SLOTS - 1)
    assert all(map(torch.equal, before, side.snapshot(1)))


def test_a_page_has_the_stamp_it_was_last_filled_with() -> None:
    side = Side("gqa", None, 1, seed=3)
    whole, slots = side.bytes[0].whole(), array("i", [4, 1])
    pages = make_pages(2, 2 * whole.width + 3)
    before = side.snapshot(0)
    pages.fill(1, whole, slots, host=False, stamp=5).wait()
    again = pages.fill(1, whole, slots, host=False, stamp=1 << 40)
    pages.empty(1, whole, slots, host=False, after=again).wait()
    assert pages._stamps.tolist() == [[0], [1 << 40]]
    assert all(map(torch.equal, before, side.snapshot(0)))
