"""Attention over decompressed keys against its reference."""

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.latent.prefill import LatentPrefillConfig, prefill, prefill_ref
from tests.kernels.harness import DEVICE, assert_close, ints, no_sync, randn, replayed
from tests.kernels.latents import make_chunks, make_queries

# each combination is a build on the card, and one of its types is enough there
HERE = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]
SMALL = LatentPrefillConfig(16, 16, 4, 2)


def make_case(
    rows: list[tuple[int, int]], heads: int, dims: tuple[int, int, int], dtype: torch.dtype,
    left_out: tuple[int, ...] = (),
) -> dict[str, Tensor]:  # fmt: skip
    """Rows of (start, new tokens); two tokens of others before them and three behind."""
    nope, rope, value = dims
    num_tokens = 5 + sum(count for _, count in rows)
    q, turned = make_queries(num_tokens, heads, nope, rope, dtype)
    bases, total = [], 1
    for row, (start, count) in enumerate(rows):
        bases.append(-1 if row in left_out else total)
        total += 0 if row in left_out else start + count
    made = randn(total + 70, heads, nope + value, dtype=dtype, seed=4)
    keys = randn(total + 70, rope, dtype=dtype, seed=5)
    made[total:], made[0], keys[total:] = float("nan"), float("nan"), float("nan")
    out = torch.full((num_tokens, heads, value), 7.0, dtype=dtype, device=DEVICE)
    case = {"q": q, "turned": turned, "made": made, "keys": keys, **make_chunks(rows, 2)}
    return {**case, "bases": ints(bases), "out": out}


def check(case: dict[str, Tensor], config: LatentPrefillConfig | None = None) -> None:
    want = prefill_ref(**{**case, "out": case["out"].clone()}, scale=0.1)
    with no_sync():
        got = prefill(**case, scale=0.1, config=config)
    assert_close("out", want, got)


CASES = [
    ([(0, 1)], 1, (16, 16, 16)),
    ([(0, 33), (70, 2), (5, 0), (31, 40)], 3, (24, 8, 40)),
    ([(40, 70)], 2, (128, 64, 128)),
    ([(0, 70), (65, 9)], 2, (32, 16, 64)),
]


@pytest.mark.parametrize(("rows", "heads", "dims"), CASES, ids=str)
@pytest.mark.parametrize("dtype", HERE, ids=str)
def test_prefill(
    rows: list[tuple[int, int]], heads: int, dims: tuple[int, int, int], dtype: torch.dtype
) -> None:
    check(make_case(rows, heads, dims, dtype))


def test_small_tiles_and_rows_that_are_absorbed() -> None:
    rows = [(3, 40), (100, 20), (17, 50), (0, 7)]
    case = make_case(rows, 2, (16, 16, 16), torch.float32, left_out=(1, 3))
    check(case, SMALL)
    counts = [0, *(count for _, count in rows)]
    for row in (1, 3):
        begin = 2 + sum(counts[: row + 1])
        assert bool((case["out"][begin : begin + counts[row + 1]] == 7.0).all())
    assert bool((case["out"][:2] == 7.0).all())
    assert bool((case["out"][-3:] == 7.0).all())


def test_more_rows_than_are_scanned_at_once() -> None:
    check(make_case([(i % 3, i % 2) for i in range(130)], 1, (16, 16, 16), torch.float32), SMALL)


def test_refuses_what_does_not_fit() -> None:
    case = make_case([(0, 9)], 2, (16, 16, 16), torch.float32)
    with pytest.raises(ValueError, match="made"):
        prefill(**{**case, "made": case["made"][:, :1]}, scale=1.0)
    with pytest.raises(ValueError, match="keys"):
        prefill(**{**case, "keys": case["keys"][1:]}, scale=1.0)
    with pytest.raises(ValueError, match="dtypes"):
        prefill(**{**case, "keys": case["keys"].half()}, scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, LatentPrefillConfig(128, 64, 8, 2)], ids=str)
def test_at_full_size_in_a_graph(config: LatentPrefillConfig | None) -> None:
    rows = [(4000, 1000), (0, 2048), (300, 1), (129, 900)]
    case = make_case(rows, 16, (128, 64, 128), torch.bfloat16, left_out=(2,))
    want = prefill_ref(**{**case, "out": case["out"].clone()}, scale=192**-0.5)
    replayed(
        lambda: prefill(**case, scale=192**-0.5, config=config),
        before=lambda: case["out"].fill_(7.0),
    )
    assert_close("out", want, case["out"])
