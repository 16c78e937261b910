"""Attention over latents in which rows share their first slots, against a reference that does not
care."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.latent.attend import attend, attend_ref
from asyncllm.kernels.latent.keys import AttendConfig
from asyncllm.kernels.latent.plan import AttendPlan, plan_attend
from asyncllm.kernels.latent.shared import piece_numbers
from tests.kernels.harness import DEVICE, HERE, assert_close, ints, no_sync, randn, replayed
from tests.kernels.latents import in_eight_bits, make_latents, make_queries
from tests.kernels.test_attention_shared import (
    ALL,
    BIG,
    NAMES,
    NESTED,
    ONE,
    SEVERAL,
    UNEVEN,
    Rows,
    on_device,
    vars_of,
)

Case = dict[str, Tensor]
SMALL = AttendConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=1)


def make_case(rows: Rows, heads: int, rank: int, rope: int, dtype: torch.dtype) -> Case:
    """Members of a group have the slots of its first one; what these replace is NaN."""
    latents = make_latents(rows.lengths, rank + rope, dtype)
    table, lanes = latents["table"], latents["lanes"]
    for begin, stop, first, count in rows.groups:
        some = lanes[rows.order[first : first + count]].long()
        for lane in some[1:]:
            latents["cache"][table[lane, begin:stop].long()] = float("nan")
            table[lane, begin:stop] = table[some[0], begin:stop]
    q, turned = make_queries(len(rows.lengths), heads, rank, rope, dtype)
    return {"q": q, "turned": turned, **latents, "lens": ints(rows.lengths)}


def plan_for(case: Case, rows: Rows, **options: object) -> AttendPlan:
    options = {
        "config": SMALL, "num_ranges": 5, "shared_config": SMALL, "shared_ranges": 7, **options,
    }  # fmt: skip
    where = case["lanes"], case["lens"], case["q"].shape[1], case["cache"], case["q"].shape[2]
    return plan_attend(*where, shared=on_device(rows), **options)


def run(case: Case, plan: AttendPlan) -> Tensor:
    """NaN where nothing is written."""
    given = {n: case[n] for n in ("q", "turned", "cache", "table", "scales") if n in case}
    out = torch.full(case["q"].shape, float("nan"), dtype=case["q"].dtype, device=DEVICE)
    return attend(**given, scale=0.1, plan=plan, out=out)


def check(case: Case, plan: AttendPlan) -> None:
    got, there = run(case, plan), case["lens"] > 0
    assert_close("out", attend_ref(**case, scale=0.1)[there], got[there])
    assert bool(got[~there].isnan().all())


@pytest.mark.parametrize("rows", ALL, ids=NAMES)
@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_shared_latents_are_read_once(rows: Rows, dtype: torch.dtype) -> None:
    case = make_case(rows, 16, 64, 16, dtype)
    plan = plan_for(case, rows)
    with no_sync():
        run(case, plan)
    check(case, plan)
    own = sum(rows.lengths) - sum((end - start) * num for start, end, _, num in rows.groups)
    tiles = plan.meta[0].item()
    assert own / SMALL.tile <= tiles < own / SMALL.tile + len(rows.lengths)


@pytest.mark.parametrize(("heads", "eight_bits"), [(1, False), (6, False), (20, True), (70, True)])
@pytest.mark.usefixtures("poisoned_empty")
def test_any_number_of_heads(heads: int, eight_bits: bool) -> None:
    case = make_case(NESTED, heads, 64, 16, HERE[0])
    if eight_bits:
        case = in_eight_bits(case)
    check(case, plan_for(case, NESTED))


@pytest.mark.parametrize(("num_ranges", "shared_ranges"), [(1, 2), (3, 1), (40, 50)])
@pytest.mark.usefixtures("poisoned_empty")
def test_any_division_gives_the_same(num_ranges: int, shared_ranges: int) -> None:
    case = make_case(NESTED, 16, 40, 24, torch.float32)
    plan = plan_for(case, NESTED, num_ranges=num_ranges, shared_ranges=shared_ranges)
    for layer in range(2):
        case["q"] = randn(*case["q"].shape, dtype=torch.float32, seed=layer)
        check(case, plan)


def test_more_pieces_than_are_merged_at_once() -> None:
    rows = Rows([700, 650], [1, 0], [(0, 640, 0, 2)])
    case = make_case(rows, 3, 32, 16, torch.float32)
    plan = plan_for(case, rows, shared_ranges=40)
    assert plan.shared is not None
    assert plan.shared.num_pieces.tolist() == [40, 40]
    check(case, plan)


def test_pieces_have_places_of_their_own_and_fit_the_space_they_are_given() -> None:
    """As many as ranges and blocks together, at most; nothing behind them is written."""
    for rows in (UNEVEN, NESTED):
        case = make_case(rows, 16, 32, 16, torch.float32)
        blocks = sum(-(-count // 4) for *_, count in rows.groups)
        for num_ranges in (1, 3, 29):
            size = (num_ranges + blocks) * piece_numbers(16, 32)
            space = torch.full((size + 8,), 7.0, device=DEVICE)
            plan = plan_for(case, rows, shared_ranges=num_ranges, space=space[:size])
            shared = plan.shared
            assert shared is not None
            check(case, plan)
            assert bool((space[size:] == 7.0).all())
            num = shared.num_pieces.tolist()
            places = [p for row, n in enumerate(num) for p in shared.pieces[row, :n].tolist()]
            assert len(places) == len(set(places))
            assert all(place < (num_ranges + blocks) * 4 for place in places)


@pytest.mark.usefixtures("poisoned_empty")
def test_padding_rows_behind_the_others() -> None:
    case = make_case(SEVERAL, 4, 32, 16, torch.float32)
    for name in ("q", "turned", "lanes", "lens"):
        pad = case[name].new_zeros((3, *case[name].shape[1:]))
        case[name] = torch.cat([case[name], pad])
    where = case["lanes"], case["lens"], 4, case["cache"], 32
    check(case, plan_attend(*where, shared=on_device(SEVERAL, 3)))


def test_refuses_what_cannot_be_shared() -> None:
    case = make_case(ONE, 4, 32, 16, torch.float32)
    where = case["lanes"], case["lens"], 4, case["cache"], 32
    for options in ({"items": torch.stack([case["lens"]] * 2)}, {"shared": on_device(SEVERAL)}):
        with pytest.raises(ValueError, match="one token of a row"):
            plan_attend(*where, **{"shared": on_device(ONE), **options})


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "eight_bits"), [(16, False), (8, True), (128, True)])
@pytest.mark.parametrize("name", BIG)
@pytest.mark.usefixtures("poisoned_empty")
def test_at_full_size(name: str, heads: int, eight_bits: bool) -> None:
    """In a graph, whose replay finds other queries and then no groups at all."""
    rows = BIG[name]
    case = make_case(rows, heads, 512, 64, torch.bfloat16)
    if eight_bits:
        case = in_eight_bits(case)
    given = {n: case[n] for n in ("q", "turned", "cache", "table", "scales") if n in case}
    fresh = randn(*case["q"].shape, dtype=torch.bfloat16, seed=5)
    out, shared = torch.empty_like(fresh), on_device(rows)
    nobody = on_device(replace(rows, order=[], groups=[]))
    where = case["lanes"], case["lens"], heads, case["cache"], 512

    def call() -> None:
        plan = plan_attend(*where, shared=shared)
        for _ in range(2):
            attend(**given, scale=0.05, plan=plan, out=out)

    replayed(call, before=lambda: case["q"].copy_(fresh))
    want = attend_ref(**case, scale=0.05)
    assert_close("out", want, out)

    def leave() -> None:
        for to, values in zip(vars_of(shared), vars_of(nobody), strict=True):
            to.copy_(values)

    replayed(call, before=leave)
    assert_close("out, no groups", want, out)
