"""Decode attention in which rows share their first slots, against a reference that does not care."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.attention.decode import decode_attention, decode_attention_ref
from asyncllm.kernels.attention.decode_plan import DecodeConfig, DecodePlan, plan_decode
from asyncllm.kernels.attention.shared import SharedConfig
from asyncllm.kernels.attention.shared_rows import MAX_GROUPS, SharedRows
from tests.kernels.harness import (
    DEVICE,
    EIGHT_BITS,
    HERE,
    assert_close,
    in_8_bits,
    ints,
    make_cache,
    no_sync,
    randn,
    replayed,
)

Group = tuple[int, int, int, int]  # first token, token behind the last, first member, their number


@dataclass(frozen=True)
class Rows:
    """Lengths of the rows, the members in order, and their groups."""

    lengths: list[int]
    order: list[int]
    groups: list[Group]


ONE = Rows([70, 75, 0, 90], [3, 0, 1], [(0, 64, 0, 3)])
UNEVEN = Rows([41, 99, 38, 7, 40, 55], [5, 2, 0, 4], [(0, 37, 0, 4)])
SEVERAL = Rows(
    [90, 31, 130, 91, 20, 30, 128, 5], [3, 0, 6, 2, 5, 1], [(0, 89, 0, 2), (0, 127, 2, 2), (0, 29, 4, 2)]
)  # fmt: skip
NESTED = Rows(
    [200, 180, 170, 160, 90, 40, 33],
    [0, 1, 2, 3, 4, 5],
    [(0, 32, 0, 6), (32, 80, 0, 5), (80, 159, 0, 2), (80, 150, 2, 2)],
)
ALONE = Rows([50, 60], [1], [(0, 40, 0, 1)])
NOBODY = Rows([50, 60, 3], [], [])
ALL = [ONE, UNEVEN, SEVERAL, NESTED, ALONE, NOBODY]
NAMES = ["one", "uneven", "several", "nested", "alone", "nobody"]


def on_device(rows: Rows, padding: int = 0) -> SharedRows:
    """With ``padding`` rows behind the others."""
    num = len(rows.lengths) + padding
    groups = torch.zeros((4, MAX_GROUPS), dtype=torch.int32)
    places, owns = [-1] * num, [0] * num
    for place, row in enumerate(rows.order):
        places[row] = place
    for i, (begin, stop, first, count) in enumerate(rows.groups):
        groups[:, i] = torch.tensor([begin, stop, first, count])
        for row in rows.order[first : first + count]:
            owns[row] = max(owns[row], stop)
    order = rows.order + [0] * (num - len(rows.order))
    return SharedRows(groups.to(DEVICE), ints(order), ints(places), ints(owns))


def make_case(rows: Rows, q: int, kv: int, dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Members of a group have the slots of its first one; what these replace is NaN."""
    k_cache, v_cache, table, lanes = make_cache(rows.lengths, kv, dim, dtype)
    for begin, stop, first, count in rows.groups:
        some = lanes[rows.order[first : first + count]].long()
        for lane in some[1:]:
            for cache in (k_cache, v_cache):
                cache[table[lane, begin:stop].long()] = float("nan")
            table[lane, begin:stop] = table[some[0], begin:stop]
    packed = randn(len(rows.lengths), (q + 2 * kv) * dim, dtype=dtype)
    return {
        "q": packed[:, : q * dim].unflatten(1, (q, dim)),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "table": table,
        "lanes": lanes,
        "lens": ints(rows.lengths),
    }


SMALL = SharedConfig(16, 16, 4, 2, 1, 1)
TILES = DecodeConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=1)


def plan_for(case: dict[str, Tensor], rows: Rows, **options: object) -> DecodePlan:
    options = {"config": TILES, "shared_config": SMALL, "num_programs": 9, **options}
    num_q, shared = case["q"].shape[1], on_device(rows)
    return plan_decode(
        case["lanes"], case["lens"], num_q, case["k_cache"], shared=shared, **options
    )


@pytest.mark.parametrize("rows", ALL, ids=NAMES)
@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_shared_tokens_are_read_once(rows: Rows, dtype: torch.dtype) -> None:
    case = make_case(rows, 8, 2, 64, dtype)
    plan = plan_for(case, rows)
    with no_sync():
        got = decode_attention(**case, scale=0.125, plan=plan)
    assert_close("out", decode_attention_ref(**case, scale=0.125), got)
    assert not got[case["lens"] == 0].any()
    own = sum(rows.lengths) - sum((end - start) * num for start, end, _, num in rows.groups)
    tiles = plan.meta[0].item()
    assert own / TILES.tile <= tiles < own / TILES.tile + len(rows.lengths)


@pytest.mark.parametrize("bits", [None, *EIGHT_BITS], ids=str)
@pytest.mark.parametrize(
    ("q", "kv", "dim", "softcap"), [(7, 1, 80, None), (4, 4, 32, 0.7), (6, 3, 128, None)], ids=str
)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_format_and_shape(
    bits: tuple[torch.dtype, int | None] | None, q: int, kv: int, dim: int, softcap: float | None
) -> None:
    case = make_case(NESTED, q, kv, dim, HERE[0])
    if bits:
        case = in_8_bits(case, *bits)
    options = {"scale": 0.3, "softcap": softcap}
    shared = on_device(NESTED)
    with no_sync():
        got = decode_attention(**case, **options, shared=shared)
    assert_close("out", decode_attention_ref(**case, **options), got)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("programs", [1, 3, 40])
@pytest.mark.usefixtures("poisoned_empty")
def test_any_division_gives_the_same(block_m: int, programs: int) -> None:
    case = make_case(NESTED, 6, 2, 64, torch.float32)
    config = replace(SMALL, block_m=block_m, programs_per_sm=programs)
    plan = plan_for(case, NESTED, shared_config=config, num_programs=programs)
    for layer in range(2):
        case["q"] = randn(len(NESTED.lengths), 6, 64, dtype=torch.float32, seed=layer)
        got = decode_attention(**case, scale=0.125, plan=plan)
        assert_close("out", decode_attention_ref(**case, scale=0.125), got)


@pytest.mark.usefixtures("poisoned_empty")
def test_padding_rows_behind_the_others() -> None:
    case = make_case(SEVERAL, 4, 2, 64, torch.float32)
    want = decode_attention_ref(**case, scale=0.125)
    for name in ("q", "lanes", "lens"):
        pad = case[name].new_zeros((3, *case[name].shape[1:]))
        case[name] = torch.cat([case[name], pad])
    got = decode_attention(**case, scale=0.125, shared=on_device(SEVERAL, 3))
    assert_close("out", want, got[:-3])
    assert not got[-3:].any()


def test_refuses_what_cannot_be_shared() -> None:
    case = make_case(ONE, 4, 2, 64, torch.float32)
    for options in ({"window": 9}, {"grouped": False}):
        with pytest.raises(ValueError, match="sees all tokens"):
            decode_attention(**case, scale=1.0, shared=on_device(ONE), **options)


def full_size(num: int, shared: int, own: int) -> Rows:
    lengths = [shared + own - i % 7 for i in range(num)]
    return Rows(lengths, list(range(num)), [(0, shared, 0, num)])


BIG = {
    "128 x 1536 + 576": full_size(128, 1536, 576),
    "5 x 4001 + 99": full_size(5, 4001, 99),
    "4 of 64 x 1024": Rows(
        [1200] * 256, list(range(256)), [(0, 1024 - i, 64 * i, 64) for i in range(4)]
    ),
    "nested": Rows(
        [(97 * i) % 300 + 2500 for i in range(70)],
        list(range(69, -1, -1)),
        [(0, 1000, 0, 70), (1000, 2400, 0, 33), (1000, 1999, 40, 20), (2400, 2499, 1, 9)],
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, *EIGHT_BITS], ids=str)
@pytest.mark.parametrize(("q", "kv", "dim"), [(32, 8, 128), (14, 2, 64), (8, 8, 128)], ids=str)
@pytest.mark.parametrize("name", BIG)
@pytest.mark.usefixtures("poisoned_empty")
def test_at_full_size(
    name: str, bits: tuple[torch.dtype, int | None] | None, q: int, kv: int, dim: int
) -> None:
    """In a graph, whose replay finds other queries and then no groups at all."""
    rows = BIG[name]
    case = make_case(rows, q, kv, dim, torch.bfloat16)
    if bits:
        case = in_8_bits(case, *bits)
    fresh = randn(*case["q"].shape, dtype=torch.bfloat16, seed=5)
    out, shared = torch.empty_like(fresh), on_device(rows)
    options = {"scale": dim**-0.5}
    nobody = on_device(replace(rows, order=[], groups=[]))

    def call() -> None:
        decode_attention(**case, **options, shared=shared, out=out)

    replayed(call, before=lambda: case["q"].copy_(fresh))
    want = decode_attention_ref(**case, **options)
    assert_close("out", want, out)

    def leave() -> None:
        for to, values in zip(vars_of(shared), vars_of(nobody), strict=True):
            to.copy_(values)

    replayed(call, before=leave)
    assert_close("out, no groups", want, out)


def vars_of(rows: SharedRows) -> list[Tensor]:
    return [rows.groups, rows.order, rows.places, rows.owns]
