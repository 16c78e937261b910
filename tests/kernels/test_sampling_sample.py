"""Sampling against a reference that sorts."""

import time

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.sampling import sample as sampling
from asyncllm.kernels.sampling.sample import kept_ref, sample, sample_ref
from tests.kernels.harness import DEVICE, DTYPES, no_sync, randn, replayed

Knobs = tuple[float, int, float, float]  # temperature, top_k (0: all), top_p, min_p

CUTS: dict[str, Knobs] = {
    "plain": (1.0, 0, 1.0, 0.0),
    "hot": (2.5, 0, 1.0, 0.0),
    "top_k 1": (1.0, 1, 1.0, 0.0),
    "top_k 50": (0.8, 50, 1.0, 0.0),
    "top_k half": (1.0, 3000, 1.0, 0.0),
    "top_p tiny": (1.0, 0, 1e-6, 0.0),
    "top_p 0.9": (1.0, 0, 0.9, 0.0),
    "top_p 0.9 peaked": (0.05, 0, 0.9, 0.0),
    "top_p 0.999": (1.0, 0, 0.999, 0.0),
    "min_p": (1.0, 0, 1.0, 0.1),
    "all three": (0.7, 400, 0.8, 0.02),
    "min_p binds": (1.0, 2000, 0.95, 0.3),
    "greedy": (0.0, 5, 0.5, 0.1),
}


def columns(knobs: list[Knobs], vocab_size: int) -> list[Tensor]:
    temperature, top_k, top_p, min_p = zip(*knobs, strict=True)
    floats = [torch.tensor(c, dtype=torch.float32) for c in (temperature, top_p, min_p)]
    ranks = torch.tensor([k or vocab_size for k in top_k], dtype=torch.int32)
    return [c.to(DEVICE) for c in (floats[0], ranks, floats[1], floats[2])]


def draw(logits: Tensor, knobs: list[Knobs], uniform: Tensor, **how: bool) -> Tensor:
    flags = {"greedy": False, "truncates": True, **how}
    return sample(logits, *columns(knobs, logits.shape[1]), uniform.to(DEVICE), **flags)


def assert_within(logits: Tensor, knobs: list[Knobs], uniform: Tensor, got: Tensor) -> None:
    """``got`` is what the reference draws, but for rounding of the running sum."""
    kept, weight = kept_ref(logits, *columns(knobs, logits.shape[1]))
    weight = (weight * kept).cpu()
    sums = weight.cumsum(-1)
    share = uniform.double() * sums[:, -1]
    rows = torch.arange(len(got))
    token = got.cpu()
    assert ((token >= 0) & (token < logits.shape[1])).all()
    low, high = (sums - weight)[rows, token], sums[rows, token]
    slack = 3e-5 * sums[:, -1]
    inside = (low - slack <= share) & (share <= high + slack) & kept.cpu()[rows, token]
    greedy = columns(knobs, 1)[0].cpu() == 0
    assert torch.where(greedy, token == logits.cpu().float().argmax(-1), inside).all()


@pytest.mark.parametrize("vocab_size", [50, 4096, 9001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_draws_as_the_reference(vocab_size: int, dtype: torch.dtype) -> None:
    knobs = list(CUTS.values())
    logits = randn(len(knobs), vocab_size, dtype=dtype)
    uniform = torch.rand(len(knobs), generator=torch.Generator().manual_seed(1))
    args = [*columns(knobs, vocab_size), uniform.to(DEVICE)]
    with no_sync():
        got = sample(logits, *args, greedy=False, truncates=True)
    assert_within(logits, knobs, uniform, got)
    want = sample_ref(logits, *columns(knobs, vocab_size), uniform.to(DEVICE))
    assert_within(logits, knobs, uniform, want)


def edges(logits: Tensor, knobs: Knobs) -> list[int]:
    """Tokens of one row at many uniform numbers, the extremes too."""
    num = 64 if DEVICE == "cuda" else 3
    uniform = torch.linspace(1e-6, 1 - 1e-6, num)
    rows = logits.expand(num, -1)
    got = draw(rows, [knobs] * num, uniform)
    assert_within(rows, [knobs] * num, uniform, got)
    return got.cpu().tolist()


@pytest.mark.parametrize("name", ["top_k 50", "top_p 0.9", "top_k half", "all three", "min_p"])
@pytest.mark.usefixtures("poisoned_empty")
def test_the_first_and_last_kept_tokens_are_drawn(name: str) -> None:
    logits = randn(1, 5003, dtype=torch.float32, seed=4)
    kept, _ = kept_ref(logits, *columns([CUTS[name]], 5003))
    ids = kept[0].nonzero()[:, 0].cpu().tolist()
    got = edges(logits, CUTS[name])
    assert got == sorted(got)
    assert got[0] == ids[0]
    assert got[-1] == ids[-1]


def test_every_kept_token_of_a_small_set_comes_and_no_other() -> None:
    logits = randn(1, 5003, dtype=torch.float32, seed=2)
    knobs: Knobs = (50.0, 3, 1.0, 0.0)
    kept, _ = kept_ref(logits, *columns([knobs], 5003))
    assert set(edges(logits, knobs)) == set(kept[0].nonzero()[:, 0].cpu().tolist())


@pytest.mark.parametrize(
    ("knobs", "want"),
    [
        ((1.0, 0, 1.0, 0.0), range(6000)),
        ((1.0, 1, 1.0, 0.0), range(1)),
        ((1.0, 3, 1.0, 0.0), range(3)),
        ((1.0, 5000, 1.0, 0.0), range(5000)),
        ((1.0, 0, 0.25, 0.0), range(1500)),
        ((1.0, 0, 1e-9, 0.0), range(1)),
        ((1.0, 0, 1.0, 1.0), range(6000)),
        ((1.0, 5000, 0.5, 1.0), range(3000)),
    ],
)
def test_equal_logits_are_kept_from_the_lowest_id(knobs: Knobs, want: range) -> None:
    got = edges(torch.full((1, 6000), 1.5, device=DEVICE), knobs)
    assert got[0] == 0
    assert abs(got[-1] - want[-1]) <= 1
    assert max(got) <= want[-1] + 1


def test_ties_at_the_threshold() -> None:
    logits = torch.full((1, 9000), -9.0, device=DEVICE)
    logits[0, 100:200] = 2.0
    logits[0, 4200:4400] = 1.0
    logits[0, 8500:8600] = 1.0
    tied = [*range(4200, 4400), *range(8500, 8600)]
    for most in (101, 300, 301):
        got = edges(logits, (1.0, most, 1.0, 0.0))
        assert got[0] >= 100
        assert got[-1] == tied[most - 101]


@pytest.mark.parametrize("scale", [0.5, 8.0])
@pytest.mark.parametrize("name", ["top_p 0.9", "top_k half", "top_k 50", "all three"])
def test_coarse_logits_give_large_ties(name: str, scale: float) -> None:
    logits = (randn(1, 9001, dtype=torch.float32) * scale).round() / scale
    edges(logits, CUTS[name])


@pytest.mark.parametrize(
    ("name", "z"),
    [("top_p 0.9", -40.0), ("top_k half", -40.0), ("all three", -40.0), ("top_p 0.999", 0.0)],
)
def test_a_wrong_bracket_is_found_out(name: str, z: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative margins turn the bracket inside out; the whole row is searched then."""
    logits = randn(1, 9001, dtype=torch.float32, seed=3)
    monkeypatch.setattr(sampling, "Z", z)
    edges(logits, CUTS[name])


@pytest.mark.usefixtures("poisoned_empty")
def test_nan_and_infinite_logits() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.full((5, 5000), -inf, device=DEVICE)
    logits[0, [3, 4500]] = torch.tensor([1.0, 1.0], device=DEVICE)
    logits[1] = nan
    logits[1, 4999] = -1e30
    logits[3, 77] = inf
    logits[4] = nan
    # row 2: nothing at all
    knobs: list[Knobs] = [(1.0, 0, 0.99, 0.0), (1.0, 40, 1.0, 0.0), (1.0, 0, 0.5, 0.0)]
    knobs += [(1e-9, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)]
    uniform = torch.tensor([0.75, 0.5, 0.5, 0.9, 0.5])
    for truncates in (True, False):
        got = draw(logits, knobs, uniform, truncates=truncates)
        assert got.tolist() == [4500, 4999, 0, 77, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("poisoned_empty")
def test_greedy_takes_the_lowest_of_the_best(dtype: torch.dtype) -> None:
    logits = randn(3, 9001, dtype=dtype)
    logits[0, [5, 4096, 8999]] = 50
    logits[1, [4097, 8200]] = 50
    logits[2, [9000]] = float("nan")
    none = torch.empty(0)
    got = sample(logits, none, none, none, none, none, greedy=True, truncates=False)
    assert got[:2].tolist() == [5, 4097]
    assert got[2] == logits[2, :9000].argmax()


def test_a_row_does_not_depend_on_its_company() -> None:
    knobs = [CUTS[name] for name in ("top_p 0.9", "plain", "top_k half", "all three")]
    logits = randn(4, 9001, dtype=torch.float32)
    uniform = torch.rand(4, generator=torch.Generator().manual_seed(5))
    together = draw(logits, knobs, uniform)
    for row in range(4):
        alone = draw(logits[row : row + 1], [knobs[row]], uniform[row : row + 1])
        assert alone[0] == together[row]


def test_rows_may_be_strided() -> None:
    wide = randn(4, 10000, dtype=torch.float32)
    knobs = [CUTS["top_p 0.9"]] * 4
    uniform = torch.tensor([0.1, 0.4, 0.7, 0.95])
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    args = [*columns(knobs, 9000), uniform.to(DEVICE)]
    assert sample(wide[:, :9000], *args, greedy=False, truncates=True, out=out) is out
    want = sample(wide[:, :9000].contiguous(), *args, greedy=False, truncates=True)
    assert torch.equal(out, want)


@pytest.mark.parametrize("truncates", [False, True])
def test_frequencies(truncates: bool) -> None:
    """Evenly spaced uniform numbers give every token its share, to one draw."""
    vocab_size, num = 12, 2000 if DEVICE == "cuda" else 16
    logits = randn(1, vocab_size, dtype=torch.float32, seed=7).expand(num, -1)
    knobs: list[Knobs] = [(0.9, 6, 0.95, 0.01) if truncates else (0.9, 0, 1.0, 0.0)] * num
    uniform = (torch.arange(num) + 0.5) / num
    got = draw(logits, knobs, uniform, truncates=truncates).cpu()
    kept, weight = kept_ref(logits[:1], *columns(knobs[:1], vocab_size))
    share = (kept * weight)[0].cpu()
    wanted = share / share.sum() * num
    seen = torch.bincount(got, minlength=vocab_size)
    assert (seen - wanted).abs().max() <= 1 + 1e-3
    assert not seen[wanted == 0].any()


def test_no_rows() -> None:
    logits = randn(0, 100, dtype=torch.float32)
    none = [
        torch.empty(0, dtype=torch.int32 if i == 1 else torch.float32, device=DEVICE)
        for i in range(5)
    ]
    assert sample(logits, *none, greedy=False, truncates=True).shape == (0,)


def test_refuses_what_does_not_fit() -> None:
    logits = randn(2, 100, dtype=torch.float32)
    good = [*columns([CUTS["plain"]] * 2, 100), torch.tensor([0.5, 0.5], device=DEVICE)]
    with pytest.raises(ValueError, match="logits"):
        sample(logits.T, *good, greedy=False, truncates=True)
    with pytest.raises(ValueError, match="top_k"):
        sample(logits, good[0], good[0], *good[2:], greedy=False, truncates=True)
    with pytest.raises(ValueError, match="uniform"):
        sample(logits, *good[:4], good[4][:1], greedy=False, truncates=True)
    with pytest.raises(ValueError, match="out"):
        sample(logits, *good, greedy=True, truncates=False, out=good[1])


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [128256, 262144])
@pytest.mark.parametrize("num", [1, 37, 256])
def test_large_vocabularies(vocab_size: int, num: int) -> None:
    knobs = [list(CUTS.values())[i % len(CUTS)] for i in range(num)]
    logits = randn(num, vocab_size, dtype=torch.bfloat16) * 2
    uniform = torch.rand(num, generator=torch.Generator().manual_seed(1))
    args = [*columns(knobs, vocab_size), uniform.to(DEVICE)]
    with no_sync():
        got = sample(logits, *args, greedy=False, truncates=True)
    for begin in range(0, num, 64):
        part = slice(begin, begin + 64)
        assert_within(logits[part], knobs[part], uniform[part], got[part])


@pytest.mark.gpu
def test_every_row_ends() -> None:
    """A fused product and sum once made two half warps leave a loop at different turns."""
    num, vocab_size = 252, 128256
    args = columns([CUTS["top_p 0.9"]] * num, vocab_size)
    ended, generator = torch.cuda.Event(), torch.Generator(DEVICE).manual_seed(0)
    for _ in range(200):
        logits = torch.randn(num, vocab_size, device=DEVICE, generator=generator) * 1.28
        uniform = torch.rand(num, device=DEVICE, generator=generator).clamp(1e-6, 1 - 1e-6)
        sample(logits.bfloat16(), *args, uniform, greedy=False, truncates=True)
    ended.record()
    deadline = time.monotonic() + 60
    while not ended.query():
        assert time.monotonic() < deadline, "sampling hangs"


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    knobs = list(CUTS.values())
    logits, fresh = (randn(len(knobs), 128256, dtype=torch.bfloat16, seed=i) for i in range(2))
    uniform = torch.rand(len(knobs), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    args = [*columns(knobs, 128256), uniform]
    out = torch.empty(len(knobs), dtype=torch.int64, device=DEVICE)

    def call() -> None:
        sample(logits, *args, greedy=False, truncates=True, out=out)

    replayed(call, before=lambda: logits.copy_(fresh))
    assert_within(fresh, knobs, uniform.cpu(), out)
