"""Decode attention against its reference: shapes, division of the work, padding, graphs."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.attention.decode import decode_attention, decode_attention_ref
from asyncllm.kernels.attention.decode_plan import (
    DecodeConfig,
    DecodePlan,
    decode_config,
    plan_decode,
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
# lengths, query heads, KV heads, head_dim
SHAPES = [
    ([1], 4, 4, 64),
    ([67, 0, 129], 9, 3, 64),
    ([31, 257], 8, 2, 80),
    ([1, 2, 63], 7, 1, 96),
    ([64, 65, 0, 0, 7], 8, 2, 128),
    ([300], 8, 1, 128),
    ([33, 5], 14, 2, 256),
    ([70, 3], 6, 2, 8),
]


def make_case(
    lengths: list[int], q: int, kv: int, dim: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    k_cache, v_cache, table, lanes = make_cache(lengths, kv, dim, dtype)
    packed = randn(len(lengths), (q + 2 * kv) * dim, dtype=dtype)
    return {
        "q": packed[:, : q * dim].unflatten(1, (q, dim)),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "table": table,
        "lanes": lanes,
        "lens": ints(lengths),
    }


def plan_for(case: dict[str, Tensor], **options: object) -> DecodePlan:
    return plan_decode(case["lanes"], case["lens"], case["q"].shape[1], case["k_cache"], **options)


@pytest.mark.parametrize(("lengths", "q", "kv", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_decode_attention(
    lengths: list[int], q: int, kv: int, dim: int, dtype: torch.dtype
) -> None:
    case = make_case(lengths, q, kv, dim, dtype)
    with no_sync():
        got = decode_attention(**case, scale=dim**-0.5)
    assert_close("out", decode_attention_ref(**case, scale=dim**-0.5), got)
    assert not got[case["lens"] == 0].any()


@pytest.mark.parametrize("num_programs", [1, 2, 3, 7, 40])
@pytest.mark.usefixtures("poisoned_empty")
def test_any_division_of_the_work_gives_the_same(num_programs: int) -> None:
    lengths = [5, 0, 400, 16, 17, 0, 90, 1]
    case = make_case(lengths, 6, 2, 64, torch.float32)
    config = DecodeConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=1)
    plan = plan_for(case, config=config, num_programs=num_programs)
    got = decode_attention(**case, scale=0.125, plan=plan)
    assert_close("out", decode_attention_ref(**case, scale=0.125), got)


def hide_what_is_before(case: dict[str, Tensor], window: int) -> None:
    """The table points far outside for what no row sees."""
    for lane, length in zip(case["lanes"].tolist(), case["lens"].tolist(), strict=True):
        case["table"][lane, : max(0, length - window)] = 0x3F3F3F3F


@pytest.mark.parametrize(
    ("window", "softcap"), [(None, 0.7), (1, None), (16, 0.7), (21, None), (600, None)], ids=str
)
@pytest.mark.usefixtures("poisoned_empty")
def test_windows_and_caps(window: int | None, softcap: float | None) -> None:
    case = make_case([5, 0, 130, 16, 17, 90, 1], 6, 2, 64, HERE[0])
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    if window is not None:
        hide_what_is_before(case, window)
    config = DecodeConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=1)
    plan = plan_for(case, window=window, config=config, num_programs=5)
    with no_sync():
        got = decode_attention(**case, **options, plan=plan)
    assert_close("out", decode_attention_ref(**case, **options), got)


# those with names: grouped, split
WAYS = [(False, False), (False, True), (True, False), (True, True)]


CASES = [
    ([67, 0, 129], 6, 3, 64, (None, None)),
    ([31, 70], 4, 4, 80, (40, None)),
    ([1, 0, 33, 150], 8, 1, 128, (None, 0.7)),
    ([9, 40], 4, 2, 16, (None, None)),
]


@pytest.mark.parametrize(
    ("way", "bits", "shape"),
    [
        (way, bits, CASES[(i + j) % 4])
        for i, way in enumerate(WAYS)
        for j, bits in enumerate([None, *EIGHT_BITS])
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_way_reads_every_format(
    way: tuple[bool, bool],
    bits: tuple[torch.dtype, int | None] | None,
    shape: tuple[list[int], int, int, int, tuple[int | None, float | None]],
) -> None:
    (grouped, split), (lengths, q, kv, dim, limits) = way, shape
    case = make_case(lengths, q, kv, dim, HERE[0])
    if bits:
        case = in_8_bits(case, *bits)
    options = {"scale": 0.3, "window": limits[0], "softcap": limits[1]}
    with no_sync():
        got = decode_attention(**case, **options, grouped=grouped, split=split)
    assert_close("out", decode_attention_ref(**case, **options), got)
    assert not got[case["lens"] == 0].any()


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shift", [-1, 0, 1])
@pytest.mark.parametrize("dtype", HERE, ids=str)
def test_numbers_in_8_bits_may_have_any_size(
    kind: torch.dtype, shift: int, dtype: torch.dtype
) -> None:
    """What is read most has values a millionth of the others; queries and keys balance one another
    where one float16 would not hold both."""
    case = make_case([1, 70, 33], 4, 2, 64, dtype)
    mean = case["q"].unflatten(1, (2, 2)).mean(2)
    case["q"] = case["q"] * 0.1 + mean.repeat_interleave(2, 1)
    for row, (lane, length) in enumerate(
        zip(case["lanes"].tolist(), case["lens"].tolist(), strict=True)
    ):
        slots = case["table"][lane, :length].long()
        case["k_cache"][slots[::2]] += 4 * mean[row]
        case["k_cache"][slots[1::2]] -= 4 * mean[row]
        case["v_cache"][slots[::2]] *= 1e-3
        case["v_cache"][slots[1::2]] *= 1e3
    factor = (1e20 if dtype == torch.bfloat16 else 300.0) ** shift
    case["q"], case["k_cache"] = case["q"] * factor, case["k_cache"] / factor
    case = in_8_bits(case, kind, None)
    assert_close(
        "out", decode_attention_ref(**case, scale=0.125), decode_attention(**case, scale=0.125)
    )


@pytest.mark.parametrize("size", [0.0, 1e-15, 1e20])
def test_values_that_are_zero_have_their_weight_beside_any(size: float) -> None:
    case = make_case([40, 3], 2, 1, 16, torch.float32)
    case["v_cache"] *= size
    case["v_cache"][case["table"][case["lanes"][0].long(), 3:20].long()] = 0.0
    case = in_8_bits(case, torch.float8_e4m3fn, None)
    want, got = (
        attend(**case, scale=0.25) / (size or 1.0)
        for attend in (decode_attention_ref, decode_attention)
    )
    assert_close("out", want, got)


def test_a_window_costs_a_window() -> None:
    case = make_case([5, 0, 400, 16, 90], 4, 2, 64, torch.float32)
    config = DecodeConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=1)
    plan = plan_for(case, window=20, config=config, num_programs=9)
    tiles = [1, 0, 2, 1, 2]  # those of tokens 380 to 399, and 70 to 89
    assert plan.meta.tolist() == [sum(tiles), 2]
    assert plan.first[1, :3].tolist() == [0, 2, 4]
    assert plan.first[5, :3].tolist() == [0, 1, 4]


@pytest.mark.usefixtures("poisoned_empty")
def test_more_partial_results_than_are_merged_at_once() -> None:
    case = make_case([1300, 3], 3, 1, 64, torch.float32)
    config = DecodeConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=1)
    plan = plan_for(case, config=config, num_programs=41)
    got = decode_attention(**case, scale=0.125, plan=plan)
    assert_close("out", decode_attention_ref(**case, scale=0.125), got)


def test_work_is_divided_equally_and_completely() -> None:
    case = make_case([5, 0, 400, 16, 90], 4, 2, 64, torch.float32)
    config = DecodeConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=1)
    plan = plan_for(case, config=config, num_programs=9)
    total, share = plan.meta.tolist()
    tiles = [1, 0, 25, 1, 6]
    assert total == sum(tiles)
    assert (plan.num_ranges, share) == (4, 9)
    assert plan.records[:, :4].tolist() == [
        [0, 2, 3, 4],
        case["lanes"][[0, 2, 3, 4]].tolist(),
        [5, 400, 16, 90],
        [0, 0, 0, 0],
    ]
    assert plan.first[0].tolist() == [0, 1, 1, 3]
    assert plan.first[1:, 3].tolist() == [4, int(case["lanes"][4]), 90, 0, 27]
    assert not plan.counters.any()


def test_more_rows_than_the_plan_scans_at_once() -> None:
    lengths = [(7 * i) % 5 for i in range(300)]
    cache = torch.empty((1, 1, 64), device=DEVICE)
    config = DecodeConfig(tile=2, num_warps=4, num_stages=2, programs_per_sm=1)
    plan = plan_decode(ints(lengths), ints(lengths), 1, cache, config=config, num_programs=300)
    tiles = [-(-length // 2) for length in lengths]
    assert plan.meta.tolist() == [sum(tiles), 2]
    full = [i for i in range(300) if lengths[i]]
    assert plan.records[0, : len(full)].tolist() == full
    ranges = -(-sum(tiles) // 2)
    starts = [next(i for i in full if sum(tiles[: i + 1]) > 2 * n) for n in range(ranges)]
    assert plan.first[1, :ranges].tolist() == starts
    assert plan.first[5, :ranges].tolist() == [sum(tiles[:i]) for i in starts]


def test_one_plan_serves_many_layers_and_a_given_output() -> None:
    case = make_case([130, 9], 4, 2, 64, torch.float32)
    plan = plan_for(case)
    wide = torch.full((2, 5, 64), 7.0, device=DEVICE)
    for layer in range(2):
        case["q"] = randn(2, 4, 64, dtype=torch.float32, seed=layer)
        got = decode_attention(**case, scale=0.125, plan=plan, out=wide[:, :4])
        assert got.data_ptr() == wide.data_ptr()
        assert not plan.counters.any()
        assert_close("out", decode_attention_ref(**case, scale=0.125), got)
    assert bool((wide[:, 4] == 7.0).all())


def test_large_scores_do_not_overflow() -> None:
    case = make_case([70], 4, 2, 64, torch.float32)
    case["q"] *= 1e3
    got = decode_attention(**case, scale=1.0)
    assert_close("out", decode_attention_ref(**case, scale=1.0), got, ratio=1e-3)


def test_all_rows_empty_and_no_rows() -> None:
    case = make_case([0, 0], 4, 2, 64, torch.float32)
    assert not decode_attention(**case, scale=1.0).any()
    for name in ("q", "lanes", "lens"):
        case[name] = case[name][:0]
    assert decode_attention(**case, scale=1.0).shape == (0, 4, 64)


def test_refuses_what_does_not_fit() -> None:
    case = make_case([5, 9], 4, 2, 64, torch.float32)
    with pytest.raises(ValueError, match="divide"):
        decode_attention(**{**case, "q": case["q"][:, :3]}, scale=1.0)
    with pytest.raises(ValueError, match="dtypes"):
        decode_attention(**{**case, "q": case["q"].half()}, scale=1.0)
    with pytest.raises(ValueError, match="int32"):
        decode_attention(**{**case, "lens": case["lens"].long()}, scale=1.0)
    with pytest.raises(ValueError, match="plan"):
        decode_attention(**{**case, "q": case["q"][:1]}, scale=1.0, plan=plan_for(case))
    with pytest.raises(ValueError, match="window of 3, not None"):
        decode_attention(**case, scale=1.0, plan=plan_for(case, window=3))
    with pytest.raises(ValueError, match="256"):
        decode_config(torch.empty((1, 8, 512), device=DEVICE), 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "q", "kv", "dim"),
    [
        ([1200] * 64, 32, 8, 128),
        ([(97 * i) % 300 for i in range(255)] + [16384], 32, 8, 128),
        ([8191], 28, 4, 128),
        ([4097, 1, 0, 700], 32, 4, 64),
        ([4097, 1, 0, 700], 16, 2, 256),
    ],
    ids=["64x1200", "255 short, one long", "1x8191", "dim 64", "dim 256"],
)
@pytest.mark.parametrize("limits", [(None, None), (512, None), (1000, 5.0)], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_at_full_size(
    lengths: list[int],
    q: int,
    kv: int,
    dim: int,
    dtype: torch.dtype,
    limits: tuple[int | None, float | None],
) -> None:
    case = make_case(lengths, q, kv, dim, dtype)
    window, softcap = limits
    if window is not None:
        hide_what_is_before(case, window)
    options = {"scale": dim**-0.5, "window": window, "softcap": softcap}
    got = decode_attention(**case, **options)
    assert_close("out", decode_attention_ref(**case, **options), got)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("bits", [None, *EIGHT_BITS], ids=str)
@pytest.mark.parametrize(
    ("lengths", "q", "kv", "dim"),
    [
        ([(97 * i) % 300 for i in range(255)] + [16384], 32, 8, 128),
        ([8191, 0, 65], 28, 4, 128),
        ([4097, 1, 0, 700], 16, 16, 96),
        ([4097, 1, 0, 700], 16, 2, 256),
    ],
    ids=["many", "group 7", "dim 96", "dim 256"],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_way_at_full_size(
    lengths: list[int],
    q: int,
    kv: int,
    dim: int,
    bits: tuple[torch.dtype, int | None] | None,
    way: tuple[bool, bool],
) -> None:
    """In a graph, whose replay finds other queries."""
    case = make_case(lengths, q, kv, dim, torch.bfloat16)
    if bits:
        case = in_8_bits(case, *bits)
    fresh = randn(*case["q"].shape, dtype=torch.bfloat16, seed=5)
    out = torch.empty_like(fresh)
    grouped, split = way
    options = {"scale": dim**-0.5, "grouped": grouped, "split": split}
    replayed(
        lambda: decode_attention(**case, **options, out=out),
        before=lambda: case["q"].copy_(fresh),
    )
    assert_close("out", decode_attention_ref(**case, scale=dim**-0.5), out)


@pytest.mark.gpu
def test_a_captured_plan_follows_the_lengths_at_replay() -> None:
    case = make_case([700, 300, 65, 1], 32, 8, 128, torch.bfloat16)
    out = torch.empty_like(case["q"])
    lens = case["lens"].clone()

    def call() -> None:
        plan = plan_for({**case, "lens": lens})
        decode_attention(**{**case, "lens": lens}, scale=0.1, plan=plan, out=out)

    for new in ([1, 300, 0, 1], [700, 299, 64, 1]):
        replayed(call, before=lambda new=new: lens.copy_(ints(new)))
        want = decode_attention_ref(**{**case, "lens": ints(new)}, scale=0.1)
        assert_close("out", want, out)
        lens.copy_(case["lens"])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_last_program_merges_what_all_have_stored(rows: int) -> None:
    """Many layers with one plan, in one graph: a merge that ran too early would differ."""
    case = make_case([1200 + 7 * row for row in range(rows)], 32, 8, 128, torch.bfloat16)
    outs = torch.empty((40, *case["q"].shape), dtype=torch.bfloat16, device=DEVICE)

    def call() -> None:
        plan = plan_for(case)
        for out in outs:
            decode_attention(**case, scale=0.1, plan=plan, out=out)

    replayed(call, before=lambda: outs.fill_(float("nan")))
    assert_close("out", decode_attention_ref(**case, scale=0.1), outs[0])
    assert bool((outs == outs[0]).all())
