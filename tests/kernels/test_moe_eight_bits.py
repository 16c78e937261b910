"""Experts in 8 bits against the reference: their weights widened, and rows in 8 bits where there are
many."""

from typing import Any

import pytest
import torch

from asyncllm.kernels.moe.eight_bits import CONFIGS, WIDE, widened_ref
from asyncllm.kernels.moe.experts import experts, experts_ref, prepare
from asyncllm.kernels.moe.tiles import ExpertsConfig, Tile
from asyncllm.kernels.quant.rows import quantize_rows_ref
from tests.kernels.harness import assert_close, no_sync, randn, replayed
from tests.kernels.test_moe_experts import make_case

FP8 = torch.float8_e4m3fn
KINDS = [(FP8, False), (torch.int8, False), (FP8, True)]
# tokens, experts, top_k, hidden, inner
SHAPES = [(1, 8, 2, 64, 128), (5, 4, 3, 200, 128), (9, 3, 2, 72, 256)]
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def in_8_bits(case: dict[str, Any], kind: torch.dtype, blocked: bool) -> dict[str, Any]:
    """The case with both stacks in 8 bits; what they stand for differs from block to block."""
    found, scales = dict(case), []
    for at, name in enumerate(("gate_up", "down")):
        stack = case[name]
        num, height, k = stack.shape
        values, each = quantize_rows_ref(stack.flatten(0, 1).float(), kind)
        if blocked:
            shape = num, -(-height // 128), -(-k // 128)
            each = randn(*shape, dtype=torch.float32, seed=7 + at).abs().add(0.1) / 448 / k**0.5
        found[name] = values.view(stack.shape)
        scales.append(each.view(num, height) if not blocked else each)
    return found | {"scales": tuple(scales)}


@pytest.mark.parametrize("size", CONFIGS)
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_class(size: str, kind: torch.dtype, blocked: bool, dtype: torch.dtype) -> None:
    """Of all tokens, whose number chooses it."""
    shape = SHAPES[list(CONFIGS).index(size) % 3]
    case = in_8_bits(make_case(*shape, dtype), kind, blocked)
    with no_sync():
        got = experts(**case, size=size)
    want = experts_ref(**case, wide=size in WIDE)
    # a number between two of 8 bits may become either
    assert_close("out", want, got, None if size in WIDE else 0.02)
    other = experts_ref(**case, wide=size not in WIDE)
    assert (want - other).float().norm() > 0.005 * want.float().norm()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("size", ["8", "128"])
def test_one_of_both_products_in_8_bits(size: str) -> None:
    plain = make_case(9, 5, 2, 64, 128, torch.float16)
    packed = in_8_bits(plain, FP8, False)
    for at, name in enumerate(("gate_up", "down")):
        scales = (packed["scales"][0], None) if at == 0 else (None, packed["scales"][1])
        case = plain | {name: packed[name], "scales": scales}
        want = experts_ref(**case, wide=size in WIDE)
        assert_close(name, want, experts(**case, size=size), 0.02)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # rows of experts that are elsewhere
def test_ranks_with_some_experts_each_add_up_to_all() -> None:
    case = in_8_bits(make_case(6, 5, 3, 64, 128, torch.float16), FP8, True)
    total = torch.zeros_like(case["x"], dtype=torch.float32)
    for held in (range(3), range(3, 5), range(5, 5)):
        mine = dict(case)
        cut = slice(held.start, max(held.stop, held.start + 1)) if held else slice(0, 1)
        mine |= {name: case[name][cut] for name in ("gate_up", "down")}
        mine["scales"] = tuple(each[cut].contiguous() for each in case["scales"])
        total += experts(**mine, held=held, size="many").float()
    assert_close("sum", experts_ref(**case, wide=False).float(), total, 0.02)


@pytest.mark.parametrize("kind", [FP8, torch.int8], ids=str)
@pytest.mark.parametrize("size", ["32", "many"])
def test_other_configurations_give_the_same(size: str, kind: torch.dtype) -> None:
    case = in_8_bits(make_case(30, 3, 2, 144, 48, torch.float16), kind, False)
    want = experts_ref(**case, activation="gelu_tanh", wide=size in WIDE)
    for block_m, group, copy in ((64, 1, True), (16, 3, False), (16, 3, True)):
        config = ExpertsConfig(
            block_m, Tile(32, 64, 4, 2, group, copy), Tile(64, 128, 4, 3, group, copy)
        )
        got = experts(**case, activation="gelu_tanh", size=size, config=config)
        assert_close("out", want, got, 0.02)


def test_rows_that_cannot_stay_come_to_8_bits() -> None:
    """Rows in 32 bits are no pairs of 16."""
    case = in_8_bits(make_case(3, 4, 2, 33, 20, torch.float32), FP8, False)
    got = experts(**case, size="few")
    assert_close("out", experts_ref(**case, wide=False), got, 0.02)


@pytest.mark.usefixtures("poisoned_empty")  # rows for experts that are elsewhere stay as made
def test_preparing_builds_every_class() -> None:
    case = in_8_bits(make_case(1, 4, 2, 32, 16, torch.float16), FP8, False)
    prepare(case["gate_up"], case["down"], case["scales"], range(3), 2, "silu", torch.float16)


def test_refuses_what_does_not_fit() -> None:
    case = in_8_bits(make_case(3, 4, 2, 32, 16, torch.float16), FP8, False)
    up, down = case["scales"]
    blocks = torch.ones(4, 1, 1, device=up.device)
    for message, wrong in {
        "do not fit gate_up": {"scales": (up[:, :8], down)},
        "do not fit down": {"scales": (up, down.half())},
        "do not fit blocks of 128": {"scales": (blocks, down)},
        "gate_up torch.float8": {"scales": (None, down)},
    }.items():
        with pytest.raises(ValueError, match=message):
            experts(**{**case, **wrong})


def test_what_blocks_stand_for() -> None:
    weights, scales = torch.ones(2, 130, 129).to(FP8), torch.arange(8.0).view(2, 2, 2)
    wide = widened_ref(weights, scales)
    assert [float(wide[e, i, j]) for e, i, j in ((0, 0, 0), (0, 129, 0), (1, 127, 128))] == [
        0,
        2,
        5,
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 300, 2500])
def test_model_shapes_in_a_cuda_graph(num_tokens: int, kind: torch.dtype, blocked: bool) -> None:
    shapes = ((64, 6, 2048, 1408), (128, 8, 2048, 384))
    for num_experts, top_k, hidden, inner in shapes:
        case = make_case(num_tokens, num_experts, top_k, hidden, inner, torch.bfloat16)
        case = in_8_bits(case, kind, blocked)
        fresh = randn(num_tokens, hidden, dtype=torch.bfloat16, seed=9)
        out = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=fresh.device)

        def renew() -> None:
            case["x"].copy_(fresh)  # noqa: B023

        replayed(lambda: experts(**case, out=out), before=renew)  # noqa: B023
        near = [experts_ref(**case, wide=wide).double() for wide in (True, False)]
        error = min(float((out.double() - want).norm() / want.norm()) for want in near)
        assert error < 0.02
        assert torch.equal(experts(**case), out.clone())


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "blocked"), KINDS, ids=str)
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_configurations_on_the_device(
    block_m: int, copy: bool, kind: torch.dtype, blocked: bool
) -> None:
    case = in_8_bits(make_case(700, 9, 3, 528, 256, torch.bfloat16), kind, blocked)
    for size in ("32", "many"):
        want = experts_ref(**case, wide=size in WIDE)
        for group in (1, 4):
            config = ExpertsConfig(
                block_m, Tile(64, 128, 4, 3, group, copy), Tile(128, 128, 8, 3, group, copy)
            )
            assert_close("out", want, experts(**case, size=size, config=config), 0.02)
