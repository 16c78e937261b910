"""The choice of experts against its reference."""

from typing import Any

import pytest
import torch

from asyncllm.kernels.moe.route import route, route_ref
from tests.kernels.harness import assert_close, no_sync, randn, replayed

KINDS: dict[str, tuple[int, int, dict[str, Any]]] = {  # experts, top_k, the rest
    "mixtral": (8, 2, {"renormalise": True}),
    "qwen2": (60, 4, {}),
    "qwen3": (128, 8, {"renormalise": True}),
    "v2 lite": (64, 6, {"scale": 0.5}),
    "v2": (160, 6, {"groups": 8, "top_groups": 3, "scale": 16.0}),
    "v3": (
        256,
        8,
        {
            "groups": 8,
            "top_groups": 4,
            "top2": True,
            "sigmoid": True,
            "renormalise": True,
            "scale": 2.5,
        },
    ),
    "odd": (21, 5, {"groups": 3, "top_groups": 2, "top2": True, "sigmoid": True}),
    "one of one": (1, 1, {"renormalise": True}),
    "all": (6, 6, {}),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("poisoned_empty")
def test_route(kind: str, biased: bool) -> None:
    num_experts, top_k, options = KINDS[kind]
    logits = randn(19, num_experts + 3, dtype=torch.float32)[:, :num_experts] * 2
    bias = randn(num_experts, dtype=torch.float32, seed=1) if biased else None
    want_ids, want = route_ref(logits, top_k, bias=bias, **options)
    with no_sync():
        ids, weights = route(logits, top_k, bias=bias, **options)
    assert torch.equal(ids, want_ids)
    assert_close("weights", want, weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("poisoned_empty")
def test_tokens_that_only_pad_have_no_experts(kind: str) -> None:
    num_experts, top_k, options = KINDS[kind]
    logits = randn(19, num_experts, dtype=torch.float32)
    live = (torch.arange(19, device=logits.device) % 3).int()  # any number but 0 stands for a token
    want_ids, want = route_ref(logits, top_k, live=live, **options)
    ids, weights = route(logits, top_k, live=live, **options)
    assert torch.equal(ids, want_ids)
    assert (ids[::3] == -1).all()
    assert (ids[1::3] >= 0).all()
    assert_close("weights", want, weights)
    with pytest.raises(ValueError, match="live"):
        route(logits, top_k, live=live[1:], **options)


def test_of_equal_experts_the_first_are_taken() -> None:
    ids, weights = route(torch.zeros(3, 12).to(randn(1, dtype=torch.float32).device), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert_close("weights", torch.full_like(weights, 1 / 12), weights)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1e4])
@pytest.mark.parametrize("kind", ["qwen2", "v3", "odd"])
def test_experts_exist_whatever_the_logits(kind: str, value: float) -> None:
    num_experts, top_k, options = KINDS[kind]
    logits = torch.full((2, num_experts), value).to(randn(1, dtype=torch.float32).device)
    ids, _ = route(logits, top_k, **options)
    assert ((ids >= 0) & (ids < num_experts)).all()


def test_no_tokens() -> None:
    ids, weights = route(randn(0, 8, dtype=torch.float32), 2)
    assert ids.shape == weights.shape == (0, 2)


def test_refuses_what_does_not_fit() -> None:
    logits = randn(2, 12, dtype=torch.float32)
    for wrong in ({"groups": 5}, {"groups": 4, "top_groups": 5}, {"groups": 12, "top2": True}):
        with pytest.raises(ValueError, match="groups"):
            route(logits, 1, **wrong)
    with pytest.raises(ValueError, match="4 experts of 1 groups of 3"):
        route(logits, 4, groups=4)
    with pytest.raises(ValueError, match="float32"):
        route(logits.half(), 2)
    with pytest.raises(ValueError, match="bias"):
        route(logits, 2, bias=logits[0, :5])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_cuda_graph(kind: str) -> None:
    num_experts, top_k, options = KINDS[kind]
    logits, fresh = (randn(300, num_experts, dtype=torch.float32, seed=i) for i in range(2))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    replayed(
        lambda: found.append(route(logits, top_k, **options)), before=lambda: logits.copy_(fresh)
    )
    want_ids, want = route_ref(fresh, top_k, **options)
    assert torch.equal(found[-1][0], want_ids)
    assert_close("weights", want, found[-1][1])
