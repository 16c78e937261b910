"""CUDA graphs: the same answers as eager steps, for every kind of step, padded or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.engine.device import CudaDevice
from asyncllm.engine.graphs import (
    GRAPH_CHUNK,
    GRAPH_DECODE_ROWS,
    MAX_DECODE_ROWS,
    MAX_PREFILL_ROWS,
    MOST_CHUNK,
    DecoderGraphs,
    decode_sizes,
    mixed_sizes,
)
from asyncllm.engine.h2d import FIXED_WORDS, RING, Uploader
from asyncllm.engine.sampler_graphs import (
    KINDS,
    MAX_ROWS,
    SampledTokens,
    SamplerGraphs,
    SamplerVariant,
    sampler_sizes,
)
from asyncllm.engine.sampling_table import SamplingBatch, SamplingTable
from asyncllm.engine.sharing import SharedReads
from asyncllm.engine.step_inputs import (
    Bucket,
    HostColumn,
    LengthPenalties,
    OptionalInputs,
    RowColumns,
    Scatter,
    SharedRowColumns,
    StepColumns,
    StepRows,
    unpack,
)
from asyncllm.messages import StepPlan
from asyncllm.models.kv_format import DECODE_KERNELS, FORMATS, PLAIN, KvMode
from asyncllm.records import OpenedLane
from tests.kernels.harness import no_sync
from tests.models.families import CASES, make
from tests.models.families import VOCAB as FAMILY_VOCAB
from tests.models.harness import Driver, Sequence, make_device, random_ids
from tests.models.test_llama import VOCAB, make_checkpoint
from tests.models.test_sharing import FREE

R = TypeVar("R")


@pytest.mark.parametrize("most", [1, 3, 100, 1000, 5000])
def test_sizes_rise_and_reach_the_most(most: int) -> None:
    for sizes in (decode_sizes(most), mixed_sizes(most)):
        assert sizes == sorted(set(sizes))
    assert decode_sizes(most)[-1] == min(most, MAX_DECODE_ROWS)
    assert mixed_sizes(most)[-1] == max(most, min(most, GRAPH_CHUNK) + GRAPH_DECODE_ROWS)

    waste = [b / (a + 1) for a, b in zip(decode_sizes(most), decode_sizes(most)[1:], strict=False)]
    assert all(w <= 2 for w in waste)


@pytest.mark.parametrize("chunk", [MOST_CHUNK + 1, 16384, 262144, 10**7])
def test_a_huge_chunk_has_no_graph(chunk: int) -> None:
    """Its activations would be held twice, and its columns leave the place of graphs' inputs."""
    assert mixed_sizes(MOST_CHUNK)[-1] == MOST_CHUNK
    assert mixed_sizes(chunk)[-1] == GRAPH_CHUNK + GRAPH_DECODE_ROWS
    graphs, uploader = DecoderGraphs(65536, chunk, shares=True), fixed(65536)
    for bucket in graphs.all():
        uploader.captured(bucket)


@pytest.mark.parametrize("rows", [1, 12, 16, 17, 32])
@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_few_rows_beside_a_prompt_of_usual_length_have_little_padding(
    length: int, rows: int
) -> None:
    assert min(n for n in mixed_sizes(4096) if n >= length + rows) - (length + rows) < 16


CHOICES = [
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=0.9, top_p=0.8, seed=7, logprobs=0),
    SamplingParams(temperature=0.7, top_k=9, min_p=0.01, seed=9, logprobs=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.3),
    SamplingParams(temperature=0.8, logit_bias=((3, 4.0),), seed=1),
]


@pytest.mark.parametrize("most", [1, 5, 256, 1000, 3000])
def test_tail_sizes_rise_and_reach_the_most(most: int) -> None:
    sizes = sampler_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(most, MAX_ROWS)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ([0], SamplerVariant(1, True, False, False, True)),
        ([0, 1], SamplerVariant(2, False, False, False, True)),
        ([1, 1, 1], SamplerVariant(4, False, False, False, False)),
        ([0, 2, 1], SamplerVariant(4, False, True, False, True)),
        ([3], None),  # alternatives
        ([4], SamplerVariant(1, False, True, True, False)),
        ([0, 4], SamplerVariant(2, False, True, True, True)),
        ([4, 5], None),
        ([5], None),  # biases
        ([0] * 7, None),  # more rows than graphs have
    ],
)
def test_steps_end_in_the_graph_of_their_kind(
    params: list[int], expected: SamplerVariant | None
) -> None:
    lanes = SamplingTable(8, VOCAB, (2,))
    opened = [OpenedLane(lane, 3, CHOICES[i], i32([])) for lane, i in enumerate(params)]
    n = len(params)
    plan = StepPlan(
        step=1, num_decode=0, lanes=i32(range(n)), starts=i32([0] * n), counts=i32([3] * n),
        cached_counts=i32([0] * n), slots=i32(range(3 * n)), tokens=i32([1] * (3 * n)),
        samples=bytearray(b"\x01" * n), opened=opened,
    )  # fmt: skip
    lanes.open(plan)
    graphs, rows = SamplerGraphs(torch.zeros(6, 4)), unpack(plan, 16)
    assert graphs.pick(lanes.batch(rows)) == expected
    assert graphs.pick(lanes.batch(rows, masked=True)) is None


class Simulated:
    """Graphs without CUDA: a replay runs again what was captured, on the tensors that it was
    captured with, and leaves the results where the capture did."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, run: Callable[[], R]) -> tuple[Callable[[], None], R]:
        kept = run()

        def replay() -> None:
            self.replays += 1
            for old, new in zip(tree_leaves(kept), tree_leaves(run()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return replay, kept


class NoDecoderGraphs(DecoderGraphs):
    """Attention on a CPU needs the rows on the host, which no graph has."""

    def capture(self, *_: object) -> None:
        pass

    def pick(self, rows: StepRows, num_tokens: int, *, mixed: bool) -> None:
        return None


def test_ends_in_graphs_choose_what_eager_ones_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path)
    monkeypatch.setattr("asyncllm.engine.engine.DecoderGraphs", NoDecoderGraphs)
    answers: list[list[Sequence]] = []
    capture, used, end = Simulated(), set(), SamplerGraphs.end

    def noted(self: SamplerGraphs, variant: SamplerVariant, *args: Any) -> SampledTokens:
        used.add(variant)
        return end(self, variant, *args)

    monkeypatch.setattr(SamplerGraphs, "end", noted)
    for graphs in (False, True):
        device = make_device(tmp_path, "fp32", "cpu", num_lanes=40)
        if graphs:
            engine = device.engine
            engine._uploader = fixed(40)
            engine.capture(capture, 300)
        answers.append(choose_in_many_ways(Driver(device, 4096)))
    assert capture.replays > 50
    for eager, graphed in zip(*answers, strict=True):
        assert eager.outputs == graphed.outputs
        torch.testing.assert_close(
            torch.tensor(graphed.logprobs), torch.tensor(eager.logprobs), equal_nan=True
        )
    assert {(t.greedy, t.truncates, t.penalized) for t in used} == set(KINDS)
    assert {t.scored for t in used} == {False, True}


def fixed(num_lanes: int, *, two_spaces: bool = False) -> Uploader:
    return Uploader(
        torch.device("cpu"), num_lanes=num_lanes, dump_slot=9999, fixed=True,
        dump_sliding=777 if two_spaces else None,
    )  # fmt: skip


def step(num_decode: int, prefills: list[int], choices: list[int]) -> StepPlan:
    """Rows in lanes 0, 1, ..., which the plan opens, with tokens and slots that tell them apart."""
    counts = [1] * num_decode + prefills
    num, total = len(counts), sum(counts)
    params = [CHOICES[choices[i % len(choices)]] for i in range(num)]
    return StepPlan(
        step=1, num_decode=num_decode, lanes=i32(range(num)), starts=i32(range(7, 7 + num)),
        counts=i32(counts), cached_counts=i32([0] * num), slots=i32(range(100, 100 + total)),
        tokens=i32(range(200, 200 + total)), samples=bytearray(1 for _ in counts),
        opened=[OpenedLane(lane, 3, p, i32([])) for lane, p in enumerate(params)],
        sliding=i32(range(500, 500 + total)), prefix_order=i32(range(num)),
        shared_lens=i32([0 if lane % 9 == 0 else 6 for lane in range(num)]),
    )  # fmt: skip


LANES = 40
STEPS = [
    *(step(n, [], [kind]) for n in (1, 2, 3, 17, 40) for kind in (0, 1, 2, 4)),
    *(step(n, some, [0, 2, 4]) for n in (0, 5, 32) for some in ([1], [63], [9, 1, 100], [250])),
    step(30, [], [4, 1, 0, 2]),
]


def start_of(tensor: torch.Tensor) -> int:
    return tensor.storage_offset()


@pytest.mark.parametrize(("two_spaces", "shares"), [(False, False), (True, True), (False, True)])
def test_graphs_are_replayed_on_the_addresses_that_they_were_captured_with(
    two_spaces: bool, shares: bool
) -> None:
    """Whatever the bucket and the sampler's variant; and there lies the step, padded."""
    uploader = fixed(LANES, two_spaces=two_spaces)
    graphs, sharing = DecoderGraphs(LANES, 300, shares=shares), SharedReads(FREE)
    samplers = SamplerGraphs(torch.zeros(LANES, 4))
    given: dict[object, Any] = {}

    def captured(columns: StepColumns[torch.Tensor], bucket: Bucket) -> torch.Tensor:
        given[bucket] = columns
        return torch.zeros(1)

    def ended(
        _: torch.Tensor, columns: StepColumns[torch.Tensor], kind: SamplerVariant
    ) -> SampledTokens:
        given[kind] = columns
        return torch.zeros(1), None

    graphs.capture(Simulated(), uploader, captured)
    samplers.capture(Simulated(), uploader, ended)
    assert {*graphs.all(), *samplers.all()} == given.keys()
    place = uploader._place.untyped_storage().data_ptr()
    seen = set()
    for plan in STEPS * 2:  # more than there are buffers on the host
        table = SamplingTable(LANES, VOCAB, ())
        table.open(plan)
        rows = unpack(plan, 512, two_spaces=two_spaces)
        rows.shared = sharing.of(plan) if shares else None
        batch = table.batch(rows)
        mixed = rows.num_decode < len(rows.lanes)
        bucket, kind = graphs.pick(rows, len(rows.tokens), mixed=mixed), samplers.pick(batch)
        assert bucket is not None
        assert kind is not None
        seen |= {bucket, kind}
        columns, _ = uploader.upload(uploader.write(rows, batch, OptionalInputs(), bucket))
        assert (columns.shared is None) == (not bucket.shares)
        assert not rows.shared or bucket.shares
        for ours, theirs in ((columns.rows, given[bucket].rows),
                             (columns.sampling, given[kind].sampling),
                             (columns.penalties, given[kind].penalties),
                             (columns.shared or (), given[bucket].shared)):  # fmt: skip
            for name in getattr(ours, "_fields", ()):
                mine, other = getattr(ours, name), getattr(theirs, name)
                if name == "sliding_slots" and not two_spaces:
                    assert mine is other is None
                    continue
                assert mine.untyped_storage().data_ptr() == place
                assert other.untyped_storage().data_ptr() == place
                assert (start_of(mine), mine.dtype, mine.shape) == (
                    start_of(other), other.dtype, other.shape,
                ), name  # fmt: skip
        check_rows(given[bucket].rows, rows)
        if columns.shared is not None:
            check_shared(columns.shared, rows)
        check_sampling(given[kind], batch, kind.penalized)
    assert len(seen) > 20
    assert {(k.greedy, k.truncates, k.penalized) for k in seen if isinstance(k, SamplerVariant)} == set(KINDS)  # fmt: skip


def test_a_buckets_columns_are_where_its_graph_reads_them_when_a_buffer_has_grown() -> None:
    uploader, plan, bucket = fixed(LANES), step(3, [], [0]), Bucket(4, 4, 0)
    given = uploader.captured(bucket).rows
    table = SamplingTable(LANES, VOCAB, ())
    table.open(plan)
    rows = unpack(plan, 512)
    for size in (0, 0, 5000, 9):
        where = np.arange(size, dtype=np.int32)
        extras = OptionalInputs(known=Scatter[HostColumn](where, where) if size else None)
        for _ in range(RING):
            uploader._place.zero_()
            uploader.upload(uploader.write(rows, table.batch(rows), extras, bucket))
            check_rows(given, rows)


def check_shared(columns: SharedRowColumns[torch.Tensor], rows: StepRows) -> None:
    """Groups and their rows, and padding that is in none."""
    groups, found = columns.groups.view(4, -1), rows.shared
    if found is None:
        assert not groups.any()
        assert (columns.places == -1).all()
        assert not columns.owns.any()
        return
    num, count = found.groups.shape[1], rows.num_decode
    np.testing.assert_array_equal(groups[:, :num], found.groups)
    assert not groups[:, num:].any()
    for column, values, padding in (
        (columns.order, found.order, 0), (columns.places, found.places, -1),
        (columns.owns, found.owns, 0),
    ):  # fmt: skip
        np.testing.assert_array_equal(column[: len(values)], values)
        assert (column[max(len(values), count) :] == padding).all()


def test_groups_that_step_together_have_graphs_of_one_size() -> None:
    """Whatever a group's own rows are, its step has the size that is due for the largest."""
    graphs = DecoderGraphs(LANES, 300)
    plans = step(3, [], [0]), step(1, [70], [0]), StepPlan(step=1, num_decode=0)
    decode, chunk, nothing = (unpack(plan, 512, two_spaces=False) for plan in plans)
    assert graphs.pick(decode, 3, mixed=False) == Bucket(4, 4, 0)
    assert graphs.pick(nothing, 3, mixed=False) == Bucket(4, 4, 0)
    for rows in (decode, nothing, chunk):
        bucket = graphs.pick(rows, 71, mixed=True)
        assert bucket is not None
        assert bucket.num_tokens == graphs.size(71, mixed=True) == 128
        assert bucket.num_prefill == MAX_PREFILL_ROWS
    assert graphs.pick(decode, 5000, mixed=True) is None
    assert graphs.size(5000, mixed=True) == 5000


@pytest.mark.parametrize(
    ("num_tokens", "bucket"),
    [(70, 128), (2304, 2304), (2305, None), (3968, None), (3969, 4096), (4096, 4096), (4097, None)],
)
def test_full_mixed_steps_have_a_graph_and_others_up_to_a_limit(
    num_tokens: int, bucket: int | None
) -> None:
    rows = unpack(step(1, [70], [0]), 512, two_spaces=False)
    graphs = DecoderGraphs(LANES, 4096)
    picked = graphs.pick(rows, num_tokens, mixed=True)
    assert (picked and picked.num_tokens) == bucket
    assert graphs.size(num_tokens, mixed=True) == (bucket or num_tokens)


def check_rows(given: RowColumns[torch.Tensor], rows: StepRows) -> None:
    tokens, decode = len(rows.tokens), rows.num_decode
    prefill = len(rows.lanes) - decode
    for column, values, padding in (
        (given.tokens, rows.tokens, 0), (given.token_lanes, rows.token_lanes, LANES),
        (given.positions, rows.positions, 0), (given.slots, rows.slots, 9999),
        (given.decode_lanes, rows.lanes[:decode], LANES),
        (given.decode_lens, rows.starts[:decode] + 1, 0),
        (given.prefill_lanes, rows.lanes[decode:], LANES),
        (given.prefill_starts, rows.starts[decode:], 0),
        (given.prefill_cu, rows.cu[decode:], tokens),
    ):  # fmt: skip
        assert column.tolist() == [*values.tolist(), *[padding] * (len(column) - len(values))]
    if given.sliding_slots is not None:
        assert rows.sliding is not None
        padding = len(given.sliding_slots) - tokens
        assert given.sliding_slots.tolist() == [*range(500, 500 + tokens), *[777] * padding]
        assert rows.slots[0] == 100
    else:
        assert rows.slots[0] == 500, "all layers have a window: theirs are the slots"
    assert len(given.tokens) >= tokens
    assert len(given.prefill_lanes) >= prefill


def check_sampling(given: StepColumns[torch.Tensor], batch: SamplingBatch, penalized: bool) -> None:
    s, p, n = given.sampling, given.penalties, len(batch.lanes)
    for name, padding in (
        ("temperature", 0), ("top_k", 1), ("top_p", 1), ("min_p", 0), ("uniform", 0.5),
        ("logit_rows", 0), ("lanes", LANES),
    ):  # fmt: skip
        column, values = getattr(s, name).numpy(), getattr(batch, name)
        np.testing.assert_array_equal(column[:n], values)
        assert (column[n:] == padding).all()
    assert (p is not None) == (given.penalties is not None)
    if penalized and p is not None:
        assert batch.penalties is not None
        picked = batch.penalties.rows
        assert p.rows.tolist() == list(range(LANES))
        assert p.lanes.tolist() == s.lanes.tolist()
        for name in ("lens", "prompt_lens", "presence", "frequency", "repetition"):
            column, values = getattr(p, name).numpy(), getattr(batch.penalties, name)
            np.testing.assert_array_equal(column[picked], values)
            assert not np.delete(column, picked).any()  # length 0 changes nothing


def test_what_no_graph_reads_comes_behind_what_graphs_read() -> None:
    """Also where all of it is too large for the fixed place: graphs find their columns there."""
    uploader = fixed(LANES)
    bucket = Bucket(2, 2, 0)
    theirs = uploader.captured(bucket)
    plan = step(2, [], [0])
    table = SamplingTable(LANES, VOCAB, ())
    table.open(plan)
    rows = unpack(plan, 512)
    for size in (5, FIXED_WORDS + 3):
        scales = np.linspace(1, 2, 3, dtype=np.float32)
        extras: OptionalInputs[HostColumn] = OptionalInputs(
            known=Scatter(np.arange(size, dtype=np.int32), np.arange(size, dtype=np.int32)[::-1]),
            lengths=LengthPenalties(np.arange(3, dtype=np.int32), scales),
        )
        theirs.rows.tokens.zero_()
        columns, placed = uploader.upload(uploader.write(rows, table.batch(rows), extras, bucket))
        assert columns is theirs
        assert theirs.rows.tokens.tolist() == [200, 201]
        assert placed.known is not None
        assert placed.lengths is not None
        assert torch.equal(placed.known.where, torch.arange(size, dtype=torch.int32))
        assert torch.equal(placed.known.values, placed.known.where.flip(0))
        np.testing.assert_array_equal(placed.lengths.scales.numpy(), scales)
        assert placed.bias is None


def choose_in_many_ways(driver: Driver) -> list[Sequence]:
    out = []
    for kinds in (
        [0],
        [1],
        [2],
        [0, 1, 2],
        [1, 1],
        [3, 0],
        [4],
        [4, 2, 4],
        [5, 1],
        [4] * 7,
        [2] * 7,
    ):
        seqs = [
            Sequence(lane, random_ids(9 + lane, VOCAB, lane), CHOICES[kind])
            for lane, kind in enumerate(kinds)
        ]
        driver.run([(s, len(s.prompt), 0) for s in seqs])
        for _ in range(8):
            driver.run([(s, 1, 0) for s in seqs])
        out += seqs
    return out


def test_penalties_reach_the_logits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    driver = Driver(make_device(tmp_path, "fp32", "cpu", max_len=256), 4096)
    far = SamplingParams(temperature=0.0, presence_penalty=1e4)
    seqs = [Sequence(0, random_ids(5, VOCAB, 0), far), Sequence(1, random_ids(5, VOCAB, 0))]
    driver.generate(seqs, 200)
    assert len(set(seqs[0].outputs)) == 200
    assert len(set(seqs[1].outputs)) < 200


# float32 products of Triton and cuBLAS differ with their shape by this much in log-probabilities;
# bfloat16 ones by a rounding of the residual stream in each of the 3 layers
BOUNDS = {"fp32": 2e-3, "bf16": 0.05}


def on_device(
    tmp_path: Path, dtype: str, graphs: bool, drive: Callable[[Driver], list[Sequence]],
    kv: KvMode = PLAIN,
) -> list[Sequence]:  # fmt: skip
    device = make_device(tmp_path, dtype, "cuda", num_lanes=40, kv=kv)
    assert isinstance(device, CudaDevice)
    if graphs:
        device.capture(300)
    try:
        with no_sync() if graphs else nullcontext():
            return drive(Driver(device, 4096))
    finally:
        device.close()


@pytest.mark.gpu
def test_ends_of_steps_give_what_eager_ones_give(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    eager, graphed = (on_device(tmp_path, "fp32", g, choose_in_many_ways) for g in (False, True))
    assert [s.outputs for s in graphed] == [s.outputs for s in eager]
    for e, g in zip(eager, graphed, strict=True):
        torch.testing.assert_close(
            torch.tensor(g.logprobs), torch.tensor(e.logprobs), atol=BOUNDS["fp32"], rtol=0,
            equal_nan=True,
        )  # fmt: skip


def steps_of_every_shape(driver: Driver, vocab: int = VOCAB) -> list[Sequence]:
    """1 row, then odd numbers of rows beside chunks that do and do not fill a bucket."""
    sizes = [5, 64, 130, 1, 17, 250, *range(30, 50)]
    seqs = [Sequence(lane, random_ids(size, vocab, lane)) for lane, size in enumerate(sizes)]
    running: list[Sequence] = []
    for seq in seqs:
        driver.run([*((s, 1, 0) for s in running), (seq, len(seq.prompt), 0)])
        running.append(seq)
    for count in (*[len(running)] * 6, *[3] * 6):
        driver.run([(s, 1, 0) for s in running[:count]])
    return seqs


@pytest.mark.gpu
def test_graphs_give_the_tokens_of_eager_steps(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    eager, graphed = (on_device(tmp_path, "fp32", g, steps_of_every_shape) for g in (False, True))
    assert [s.outputs for s in graphed] == [s.outputs for s in eager]
    for e, g in zip(eager, graphed, strict=True):
        torch.testing.assert_close(
            torch.tensor(g.logprobs), torch.tensor(e.logprobs), atol=BOUNDS["fp32"], rtol=0
        )


class Wider:
    """A device whose steps have the size of another group's, which has more tokens, and longer rows
    now and then; some of its own have no rows."""

    def __init__(self, device: Any) -> None:
        self.device, self.turn = device, 0

    def launch(self, plan: StepPlan) -> Any:
        self.turn += 1
        chunks, own = plan.num_decode < len(plan.lanes), len(plan.tokens)
        sizes = {"common": own + (0, 1, 90)[self.turn % 3], "mixed": chunks or self.turn % 2 > 0}
        self.device.launch(replace(StepPlan(step=plan.step, num_decode=0), **sizes))
        return self.device.launch(replace(plan, **sizes))


def steps_wider_than_their_rows(driver: Driver) -> list[Sequence]:
    driver.device = Wider(driver.device)  # type: ignore[assignment]
    return steps_of_every_shape(driver)


def test_wider_steps_give_the_tokens_of_their_rows(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    found = []
    for drive in (steps_of_every_shape, steps_wider_than_their_rows):
        device = make_device(tmp_path, "fp32", "cpu", num_lanes=40)
        found.append([s.outputs for s in drive(Driver(device, 4096))])
        device.close()
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_wider_steps_give_the_tokens_of_their_rows_on_a_gpu(tmp_path: Path, graphs: bool) -> None:
    make_checkpoint(tmp_path)
    plain = on_device(tmp_path, "fp32", False, steps_of_every_shape)
    wider = on_device(tmp_path, "fp32", graphs, steps_wider_than_their_rows)
    assert [s.outputs for s in wider] == [s.outputs for s in plain]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen2 moe", "deepseek v3"])
def test_graphs_of_experts_give_the_log_probabilities_of_eager_steps(
    tmp_path: Path, family: str
) -> None:
    """A bucket's padding changes how pairs fall into blocks, never what a token gets."""
    make(CASES[family], tmp_path, spread=0.5)
    drive = partial(steps_of_every_shape, vocab=FAMILY_VOCAB)
    eager, graphed = (on_device(tmp_path, "fp32", g, drive) for g in (False, True))
    assert [s.outputs for s in graphed] == [s.outputs for s in eager]
    for e, g in zip(eager, graphed, strict=True):
        torch.testing.assert_close(
            torch.tensor(g.logprobs), torch.tensor(e.logprobs), atol=BOUNDS["fp32"], rtol=0
        )


MODES = [[], *([name] for name in (*FORMATS, *DECODE_KERNELS))]


@pytest.mark.gpu
@pytest.mark.parametrize("modes", MODES, ids=str)
def test_graphs_give_the_log_probabilities_of_eager_steps(tmp_path: Path, modes: list[str]) -> None:
    """In bfloat16 near-ties may flip, so all tokens are given: each step feeds known ones."""
    make_checkpoint(tmp_path, initializer_range=0.05)
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)

    def given_tokens(driver: Driver) -> list[Sequence]:
        sizes = [20, 64, 130, 17, 250, *range(30, 45)]
        seqs = [
            Sequence(lane, random_ids(size, VOCAB, lane), params) for lane, size in enumerate(sizes)
        ]
        while any(s.computed < len(s.prompt) - 1 for s in seqs):
            left = [s for s in seqs if s.computed < len(s.prompt) - 1]
            # one token of some, as in a decode step; chunks of others, as in a mixed one
            driver.run([(s, 1 if s.lane % 2 else min(19, len(s.prompt) - s.computed), 0) for s in left])  # fmt: skip
        return seqs

    eager, graphed = (
        on_device(tmp_path, "bf16", g, given_tokens, KvMode.named(modes)) for g in (False, True)
    )
    for e, g in zip(eager, graphed, strict=True):
        assert len(e.prompt_logprobs) >= len(e.prompt) - 2
        torch.testing.assert_close(
            torch.tensor(g.prompt_logprobs), torch.tensor(e.prompt_logprobs),
            atol=BOUNDS["bf16"], rtol=0,
        )  # fmt: skip
