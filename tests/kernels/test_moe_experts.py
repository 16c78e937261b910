"""Grouped products and their sum against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.moe.experts import (
    experts,
    experts_config,
    experts_ref,
    prepare,
)
from asyncllm.kernels.moe.route import route_ref
from asyncllm.kernels.moe.tiles import ExpertsConfig, Tile, size_class
from tests.kernels.harness import DTYPES, assert_close, no_sync, randn, replayed

# tokens, experts, top_k, hidden, inner
SHAPES = [(1, 8, 2, 64, 48), (9, 7, 3, 72, 40), (70, 4, 2, 33, 65), (40, 12, 4, 128, 32)]


def make_case(
    num_tokens: int, num_experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    logits = randn(num_tokens, num_experts, dtype=torch.float32)
    ids, weights = route_ref(logits, top_k)
    return {
        "x": randn(num_tokens, hidden + 8, dtype=dtype, seed=1)[:, :hidden],
        "gate_up": randn(num_experts, 2 * inner, hidden, dtype=dtype, seed=2) / hidden**0.5,
        "down": randn(num_experts, hidden, inner, dtype=dtype, seed=3) / inner**0.5,
        "ids": ids,
        "weights": weights,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_experts(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    case = make_case(*shape, dtype)
    with no_sync():
        got = experts(**case)
    assert_close("out", experts_ref(**case), got)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.usefixtures("poisoned_empty")
def test_something_shared_is_added(activation: str, gated: bool) -> None:
    case: dict[str, Any] = make_case(11, 5, 2, 64, 24, torch.float16)
    case["activation"] = activation
    case["shared"] = randn(11, 100, dtype=torch.float16, seed=4)[:, 20:84]
    if gated:
        case["shared_gate"] = randn(11, 1, dtype=torch.float32, seed=5)
    wide = torch.full((11, 90), 7.0, dtype=torch.float16, device=case["x"].device)
    out = wide[:, 8:72]
    assert experts(**case, out=out) is out
    assert_close("out", experts_ref(**case), out.contiguous())
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 72:] == 7).all()


@pytest.mark.usefixtures("poisoned_empty")
def test_ranks_with_some_experts_each_add_up_to_all() -> None:
    case = make_case(30, 7, 3, 64, 32, torch.float32)
    total = torch.zeros_like(case["x"])
    for held in (range(3), range(3, 5), range(5, 7), range(7, 7)):
        mine: dict[str, Any] = dict(case)
        for name in ("gate_up", "down"):
            padded = case[name][:3].clone()
            padded[: len(held)] = case[name][held.start : held.stop]
            mine[name] = padded
        part = experts(**mine, held=held)
        assert_close("part", experts_ref(**mine, held=held), part)
        total += part
    assert_close("sum", experts_ref(**case), total)


@pytest.mark.parametrize(
    ("block_m", "group", "copy"), [(64, 1, True), (16, 3, False), (16, 3, True)]
)
def test_other_configurations_give_the_same(block_m: int, group: int, copy: bool) -> None:
    case = make_case(60, 5, 2, 72, 48, torch.float16)
    config = ExpertsConfig(
        block_m, Tile(32, 64, 4, 2, group, copy), Tile(64, 32, 4, 3, group, copy)
    )
    assert_close("out", experts_ref(**case), experts(**case, config=config))


def test_classes_of_shapes() -> None:
    cpu = torch.device("cpu")  # two multiprocessors
    assert size_class(3, 64, 64, cpu) == "few"
    assert [size_class(n, 64, 64, cpu) for n in (4, 512, 513, 2048, 8192, 8193)] == [
        *["8", "8", "32", "32", "128", "many"]
    ]
    assert experts_config(8193, 64, 64, 2, cpu).block_m == 128
    assert experts_config(8193, 64, 64, 4, cpu).block_m == 32


@pytest.mark.usefixtures("poisoned_empty")
def test_preparing_builds_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    monkeypatch.setattr(
        "asyncllm.kernels.moe.experts._made",
        lambda x, w, scales, sorted_, built, top_k, act: (
            seen.add(built[1])
            or x.new_zeros(len(x) * (top_k if act else 1), len(w[0]) // (2 if act else 1))
        ),
    )
    case = make_case(1, 4, 2, 32, 16, torch.float16)
    stacks = case["gate_up"], case["down"]
    prepare(*stacks, (None, None), range(3), 2, "silu", torch.float16)
    cpu = torch.device("cpu")
    for num_pairs in (1, 30, 100, 500, 5000):
        assert experts_config(num_pairs, 4, 4096, 2, cpu) in seen
    assert experts_config(1, 4, 16, 2, cpu) in seen


def test_no_tokens() -> None:
    assert experts(**make_case(0, 4, 2, 32, 16, torch.float32)).shape == (0, 32)


def test_refuses_what_does_not_fit() -> None:
    case: dict[str, Any] = make_case(3, 4, 2, 32, 16, torch.float32)
    x, gate_up = case["x"], case["gate_up"]
    for message, wrong in {
        "do not fit x": {"down": case["down"][:, :, :8]},
        "contiguous": {"gate_up": gate_up.transpose(1, 2).contiguous().transpose(1, 2)},
        "float16": {"x": x.half()},
        "rows": {"x": x[0]},
        "experts": {"held": range(2, 9)},
        "ids": {"ids": case["ids"].long()},
        "weights": {"weights": case["weights"][:2]},
        "shared ": {"shared": x[:, :3]},
        "shared_gate": {"shared": x, "shared_gate": x[:, :1].half()},
        "out": {"out": x.half()},
    }.items():
        with pytest.raises(ValueError, match=message):
            experts(**{**case, **wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 300, 2500])
def test_model_shapes_in_a_cuda_graph(num_tokens: int) -> None:
    for num_experts, top_k, hidden, inner in ((64, 6, 2048, 1408), (128, 8, 2048, 384)):
        case = make_case(num_tokens, num_experts, top_k, hidden, inner, torch.bfloat16)
        fresh = randn(num_tokens, hidden, dtype=torch.bfloat16, seed=9)
        ids, weights = route_ref(randn(num_tokens, num_experts, dtype=torch.float32, seed=8), top_k)
        out = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=fresh.device)

        def renew() -> None:
            case["x"].copy_(fresh)  # noqa: B023
            case["ids"].copy_(ids)  # noqa: B023
            case["weights"].copy_(weights)  # noqa: B023

        replayed(lambda: experts(**case, out=out), before=renew)  # noqa: B023
        assert_close("out", experts_ref(**case), out)
        first = out.clone()
        assert torch.equal(experts(**case), first)


@pytest.mark.gpu
@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_configurations_on_the_device(block_m: int, copy: bool) -> None:
    case = make_case(700, 9, 3, 520, 264, torch.bfloat16)
    want = experts_ref(**case)
    for group in (1, 4):
        config = ExpertsConfig(
            block_m, Tile(64, 64, 4, 3, group, copy), Tile(128, 64, 8, 3, group, copy)
        )
        assert_close("out", want, experts(**case, config=config))
