"""Prefill attention against its reference: shapes, prefixes, ragged rows, surplus tokens, graphs."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.attention.prefill import (
    PrefillConfig,
    prefill_attention,
    prefill_attention_ref,
    prefill_config,
)
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

# each combination is a build on the card, and one of its types is enough there
# (prefix, count) of each row, query heads, KV heads, head_dim
SHAPES = [
    ([(0, 1)], 4, 4, 64),
    ([(0, 67), (40, 3)], 9, 3, 64),
    ([(130, 31)], 8, 2, 80),
    ([(5, 0), (1, 2), (0, 63), (3, 0)], 7, 1, 96),
    ([(64, 65), (0, 1)], 8, 2, 128),
    ([(0, 129)], 8, 1, 128),
    ([(33, 5)], 7, 1, 256),
    ([(20, 35), (0, 1)], 6, 2, 8),
]


def make_case(
    rows: list[tuple[int, int]], q: int, kv: int, dim: int, dtype: torch.dtype, surplus: int = 0
) -> dict[str, Tensor]:
    lengths = [prefix + count for prefix, count in rows]
    k_cache, v_cache, table, lanes = make_cache(lengths, kv, dim, dtype)
    cu = [0]
    for _, count in rows:
        cu.append(cu[-1] + count)
    packed = randn(cu[-1] + surplus, (q + 2 * kv) * dim, dtype=dtype)
    return {
        "q": packed[:, : q * dim].unflatten(1, (q, dim)),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "table": table,
        "lanes": lanes,
        "starts": ints([prefix for prefix, _ in rows]),
        "cu_counts": ints(cu),
    }


def packed(case: dict[str, Tensor]) -> Tensor:
    """The qkv that the case's q is a view of, as ``rope_kv`` leaves it: with the rows' new K and V,
    and NaN where a token belongs to no row. q moves there."""
    q, (kv, dim) = case["q"], case["k_cache"].shape[1:]
    qkv = q.new_full((q.shape[0], (q.shape[1] + 2 * kv) * dim), float("nan"))
    heads = qkv.unflatten(1, (-1, dim))
    heads[:, : q.shape[1]] = q
    case["q"] = heads[:, : q.shape[1]]
    for row, lane in enumerate(case["lanes"].tolist()):
        begin, stop = case["cu_counts"][row : row + 2].tolist()
        start = int(case["starts"][row])
        slots = case["table"][lane, start : start + stop - begin].long()
        heads[begin:stop, q.shape[1] : -kv] = case["k_cache"][slots]
        heads[begin:stop, -kv:] = case["v_cache"][slots]
    return qkv


def shifted(case: dict[str, Tensor], before: int, after: int) -> dict[str, Tensor]:
    """The case with foreign tokens (NaN) around its rows, and an empty row at either end."""
    q = case["q"]
    wide = q.new_full((before + len(q) + after, *q.shape[1:]), float("nan"))
    wide[before : before + len(q)] = q
    cu = case["cu_counts"] + before
    lanes = case["lanes"]
    return {
        **case,
        "q": wide,
        "lanes": torch.cat((lanes[:1], lanes, lanes[:1])),
        "starts": torch.cat((ints([9]), case["starts"], ints([0]))),
        "cu_counts": torch.cat((cu[:1], cu, cu[-1:])),
    }


def longest(rows: list[tuple[int, int]]) -> int:
    return max(count for _, count in rows)


@pytest.mark.parametrize(("rows", "q", "kv", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_prefill_attention(
    rows: list[tuple[int, int]], q: int, kv: int, dim: int, dtype: torch.dtype
) -> None:
    case = make_case(rows, q, kv, dim, dtype)
    with no_sync():
        got = prefill_attention(**case, max_count=longest(rows), scale=dim**-0.5)
    assert_close("out", prefill_attention_ref(**case, scale=dim**-0.5), got)


@pytest.mark.parametrize(
    ("blocks", "pack"), [((64, 16), True), ((64, 32), False), ((128, 128), True)], ids=str
)
@pytest.mark.parametrize(
    ("rows", "q", "kv", "dim"), SHAPES[2:5:2] if DEVICE == "cuda" else SHAPES, ids=str
)
@pytest.mark.parametrize("dtype", HERE, ids=str)
def test_the_chunk_from_packed_qkv(
    rows: list[tuple[int, int]],
    q: int,
    kv: int,
    dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    pack: bool,
) -> None:
    case = shifted(make_case(rows, q, kv, dim, dtype), 3, 2)
    qkv = packed(case)
    config = PrefillConfig(*blocks, num_warps=4, num_stages=2, gather_stages=2, pack=pack)
    out = torch.full_like(case["q"], 7.0)
    with no_sync():
        prefill_attention(**case, max_count=64, scale=dim**-0.5, out=out, kv=qkv, config=config)
    own = slice(3, len(out) - 2)
    assert_close("out", prefill_attention_ref(**case, scale=dim**-0.5)[own], out[own])
    assert bool((out[:3] == 7.0).all())
    assert bool((out[-2:] == 7.0).all())


@pytest.mark.parametrize("max_count", [1, 8, 1000])
@pytest.mark.usefixtures("poisoned_empty")
def test_max_count_and_surplus_tokens_change_nothing(max_count: int) -> None:
    case = make_case([(7, 30), (0, 2), (50, 0), (3, 21)], 6, 2, 64, torch.float16, surplus=75)
    got = prefill_attention(**case, max_count=max_count, scale=0.125)
    want = prefill_attention_ref(**case, scale=0.125)
    assert_close("out", want, got)
    assert not got[53:].any()
    alone = {**case, "q": case["q"][:53]}
    assert torch.equal(got[:53], prefill_attention(**alone, max_count=max_count, scale=0.125))


@pytest.mark.parametrize(("before", "after"), [(1, 0), (37, 5), (64, 130)])
def test_rows_start_anywhere_and_other_tokens_stay_as_they_are(before: int, after: int) -> None:
    case = make_case([(7, 30), (0, 2), (50, 21)], 6, 2, 64, torch.float16)
    want = prefill_attention_ref(**case, scale=0.125)
    wide = shifted(case, before, after)
    out = torch.full_like(wide["q"], 7.0)
    with no_sync():
        prefill_attention(**wide, max_count=len(out), scale=0.125, out=out)
    assert_close("out", want, out[before : before + 53])
    assert bool((out[:before] == 7.0).all())
    assert bool((out[before + 53 :] == 7.0).all())


def test_only_padding_rows_write_nothing() -> None:
    case = make_case([(0, 0), (4, 0)], 4, 2, 64, torch.float16, surplus=20)
    case["cu_counts"] += 11
    out = torch.full_like(case["q"], 7.0)
    prefill_attention(**case, max_count=20, scale=0.125, out=out)
    assert bool((out == 7.0).all())


@pytest.mark.parametrize("blocks", [(16, 16), (16, 64), (64, 16), (32, 32)], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_tile_shape_meets_the_diagonal(blocks: tuple[int, int]) -> None:
    rows = [(15, 17), (16, 16), (0, 33), (31, 1), (1, 47)]
    case = make_case(rows, 3, 1, 64, torch.float32)
    config = PrefillConfig(*blocks, num_warps=4, num_stages=2, gather_stages=2)
    got = prefill_attention(**case, max_count=47, scale=0.125, config=config)
    assert_close("out", prefill_attention_ref(**case, scale=0.125), got)


def hide_what_is_before(case: dict[str, Tensor], window: int) -> None:
    """The table points far outside for what no new token sees."""
    for lane, start in zip(case["lanes"].tolist(), case["starts"].tolist(), strict=True):
        case["table"][lane, : max(0, start + 1 - window)] = 0x3F3F3F3F


@pytest.mark.parametrize(
    ("window", "softcap", "blocks", "whole"),
    [
        (1, None, (16, 16), True),
        (5, 0.7, (32, 16), True),
        (16, None, (16, 32), True),
        (300, None, (16, 16), True),
        (None, 0.7, (16, 32), True),
        (1, None, (64, 32), False),
        (40, 0.7, (64, 16), False),
        (40, None, (64, 16), False),
        (None, 0.7, (64, 32), False),
    ],
    ids=str,
)
def test_windows_and_caps(
    window: int | None, softcap: float | None, blocks: tuple[int, int], whole: bool
) -> None:
    case = make_case([(15, 17), (0, 70), (70, 1), (75, 30)], 3, 1, 64, HERE[0])
    if window is not None:
        hide_what_is_before(case, window)
    kv = None if whole else packed(case)
    config = PrefillConfig(*blocks, num_warps=4, num_stages=2, gather_stages=2)
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    got = prefill_attention(**case, **options, max_count=70, config=config, kv=kv)
    assert_close("out", prefill_attention_ref(**case, **options), got)


@pytest.mark.parametrize("bits", EIGHT_BITS, ids=str)
@pytest.mark.parametrize(
    ("rows", "q", "kv", "dim", "limits", "blocks"),
    [
        ([(40, 17), (0, 33), (70, 1)], 6, 2, 64, (None, None), (64, 32)),
        ([(130, 40), (15, 0), (3, 30)], 3, 1, 80, (50, None), (64, 16)),
        ([(100, 3), (2, 2)], 8, 2, 128, (None, 0.7), (16, 32)),
    ],
)
def test_a_prefix_in_8_bits(
    rows: list[tuple[int, int]],
    q: int,
    kv: int,
    dim: int,
    limits: tuple[int | None, float | None],
    blocks: tuple[int, int],
    bits: tuple[torch.dtype, int | None],
) -> None:
    """New tokens attend to themselves as they are: the cache has them, and something else in it."""
    case = shifted(make_case(rows, q, kv, dim, HERE[0]), 3, 2)
    qkv = packed(case)
    case = in_8_bits(case, *bits)
    options = {"scale": 0.3, "window": limits[0], "softcap": limits[1]}
    config = PrefillConfig(*blocks, num_warps=4, num_stages=2, gather_stages=2)
    out = torch.full_like(case["q"], 7.0)
    with no_sync():
        prefill_attention(**case, **options, max_count=40, kv=qkv, config=config, out=out)
    own = slice(3, len(out) - 2)
    want = prefill_attention_ref(**case, **options, kv=qkv)
    assert_close("out", want[own], out[own])
    coarse = prefill_attention_ref(**case, **options)
    assert float((coarse[own] - want[own]).abs().max()) > 1e-3


def test_a_token_does_not_see_the_ones_after_it() -> None:
    case = make_case([(3, 20)], 2, 1, 64, torch.float32)
    before = prefill_attention(**case, max_count=20, scale=0.125)
    late = case["table"][case["lanes"][0].long(), 13:23].long()
    case["k_cache"][late] += 1.0
    case["v_cache"][late] += 1.0
    after = prefill_attention(**case, max_count=20, scale=0.125)
    assert torch.equal(before[:10], after[:10])
    assert not torch.isclose(before[10:], after[10:]).all(-1).any()


def test_more_rows_than_are_scanned_at_once() -> None:
    rows = [((3 * i) % 7, (5 * i) % 4) for i in range(130)]
    case = make_case(rows, 1, 1, 64, torch.float16, surplus=5)
    got = prefill_attention(**case, max_count=3, scale=0.125)
    assert_close("out", prefill_attention_ref(**case, scale=0.125), got)


def test_into_a_given_output() -> None:
    case = make_case([(5, 9)], 4, 2, 64, torch.float32)
    wide = torch.full((9, 5, 64), 7.0, device=DEVICE)
    got = prefill_attention(**case, max_count=9, scale=0.125, out=wide[:, :4])
    assert got.data_ptr() == wide.data_ptr()
    assert_close("out", prefill_attention_ref(**case, scale=0.125), got)
    assert bool((wide[:, 4] == 7.0).all())


def test_no_tokens() -> None:
    case = make_case([(5, 0)], 4, 2, 64, torch.float32)
    assert prefill_attention(**case, max_count=0, scale=1.0).shape == (0, 4, 64)


def test_refuses_what_does_not_fit() -> None:
    case = make_case([(0, 5)], 4, 2, 64, torch.float32)
    with pytest.raises(ValueError, match="divide"):
        prefill_attention(**{**case, "q": case["q"][:, :3]}, max_count=5, scale=1.0)
    with pytest.raises(ValueError, match="dtypes"):
        prefill_attention(**{**case, "q": case["q"].half()}, max_count=5, scale=1.0)
    with pytest.raises(ValueError, match="cu_counts"):
        prefill_attention(**{**case, "cu_counts": case["cu_counts"][1:]}, max_count=5, scale=1.0)
    with pytest.raises(ValueError, match="256"):
        prefill_config(torch.empty((1, 1, 512), device=DEVICE), 4, 64, 2)
    with pytest.raises(ValueError, match="need kv"):
        prefill_attention(**in_8_bits(case, torch.int8, None), max_count=5, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "q", "kv", "dim"),
    [
        ([(0, 2048), (0, 1), (777, 130)], 32, 8, 128),
        ([(4096, 512), (1, 513)], 28, 4, 128),
        ([(0, 700)], 9, 3, 64),
        ([(100, 700)], 16, 16, 96),
        ([(100, 700)], 16, 2, 256),
        ([(1000 + i, 3) for i in range(40)], 32, 8, 128),
        ([(1000 + i, 9) for i in range(40)], 32, 8, 128),
    ],
    ids=["2048", "prefix", "group 3", "dim 96", "dim 256", "few each", "some each"],
)
@pytest.mark.parametrize("limits", [(None, None), (512, None), (1000, 5.0)], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_at_full_size(
    rows: list[tuple[int, int]],
    q: int,
    kv: int,
    dim: int,
    dtype: torch.dtype,
    limits: tuple[int | None, float | None],
) -> None:
    case = make_case(rows, q, kv, dim, dtype, surplus=100)
    window, softcap = limits
    if window is not None:
        hide_what_is_before(case, window)
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    want = prefill_attention_ref(**case, **options)
    for kv_packed in (None, packed(case)):
        got = prefill_attention(**case, **options, max_count=longest(rows), kv=kv_packed)
        own = slice(0, len(got) - 100)
        assert_close("out", want[own], got[own])


@pytest.mark.gpu
@pytest.mark.parametrize("bits", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("limits", [(None, None), (512, 5.0)], ids=str)
@pytest.mark.parametrize(
    ("rows", "q", "kv", "dim"),
    [
        ([(4096, 512), (1, 513), (777, 1)], 32, 8, 128),
        ([(100, 700)], 28, 4, 128),
        ([(1000, 700)], 16, 16, 96),
        ([(1000, 700)], 16, 2, 256),
        ([(1000 + i, 3) for i in range(40)], 32, 8, 128),
    ],
    ids=["prefix", "group 7", "dim 96", "dim 256", "few each"],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_a_prefix_in_8_bits_at_full_size(
    rows: list[tuple[int, int]],
    q: int,
    kv: int,
    dim: int,
    limits: tuple[int | None, float | None],
    bits: tuple[torch.dtype, int | None],
) -> None:
    case = make_case(rows, q, kv, dim, torch.bfloat16)
    qkv = packed(case)
    case = in_8_bits(case, *bits)
    options = {"scale": dim**-0.5, "window": limits[0], "softcap": limits[1], "kv": qkv}
    with no_sync():
        got = prefill_attention(**case, **options, max_count=longest(rows))
    assert_close("out", prefill_attention_ref(**case, **options), got)


@pytest.mark.gpu
def test_a_captured_call_follows_rows_at_replay() -> None:
    case = make_case([(500, 60), (0, 100)], 32, 8, 128, torch.bfloat16)
    qkv = packed(case)
    out = torch.empty_like(case["q"])
    cu, starts = ints([0, 16, 116]), ints([500, 0])
    new = {**case, "cu_counts": cu, "starts": starts}

    def call() -> None:
        prefill_attention(**new, max_count=100, scale=0.1, out=out, kv=qkv)

    def before() -> None:
        cu.copy_(case["cu_counts"])
        out.fill_(float("nan"))

    replayed(call, before=before)
    assert_close("out", prefill_attention_ref(**case, scale=0.1), out)
