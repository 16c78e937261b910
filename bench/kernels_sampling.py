"""Time of sampling, penalties, one-row linear and step-start kernels on a CUDA device, beside torch.

    python bench/kernels_sampling.py [--quick] [--only sampling|linear|rest] [--tune]

No number is printed while a kernel disagrees with its reference. Each call runs in a CUDA graph;
times are medians. Weights of the linear layer rotate over more memory than the L2 cache holds;
``--tune`` tries configurations of the linear kernel instead.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.kernels.embedding import embed_rmsnorm, embed_rmsnorm_ref, stage
from asyncllm.kernels.linear import LinearConfig, linear, linear_ref
from asyncllm.kernels.log_probs import log_probs, log_probs_ref
from asyncllm.kernels.penalties import add_bias, penalize, penalize_ref, penalty_counts
from asyncllm.kernels.sampling.sample import kept_ref, sample
from bench.kernels import in_turn_us, measure_ceiling, refuse

VOCAB, HIDDEN = 128256, 4096
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)]
ROWS = (1, 8, 64, 256)
Knobs = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p
CASES: dict[str, Knobs] = {
    "plain": (1.0, VOCAB, 1.0, 0.0),
    "top_p 0.9": (1.0, VOCAB, 0.9, 0.0),
    "top_k 50": (1.0, 50, 1.0, 0.0),
    "all three": (0.8, 1000, 0.95, 0.02),
}
L2_BYTES = 200_000_000


def columns(num: int, knobs: Knobs) -> list[Tensor]:
    """temperature, top_k, top_p, min_p, uniform."""
    temperature, top_k, top_p, min_p = knobs

    def full(value: float) -> Tensor:
        return torch.full((num,), value, device="cuda")

    ranks = torch.full((num,), top_k, dtype=torch.int32, device="cuda")
    uniform = torch.rand(num, device="cuda").clamp(1e-6, 1 - 1e-6)
    return [full(temperature), ranks, full(top_p), full(min_p), uniform]


def sorted_sample(logits: Tensor, args: Sequence[Tensor]) -> Tensor:
    """The usual way in torch: softmax, sort, running sums, search."""
    temperature, top_k, top_p, min_p, uniform = args
    probs = (logits.float() / temperature[:, None]).softmax(dim=-1)
    ordered, tokens = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    keep = torch.arange(VOCAB, device="cuda") < top_k[:, None]
    keep &= (before < top_p[:, None]) & (ordered >= min_p[:, None] * ordered[:, :1])
    sums = (ordered * keep).cumsum(dim=-1)
    index = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    return tokens.gather(1, index.clamp_max(VOCAB - 1))[:, 0]


def plain_sample(logits: Tensor, args: Sequence[Tensor]) -> Tensor:
    """Without truncation torch needs no sort: exponential race."""
    probs = (logits.float() / args[0][:, None]).softmax(dim=-1)
    return probs.div_(torch.empty_like(probs).exponential_()).argmax(dim=-1)


def wrong_draws(logits: Tensor, args: Sequence[Tensor], got: Tensor) -> int:
    """Rows whose token is not kept, or not where the uniform number points."""
    kept, weight = kept_ref(logits, *args[:4])
    weight = weight * kept
    sums = weight.cumsum(dim=-1)
    goal, total = args[4].double() * sums[:, -1], sums[:, -1]
    rows = torch.arange(len(got), device="cuda")
    high = sums[rows, got]
    low = high - weight[rows, got]
    slack = 3e-5 * total
    right = kept[rows, got] & (low - slack <= goal) & (goal <= high + slack)
    return int((~right).sum())


def wrong_kernels() -> list[str]:
    """Names of kernels that differ from their reference."""
    found: list[str] = []

    def compare(name: str, want: Tensor, got: Tensor, bound: float = 8e-3) -> None:
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if not error <= bound:
            found.append(f"{name}: relative error {error:.1e}")

    for scale, dtype in itertools.product((0.05, 1.0, 4.0), (torch.bfloat16, torch.float32)):
        logits = (torch.randn((48, VOCAB), device="cuda") * scale).to(dtype)
        for name, knobs in CASES.items():
            args = columns(48, knobs)
            got = sample(logits, *args, greedy=False, truncates=name != "plain")
            if wrong := wrong_draws(logits, args, got):
                found.append(f"sample, {name}, {dtype}, scale {scale}: {wrong} of 48 rows")
        best = sample(logits, *args, greedy=True, truncates=False)
        if not torch.equal(best, logits.argmax(dim=-1)):
            found.append(f"sample, greedy, {dtype}, scale {scale}")
        compare("log_probs", log_probs_ref(logits, best), log_probs(logits, best), 1e-5)
    for n, k in [*SHAPES[:2], (1000, 1531)]:
        x, weight = weights(1, k), weights(n, k)
        compare(f"linear {n} {k}", linear_ref(x, weight), linear(x, weight))
    logits, args = torch.randn((8, VOCAB), device="cuda"), penalty_case(8, 700)
    want = penalize_ref(logits.clone(), args[0], *args[2:])
    compare("penalize", want, penalize(logits, *args), 1e-5)
    tokens, table, norm = step_case(37)[0], weights(VOCAB, HIDDEN), weights(1, HIDDEN)[0]
    tokens = tokens.abs()
    rows, _ = embed_rmsnorm_ref(tokens, table, norm, 1e-5)
    compare("embed_rmsnorm", rows, embed_rmsnorm(tokens, table, norm, 1e-5)[0])
    return found


def weights(rows: int, width: int) -> Tensor:
    return torch.randn((rows, width), device="cuda", dtype=torch.bfloat16) * 0.02


def penalty_case(num: int, length: int) -> list[Tensor]:
    """history, counts, and the columns of ``penalize``."""

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    history = torch.randint(VOCAB, (num, length), dtype=torch.int32, device="cuda")
    history[:, length // 2 :] %= 200
    order = ints(range(num))
    prompt_lens = ints([length // 2] * num)
    numbers = [torch.full((num,), x, device="cuda") for x in (0.5, 0.2, 1.1)]
    counts = penalty_counts(num, VOCAB, history.device)
    return [
        history, counts, order, order, ints([length] * num), prompt_lens, *numbers, order % 2,
    ]  # fmt: skip


def step_case(num: int) -> list[Tensor]:
    """tokens, lanes, positions, slots, last_token, table, history."""

    def column(top: int) -> Tensor:
        return torch.randint(top, (num,), dtype=torch.int32, device="cuda")

    lanes = torch.arange(num, dtype=torch.int32, device="cuda")
    last = torch.zeros(num, dtype=torch.int64, device="cuda")
    tables = [torch.zeros((num, 8192), dtype=torch.int32, device="cuda") for _ in "th"]
    return [column(VOCAB) - 1, lanes, column(8192), column(1 << 20), last, *tables]


def show(
    kernel: str, shape: str, us: float, moved: int, copy: float, torch_us: float | None = None
) -> None:
    """One row; ``moved``: bytes that have to be read and written once, ``copy``: TB/s of a copy."""
    rate = moved / us / 1e6
    theirs = "" if torch_us is None else f"torch {torch_us:9.1f} us"
    print(
        f"{kernel:14} {shape:20} {us:9.1f} us {rate:6.2f} TB/s {rate / copy:5.0%} of copy  {theirs}",
        flush=True,
    )


def bench_sampling(quick: bool, copy: float) -> None:
    for num in ROWS:
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.randn((num, VOCAB), device="cuda").to(dtype)
            shape = f"{num} {str(dtype)[6:]}"
            args = columns(num, CASES["plain"])
            greedy = partial(sample, logits, *args, greedy=True, truncates=False)
            theirs = partial(torch.argmax, logits, dim=-1)
            moved = logits.nbytes
            us = in_turn_us([greedy] * 8, quick)
            show("greedy", shape, us, moved, copy, in_turn_us([theirs] * 8, quick))
            for name, knobs in CASES.items():
                args = columns(num, knobs)
                cuts = name != "plain"
                mine = partial(sample, logits, *args, greedy=False, truncates=cuts)
                theirs = partial(sorted_sample if cuts else plain_sample, logits, args)
                us, other = in_turn_us([mine] * 4, quick), in_turn_us([theirs], quick)
                show(name, shape, us, moved, copy, other)
            tokens = logits.argmax(dim=-1)
            us = in_turn_us([partial(log_probs, logits, tokens)] * 4, quick)
            other = in_turn_us([partial(log_probs_ref, logits, tokens)], quick)
            show("log_probs", shape, us, moved, copy, other)


def bench_linear(quick: bool, copy: float) -> None:
    for n, k in SHAPES:
        stack = [weights(n, k) for _ in range(max(2, L2_BYTES // (2 * n * k) + 1))]
        x = weights(1, k)
        calls = [partial(linear, x, weight) for weight in stack]
        theirs = [partial(torch.nn.functional.linear, x, weight) for weight in stack]
        us, other = in_turn_us(calls, quick), in_turn_us(theirs, quick)
        show("linear", f"{n} x {k}", us, stack[0].nbytes, copy, other)


def bench_rest(quick: bool, copy: float) -> None:
    for num, length in ((1, 1000), (8, 8000), (64, 1000)):
        logits, args = torch.randn((num, VOCAB), device="cuda"), penalty_case(num, length)
        us = in_turn_us([partial(penalize, logits, *args)] * 4, quick)
        show("penalize", f"{num} x {length} tokens", us, num * length * 24, copy)
    logits = torch.randn((256, VOCAB), device="cuda")
    rows = torch.arange(1280, dtype=torch.int32, device="cuda") % 256
    values = torch.full((1280,), -1.0, device="cuda")
    us = in_turn_us([partial(add_bias, logits, rows, rows, values)] * 4, quick)
    show("add_bias", "1280 entries", us, 1280 * 20, copy)
    table, norm = weights(VOCAB, HIDDEN), weights(1, HIDDEN)[0]
    for num in (1, 256, 4096):
        case = step_case(num)
        us = in_turn_us([partial(stage, *case)] * 8, quick)
        show("stage", f"{num} tokens", us, num * 40, copy)
        tokens = case[0].clamp(min=0)
        us = in_turn_us([partial(embed_rmsnorm, tokens, table, norm, 1e-5)] * 8, quick)
        theirs = partial(embed_rmsnorm_ref, tokens, table, norm, 1e-5)
        other = in_turn_us([theirs] * 8, quick)
        show("embed_rmsnorm", f"{num} x {HIDDEN}", us, num * HIDDEN * 6, copy, other)


def tune() -> None:
    """Each row: configuration, then TB/s per weight shape."""
    choices = itertools.product((2, 4, 8, 16), (512, 1024, 2048), (2, 4, 8), (1, 3, 4))
    stacks = [[weights(n, k) for _ in range(L2_BYTES // (2 * n * k) + 1)] for n, k in SHAPES[:4]]
    results = []
    for choice in choices:
        config, rates = LinearConfig(*choice), []
        if not 2048 <= config.block_n * config.block_k <= 16384:
            continue
        try:
            for stack in stacks:
                x = weights(1, stack[0].shape[1])
                us = in_turn_us([partial(linear, x, w, config=config) for w in stack], True)
                rates.append(stack[0].nbytes / us / 1e6)
        except OutOfResources:
            continue
        results.append((sum(rates), choice, rates))
    for _, choice, rates in sorted(results, reverse=True)[:12]:
        print(f"{choice}: " + "  ".join(f"{r:.2f}" for r in rates), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--only", choices=("sampling", "linear", "rest"), help="one part")
    parser.add_argument("--tune", action="store_true", help="try linear configurations")
    options = parser.parse_args()
    if code := refuse(wrong_kernels):
        return code
    if options.tune:
        tune()
        return 0
    parts = {"sampling": bench_sampling, "linear": bench_linear, "rest": bench_rest}
    copy = measure_ceiling(options.quick).bytes_per_s / 1e12
    print(f"copy {copy:.2f} TB/s")
    for name, part in parts.items():
        if options.only in (None, name):
            part(options.quick, copy)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
