"""Groups of rows: found as a comparison of all pairs finds them, and worth what they cost."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncllm.codec import i32
from asyncllm.engine import latent_cuda
from asyncllm.engine.device import CudaDevice
from asyncllm.engine.sharing import LEAST_ROWS, SharedColumns, SharedReads, shared_columns
from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, MEMBERS, SharingCosts
from asyncllm.messages import StepPlan
from asyncllm.models.kv_format import FORMATS, PLAIN, KvMode
from tests.models import test_deepseek
from tests.models.harness import Driver, Sequence, make_device, random_ids
from tests.models.test_llama import VOCAB, make_checkpoint

FREE = SharingCosts(rows=16, block=0.0, row=0.0, step=-1.0)


def columns(
    prefix_order: list[int], shared_lens: list[int], lanes: list[int], costs: SharingCosts = FREE
) -> SharedColumns | None:
    given = (np.array(column, np.int32) for column in (prefix_order, shared_lens, lanes))
    return shared_columns(*given, costs)


def plan(prefix_order: list[int], shared_lens: list[int], lanes: list[int]) -> StepPlan:
    num = len(lanes)
    return StepPlan(
        step=1, num_decode=num, lanes=i32(lanes), starts=i32([500] * num), counts=i32([1] * num),
        cached_counts=i32([0] * num), slots=i32(range(num)), tokens=i32([-1] * num),
        samples=bytearray(b"\1" * num), prefix_order=i32(prefix_order), shared_lens=i32(shared_lens),
    )  # fmt: skip


def test_nested_groups() -> None:
    found = columns([7, 3, 9, 1, 4], [0, 100, 300, 100, 0], [1, 3, 4, 7, 9])
    assert found is not None
    assert found.groups.T.tolist() == [[0, 100, 0, 4], [100, 300, 1, 2]]
    assert found.order.tolist() == [3, 1, 4, 0, 2]
    assert found.places.tolist() == [3, 1, -1, 0, 2]
    assert found.owns.tolist() == [100, 300, 0, 100, 300]
    assert found.saved == 3 * 100 + 200


def test_lanes_that_are_no_rows_are_left_out_and_what_they_had_in_common_is_not() -> None:
    found = columns([7, 3, 9, 1], [0, 100, 50, 70], [9, 7])
    assert found is not None
    assert found.groups.T.tolist() == [[0, 50, 0, 2]]
    assert columns([7, 3, 9, 1], [0, 100, 0, 70], [9, 7]) is None
    assert columns([7, 3], [0, 100], [8, 3]) is None


def test_what_costs_more_than_it_saves_is_no_group() -> None:
    costs = SharingCosts(rows=16, block=0.5, row=32, step=1000)
    few = columns([0, 1], [0, 3000], [0, 1], costs)
    assert few is not None
    assert few.groups.T.tolist() == [[0, 3000, 0, 2]]
    assert columns([0, 1], [0, 2000], [0, 1], costs) is None  # 2000 - 1000 - 64 is below 1000
    # 20 tokens of all are not worth a group, but they belong to the inner one
    inner = columns([*range(20)], [0, *[20] * 9, *[900] * 10], [*range(20)], costs)
    assert inner is not None
    assert inner.groups.T.tolist() == [[0, 900, 9, 11]]


def test_the_groups_that_save_most_where_there_are_too_many() -> None:
    num = MAX_GROUPS + 5
    shared_lens = [0 if i % 2 == 0 else 100 + i for i in range(2 * num)]
    found = columns([*range(2 * num)], shared_lens, [*range(2 * num)])
    assert found is not None
    assert found.groups.shape[1] == MAX_GROUPS
    assert found.saved == sum(sorted(shared_lens)[-MAX_GROUPS:])


def groups_by_pairs(
    order: list[int], shared_lens: list[int], lanes: list[int]
) -> set[tuple[int, ...]]:
    """(begin, stop, rows) of each set of rows that have more in common than any larger one."""
    rows = [lanes.index(lane) for lane in order if lane in lanes]
    at = [i for i, lane in enumerate(order) if lane in lanes]
    shared = {
        (i, j): min(shared_lens[at[i] + 1 : at[j] + 1]) for j in range(len(at)) for i in range(j)
    }
    depths: dict[tuple[int, ...], int] = {}
    for depth in set(shared.values()) - {0}:
        for i in range(len(rows)):
            same = [
                j for j in range(len(rows))
                if j == i or shared[min(i, j), max(i, j)] >= depth
            ]  # fmt: skip
            if len(same) > 1:
                members = tuple(rows[j] for j in same)
                depths[members] = max(depths.get(members, 0), depth)
    found = set()
    for members, depth in depths.items():
        around = [d for others, d in depths.items() if set(others) > set(members)]
        found.add((max(around, default=0), depth, *sorted(members)))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_random_trees(seed: int) -> None:
    rng = random.Random(seed)
    num = rng.randint(2, 12)
    order = rng.sample(range(20), num)
    shared_lens = [0, *(rng.choice([0, 5, 9, 9, 14, 30]) for _ in range(num - 1))]
    lanes = [*rng.sample(order, rng.randint(1, num)), 25]
    found = columns(order, shared_lens, lanes)
    want = groups_by_pairs(order, shared_lens, lanes)
    if sum(len(group) - 2 for group in want) > MEMBERS * len(lanes):
        want = set()
    if not want:
        return
    assert found is not None
    got = set()
    for begin, stop, first, count in found.groups.T.tolist():
        got.add((begin, stop, *sorted(found.order[first : first + count].tolist())))
    assert got == want
    for row in range(len(lanes)):
        owns = max((group[1] for group in want if row in group[2:]), default=0)
        assert found.owns[row] == owns
        assert (found.places[row] < 0) == (owns == 0)
        assert found.places[row] < 0 or found.order[found.places[row]] == row


def test_the_groups_of_an_unchanged_step_are_those_of_the_last_and_count_again() -> None:
    sharing = SharedReads(FREE)
    lanes = [*range(LEAST_ROWS)]
    shared_lens = [0, *[400] * (LEAST_ROWS - 1)]
    first, then = (sharing.of(plan(lanes, shared_lens, lanes)) for _ in range(2))
    assert first is not None
    assert first is then
    assert sharing.saved == 2 * 400 * (LEAST_ROWS - 1)
    other = sharing.of(plan(lanes[::-1], shared_lens, lanes))
    assert other is not None
    assert other.order.tolist() == lanes[::-1]
    assert sharing.of(plan(lanes, shared_lens, lanes[:-1])) is None  # too few rows
    assert sharing.of(plan([], [], lanes)) is None
    assert SharedReads(None).of(plan(lanes, shared_lens, lanes)) is None


def test_costs_follow_the_shape() -> None:
    """Llama-3.1-8B in bf16, and a quarter of its heads, whose bytes a step's fixed part outweighs."""
    whole, part = (SharingCosts.of(32 // n, 8 // n, 128) for n in (1, 4))
    assert (whole.rows, part.rows) == (16, 16)
    assert 0.7 < whole.gain(1536, 128) / (1536 * 127) < 0.9
    assert whole.gain(1024, 2) < 0 < whole.gain(1024, 8)
    assert part.step == pytest.approx(4 * whole.step)
    assert (part.block, part.row) == pytest.approx((whole.block, whole.row))


def test_costs_of_latents_follow_the_heads_of_a_rank() -> None:
    """DeepSeek-V2-Lite, and V3 on 8, 4, 2 ranks and one: blocks of 64 pairs are what it pays for."""

    def costs(heads: int) -> SharingCosts | None:
        return SharingCosts.of_latents(heads, 512, 64, 300)

    lite, eight, part = costs(16), costs(8), costs(32)
    assert lite is not None
    assert eight is not None
    assert part is not None
    assert (lite.rows, eight.rows, part.rows) == (4, 8, 2)
    assert costs(64) is costs(128) is None  # a row fills a block: as much is computed as before
    # blocks of 16 take half as long for 8 bits as for 16, and those of 64 longer
    assert SharingCosts.of_latents(16, 512, 64, 300, eight_bits=True) is None


TREE = [(512, 128), *[(1024, 32)] * 4]  # common tokens and rows, one group around the others


@pytest.mark.parametrize(
    ("heads", "eight_bits", "groups", "saved_us"),
    [
        (16, False, [(1536, 64)], -11.6), (16, False, [(1536, 128)], -13.6),
        (16, False, [(1536, 512)], 20.0), (16, False, [(704, 512)], -12.9),
        (16, False, TREE, -17.3), (16, False, [(12000, 8)], -5.9), (16, False, [(1024, 32)], -12.2),
        (8, False, [(1536, 128)], -7.1), (8, False, [(1536, 256)], 20.3),
        (8, False, [(1536, 512)], 60.0), (32, False, [(1536, 128)], 26.6),
        (32, False, [(1536, 256)], 37.2), (32, False, [(1536, 512)], 71.3),
        (8, True, [(1536, 128)], -17.2), (8, True, [(1536, 256)], 5.2),
        (32, True, [(1536, 128)], 64.1), (32, True, [(1536, 256)], 109.3),
    ],
)  # fmt: skip
def test_groups_of_latents_are_formed_where_they_paid(
    heads: int, eight_bits: bool, groups: list[tuple[int, int]], saved_us: float
) -> None:
    """As measured in a layer on an H200, rows with 200 to 600 tokens of their own."""
    costs = SharingCosts.of_latents(heads, 512, 64, 300, eight_bits=eight_bits)
    assert costs is not None
    assert (sum(costs.gain(*group) for group in groups) > costs.step) == (saved_us > 0)


def test_groups_have_no_more_blocks_than_their_partial_results_have_space() -> None:
    lanes = [*range(12)]
    shared_lens = [0, 50, 50, 50, 0, *[400] * 4, 0, 70, 70]
    costs = SharingCosts(rows=2, block=0.0, row=0.0, step=-1.0, blocks=5)
    found = columns(lanes, shared_lens, lanes, costs)
    assert found is not None
    assert found.groups.T.tolist() == [[0, 50, 0, 4], [0, 400, 4, 5]]


def rows_that_share(driver: Driver, vocab: int = VOCAB) -> list[Sequence]:
    """Rows in nested groups, in groups of their own and in none; which come and go, beside chunks
    of prompts that hit what others have computed."""
    trunk, other = random_ids(150, vocab, 1), random_ids(130, vocab, 2)
    seqs: list[Sequence] = []

    def begin(ids: list[int], head: int = 0, of: int = 0, beside: tuple[int, ...] = ()) -> None:
        seq = Sequence(len(seqs), ids)
        seq.slots = seqs[of].slots[:head] if head else []
        seqs.append(seq)
        driver.run([*((seqs[i], 1, 0) for i in beside), (seq, len(ids) - head, head)])

    def decode(*which: int) -> None:
        driver.run([(seqs[i], 1, 0) for i in which])

    begin(trunk)
    begin(trunk[:100] + random_ids(9, vocab, 3), 100)
    begin(trunk[:100] + random_ids(40, vocab, 4), 100)
    begin(other)
    begin(trunk[:100] + seqs[2].prompt[100:120] + random_ids(2, vocab, 5), 120, 2, (0, 1, 2, 3))
    begin([*other[:129], 7], 129, 3, (0, 1, 2, 4))
    decode(0, 1, 2, 3, 4, 5)
    decode(5, 3, 4, 1, 0)  # another order, without one of the inner group
    begin(random_ids(50, vocab, 6), 0, 0, (5, 0, 1, 2, 3, 4))
    begin(other[:1] + random_ids(20, vocab, 7), 1, 3, (6, 5, 4, 3, 2, 1, 0))
    for _ in range(2):
        decode(*range(8))
    decode(2, 4, 6, 7)
    decode(0, 3, 6, 7)
    return seqs


# in its steps with as many decode rows as groups need: 100 of the trunk, 20 more, the other's 129
SAVED = 200 + 320 + 449 + 329 + 2 * 449 + 2 * 450 + 120 + 1


def same_answers(want: list[Sequence], got: list[Sequence], bound: float) -> None:
    assert [s.outputs for s in got] == [s.outputs for s in want]
    for w, g in zip(want, got, strict=True):
        pair = torch.tensor(g.logprobs), torch.tensor(w.logprobs)
        torch.testing.assert_close(*pair, atol=bound, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("model", "fmt"),
    [*(("llama", fmt) for fmt in (None, *FORMATS)), ("v2 lite", None), ("v3", "triton_fp8kv")],
)
def test_the_same_tokens_in_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, fmt: str | None, graphs: bool
) -> None:
    monkeypatch.setattr(latent_cuda, "tuned", lambda *key: {"tile": 64})  # as if it were
    if model == "llama":
        make_checkpoint(tmp_path)
    else:
        test_deepseek.make_checkpoint(tmp_path, *test_deepseek.VARIANTS[model])
    found = []
    for shares in (False, True):
        kv = PLAIN if fmt is None else KvMode(FORMATS[fmt])
        device = make_device(tmp_path, "fp32", "cuda", num_lanes=40, kv=kv, shares_prefixes=shares)
        assert isinstance(device, CudaDevice)
        if shares:
            device.engine.sharing.costs = FREE
        if graphs:
            device.capture(300)
        found.append(rows_that_share(Driver(device, 4096)))
        assert device.engine.sharing.saved == (SAVED if shares else 0)
        device.close()
    same_answers(*found, 3e-2)
