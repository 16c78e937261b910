"""Attention over latents against its reference: shapes, division, chunks, padding, graphs."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.latent.attend import attend, attend_ref
from asyncllm.kernels.latent.keys import AttendConfig
from asyncllm.kernels.latent.plan import (
    EXPAND_TILE,
    item_tokens,
    plan_attend,
    plan_chunks,
)
from tests.kernels.harness import DEVICE, assert_close, ints, no_sync, replayed
from tests.kernels.latents import in_eight_bits, make_chunks, make_latents, make_queries

# each combination is a build on the card, and one of its types is enough there
HERE = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]
SMALL = AttendConfig(tile=16, num_warps=4, num_stages=2, programs_per_sm=1)
# lengths, heads, rank, rope_dim
SHAPES = [
    ([1], 4, 64, 16),
    ([67, 0, 129], 16, 32, 16),
    ([31, 257], 5, 40, 24),
    ([33, 5], 20, 64, 32),
    ([40, 0, 3], 70, 32, 16),
    ([70, 17], 16, 512, 64),
]


def make_case(
    lengths: list[int], heads: int, rank: int, rope: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    q, turned = make_queries(len(lengths), heads, rank, rope, dtype)
    latents = make_latents(lengths, rank + rope, dtype)
    return {"q": q, "turned": turned, **latents, "lens": ints(lengths)}


def run(case: dict[str, Tensor], scale: float = 0.1, **options: object) -> Tensor:
    """NaN where nothing is written."""
    q = case["q"]
    items = case.get("items")
    plan = plan_attend(
        case["lanes"], case["lens"], q.shape[1], case["cache"], q.shape[2], items=items, **options
    )
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    return attend(**_given(case), scale=scale, plan=plan, out=out)


def _given(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: case[n] for n in ("q", "turned", "cache", "table", "scales") if n in case}


@pytest.mark.parametrize(("lengths", "heads", "rank", "rope"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_one_token_a_row(
    lengths: list[int], heads: int, rank: int, rope: int, dtype: torch.dtype
) -> None:
    case = make_case(lengths, heads, rank, rope, dtype)
    with no_sync():
        got = run(case)
    there = case["lens"] > 0
    assert_close("out", attend_ref(**case, scale=0.1)[there], got[there])
    assert bool(got[~there].isnan().all())


@pytest.mark.parametrize("heads", [6, pytest.param(128, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rank", [40, 512])
@pytest.mark.usefixtures("poisoned_empty")
def test_eight_bits(heads: int, rank: int) -> None:
    case = in_eight_bits(make_case([67, 33], heads, rank, 64, HERE[0]))
    assert_close("out", attend_ref(**case, scale=0.1), run(case))
    rows = [(37, 3), (0, 9)]
    chunks = in_eight_bits(chunk_case(rows, heads, rank, 64, HERE[0], first=1))
    got, want, state = run_chunks(chunks, least=1, capacity=0)
    assert_close("out", want[state > 0], got[state > 0])


@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_latents_in_eight_bits_may_have_any_size(dtype: torch.dtype, shift: int) -> None:
    """What is read most is a thousandth of the others; queries and latents balance one another
    where one float16 would not hold both."""
    case = make_case([1, 70, 33], 3, 64, 16, dtype)
    mean = torch.cat([case["q"], case["turned"]], 2).mean(1)
    case["q"], case["turned"] = (
        0.1 * case[name] + mean[:, None, part]
        for name, part in (("q", slice(64)), ("turned", slice(64, None)))
    )
    for row, (lane, length) in enumerate(
        zip(case["lanes"].tolist(), case["lens"].tolist(), strict=True)
    ):
        slots = case["table"][lane, :length].long()
        case["cache"][slots[::2]] *= 1e-2
        case["cache"][slots[1::2]] = case["cache"][slots[1::2]] - 40 * mean[row]
    factor = (1e20 if dtype == torch.bfloat16 else 300.0) ** shift
    case["q"], case["turned"], case["cache"] = (
        case["q"] * factor, case["turned"] * factor, case["cache"] / factor,
    )  # fmt: skip
    case = in_eight_bits(case)
    assert_close("out", attend_ref(**case, scale=0.1), run(case))


@pytest.mark.parametrize(("heads", "num_ranges"), [(6, 1), (6, 3), (6, 12), (70, 3)])
@pytest.mark.usefixtures("poisoned_empty")
def test_any_division_of_the_work_gives_the_same(heads: int, num_ranges: int) -> None:
    case = make_case([5, 120, 16, 17, 1], heads, 32, 16, torch.float32)
    got = run(case, config=SMALL, num_ranges=num_ranges)
    assert_close("out", attend_ref(**case, scale=0.1), got)


@pytest.mark.usefixtures("poisoned_empty")
def test_more_partial_results_than_are_merged_at_once() -> None:
    case = make_case([1300, 3], 3, 32, 16, torch.float32)
    got = run(case, config=SMALL, num_ranges=41)
    assert_close("out", attend_ref(**case, scale=0.1), got)


def test_work_is_divided_equally_and_completely() -> None:
    case = make_case([5, 0, 400, 16, 90], 4, 32, 16, torch.float32)
    plan = plan_attend(
        case["lanes"], case["lens"], 4, case["cache"], 32, config=SMALL, num_ranges=5
    )
    assert plan.meta.tolist() == [33, 7]
    assert plan.records[:, :4].tolist() == [
        [0, 2, 3, 4],
        case["lanes"][[0, 2, 3, 4]].tolist(),
        [5, 400, 16, 90],
        [0, 1, 26, 27],
        [0] * 4,
    ]
    assert plan.first.tolist() == [0, 1, 1, 1, 3]
    assert plan.begins.tolist() == [0, 1, 1, 26, 27]


def chunk_case(
    rows: list[tuple[int, int]], heads: int, rank: int, rope: int, dtype: torch.dtype,
    first: int = 0, behind: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Rows of (start, new tokens) behind ``first`` tokens of others, ``behind`` ones of nobody."""
    latents = make_latents([start + count for start, count in rows], rank + rope, dtype)
    num_tokens = first + sum(count for _, count in rows) + behind
    q, turned = make_queries(num_tokens, heads, rank, rope, dtype)
    return {"q": q, "turned": turned, **latents, **make_chunks(rows, first)}


def run_chunks(
    case: dict[str, Tensor], *, least: int, capacity: int = 1 << 20
) -> tuple[Tensor, Tensor, Tensor]:
    """What is attended to absorbed, what the reference says of it, and the tokens' states."""
    q = case["q"]
    given = {name: case[name] for name in ("lanes", "starts", "cu_counts", "cache")}
    plan = plan_chunks(
        **given, num_tokens=q.shape[0], num_heads=q.shape[1], rank=q.shape[2],
        capacity=capacity, least=least,
    )  # fmt: skip
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=DEVICE)
    given = _given(case)
    attend(**given, scale=0.1, plan=plan.attend, out=out)
    cu, counts = case["cu_counts"], case["cu_counts"].diff()
    whole = [row for row in range(len(counts)) if plan.bases[row] < 0 and counts[row]]
    items = torch.stack([cu[:-1][whole], counts[whole]])
    lens = (case["starts"] + counts)[whole]
    want = attend_ref(**given, scale=0.1, lanes=case["lanes"][whole], lens=lens, items=items)
    return out, want, plan.state


CHUNKS = [
    ([(0, 1)], 16, 32, 16),
    ([(0, 9), (37, 3), (5, 0), (130, 21)], 4, 32, 16),
    ([(61, 5)], 70, 32, 16),
    ([(20, 7), (0, 33)], 20, 40, 24),
    ([(40, 5)], 16, 512, 64),
]


@pytest.mark.parametrize(("rows", "heads", "rank", "rope"), CHUNKS, ids=str)
@pytest.mark.parametrize("dtype", HERE[:1], ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_chunks(
    rows: list[tuple[int, int]], heads: int, rank: int, rope: int, dtype: torch.dtype
) -> None:
    case = chunk_case(rows, heads, rank, rope, dtype, first=2, behind=3)
    got, want, state = run_chunks(case, least=1, capacity=0)
    there = state > 0
    assert state.tolist() == [-1] * 2 + [1] * sum(count for _, count in rows) + [0] * 3
    assert_close("out", want[there], got[there])
    assert bool(got[~there].isnan().all())


def test_rows_of_many_tokens_whose_keys_fit_are_decompressed() -> None:
    rows = [(0, 8), (30, 4), (100, 10), (0, 12), (7, 8)]
    case = chunk_case(rows, 4, 32, 16, torch.float32)
    given = {name: case[name] for name in ("lanes", "starts", "cu_counts", "cache")}
    plan = plan_chunks(**given, num_tokens=42, num_heads=4, rank=32, capacity=130, least=8)
    assert plan.bases.tolist() == [0, -1, 8, 118, -1]  # the last would end at 145
    assert plan.tile_ends.tolist() == [1, 1, 2, 3, 3]
    assert [-(-keys // EXPAND_TILE) for keys in (8, 110, 12)] == [1, 1, 1]
    got, want, state = run_chunks(case, least=8, capacity=130)
    assert state.tolist() == [-1] * 8 + [1] * 4 + [-1] * 22 + [1] * 8
    there = state > 0
    assert_close("out", want[there], got[there])
    assert bool(got[~there].isnan().all())
    plan = plan_chunks(**given, num_tokens=42, num_heads=4, rank=32, capacity=999, least=13)
    assert plan.bases.tolist() == [0, -1, -1, 8, -1]  # 10**2 < 2 * 100 * 3 and 8**2 < 2 * 7 * 5
    plan = plan_chunks(**given, num_tokens=42, num_heads=4, rank=32, capacity=999, least=12)
    assert plan.bases.tolist() == [0, -1, -1, 8, 20]  # 8**2 > 2 * 7 * 4


def test_more_rows_than_the_plan_scans_at_once() -> None:
    rows = [(i % 7, i % 3) for i in range(130)]
    case = chunk_case(rows, 2, 32, 16, torch.float32)
    given = {name: case[name] for name in ("lanes", "starts", "cu_counts", "cache")}
    num_tokens = len(case["q"])
    plan = plan_chunks(**given, num_tokens=num_tokens, num_heads=2, rank=32, capacity=250, least=2)
    base, bases = 0, []
    for start, count in rows:
        wants = count >= 2 or start == 0 < count
        base += (start + count) * wants
        bases.append(base - start - count if wants and base <= 250 else -1)
    assert plan.bases.tolist() == bases
    assert plan.tile_ends.tolist()[-1] == sum(base >= 0 for base in bases)


def test_large_scores_do_not_overflow() -> None:
    case = make_case([70], 4, 64, 16, torch.float32)
    case["q"] = case["q"] * 1e3
    assert_close("out", attend_ref(**case, scale=1.0), run(case, scale=1.0), ratio=1e-3)


def test_no_rows_and_nothing_of_them() -> None:
    case = make_case([0, 0], 4, 64, 16, torch.float32)
    assert bool(run(case).isnan().all())
    for name in ("q", "turned", "lanes", "lens"):
        case[name] = case[name][:0]
    assert run(case).shape == (0, 4, 64)


def test_refuses_what_does_not_fit() -> None:
    case = make_case([5, 9], 4, 32, 16, torch.float32)
    with pytest.raises(ValueError, match="dtypes"):
        run({**case, "q": case["q"].half()})
    with pytest.raises(ValueError, match="does not fit"):
        run({**case, "q": case["q"][..., :24]})
    with pytest.raises(ValueError, match="scales"):
        run({**in_eight_bits(case), "scales": torch.ones(3, device=DEVICE)})
    with pytest.raises(ValueError, match=r"wanted torch\.float8_e4m3fn"):
        run({**case, "scales": torch.ones(len(case["cache"]), device=DEVICE)})
    with pytest.raises(ValueError, match="int32"):
        run({**case, "lens": case["lens"].long()})
    plan = plan_attend(case["lanes"], case["lens"], 5, case["cache"], 32)
    given = {name: case[name] for name in ("q", "turned", "cache", "table")}
    with pytest.raises(ValueError, match="plan"):
        attend(**given, scale=1.0, plan=plan, out=case["q"].clone())
    with pytest.raises(ValueError, match="lanes"):
        plan_chunks(
            case["lanes"], case["lens"][:1], case["lens"], 2, 4, case["cache"], 32,
            capacity=1, least=1,
        )  # fmt: skip


def test_items_have_as_many_tokens_as_fill_a_block() -> None:
    assert [item_tokens(heads) for heads in (1, 5, 16, 33, 64, 128)] == [64, 8, 4, 1, 1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        ([4096] * 64, 16),
        ([(97 * i) % 300 for i in range(255)] + [16384], 16),
        ([8191], 8),
        ([4096] * 16, 128),
        ([4097, 1, 0, 700], 64),
    ],
    ids=["64x4096", "255 short, one long", "1x8191", "128 heads", "64 heads"],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_at_full_size(lengths: list[int], heads: int) -> None:
    case = make_case(lengths, heads, 512, 64, torch.bfloat16)
    got, there = run(case, scale=576**-0.5), case["lens"] > 0
    assert_close("out", attend_ref(**case, scale=576**-0.5)[there], got[there])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.usefixtures("poisoned_empty")
def test_chunks_at_full_size(heads: int) -> None:
    rows = [(4000, 50), (0, 130), (16000, 3), (300, 0), (129, 64)]
    case = chunk_case(rows, heads, 512, 64, torch.bfloat16, first=7, behind=20)
    got, want, state = run_chunks(case, least=1, capacity=0)
    assert_close("out", want[state > 0], got[state > 0])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_a_captured_plan_follows_the_lengths_at_replay(heads: int) -> None:
    case = make_case([700, 300, 65, 1], heads, 512, 64, torch.bfloat16)
    out, lens = torch.empty_like(case["q"].contiguous()), case["lens"].clone()

    def call() -> None:
        plan = plan_attend(case["lanes"], lens, heads, case["cache"], 512)
        for _ in range(3):
            attend(**_given(case), scale=0.1, plan=plan, out=out)

    for new in ([1, 300, 0, 1], [700, 299, 64, 1]):
        replayed(call, before=lambda new=new: lens.copy_(ints(new)))
        want, there = attend_ref(**{**case, "lens": ints(new)}, scale=0.1), ints(new) > 0
        assert_close("out", want[there], out[there])
        lens.copy_(case["lens"])
