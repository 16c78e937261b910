"""What the kernel tests share: cases of cached K/V, comparison, and the calls a GPU must allow."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from asyncllm.kernels.attention.quantize import quantize_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter computes bf16 wrongly
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
HALVES = DTYPES[1:]
# of tests with many shapes: on a GPU what is served there
HERE = [torch.bfloat16] if DEVICE == "cuda" else DTYPES
RATIO = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_close(name: str, want: Tensor, got: Tensor, ratio: float | None = None) -> None:
    """Relative RMS error within ``ratio`` (default by dtype); NaN never passes."""
    assert want.shape == got.shape, f"{name}: {tuple(got.shape)}, wanted {tuple(want.shape)}"
    assert want.dtype == got.dtype, f"{name}: {got.dtype}, wanted {want.dtype}"
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9)).item()
    bound = RATIO[want.dtype] if ratio is None else ratio
    assert error <= bound, f"{name}: relative error {error:.2e} over {bound:.0e}"


@contextmanager
def no_sync() -> Iterator[None]:
    """Fails where the code inside waits for the GPU; nothing to watch without one."""
    if DEVICE != "cuda":
        yield
        return
    _watch_syncs("error")
    try:
        yield
    finally:
        _watch_syncs("default")


def _watch_syncs(mode: str) -> None:
    with warnings.catch_warnings():  # it says once that it does not see everything
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def replayed(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> None:
    """Runs ``call`` once, captures it in a CUDA graph, runs ``before`` and replays the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    before()
    graph.replay()
    torch.cuda.synchronize()


# what K and V are in, and the channels of a scale
EIGHT_BITS = [(torch.int8, None), (torch.int8, 8), (torch.float8_e4m3fn, None)]


def in_8_bits(case: dict[str, Tensor], kind: torch.dtype, group: int | None) -> dict[str, Tensor]:
    """The case with its caches in 8 bits; slots that belong to nobody have scales, and where they
    can values, that are NaN."""
    pair = torch.stack((case["k_cache"], case["v_cache"]), 2)
    nobody = pair.isnan()
    values, scales = quantize_ref(pair.nan_to_num(), kind, group)
    if kind == torch.float8_e4m3fn:
        values = values.view(torch.uint8).masked_fill(nobody, 0x7F).view(kind)
    scales[nobody.all(-1)] = float("nan")
    k, v = (values.view(torch.uint8)[:, :, i].contiguous().view(kind) for i in (0, 1))
    return {**case, "k_cache": k, "v_cache": v, "scales": scales}


def make_cache(
    lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype, spare: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """K/V of ``len(lengths)`` lanes in shuffled slots; everything that is not theirs is NaN or
    points far outside.

    Returns:
        k_cache, v_cache [num_slots + 1, kv_heads, dim], table [num_lanes + 1, max_len] and lanes
        [num_lanes] int32 (lanes in shuffled order).
    """
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    slots = torch.randperm(total + spare, generator=generator)[:total]
    order = torch.randperm(len(lengths) + 1, generator=generator)[: len(lengths)]
    caches = []
    for seed in (1, 2):
        cache = torch.full((total + spare + 1, kv_heads, dim), float("nan"), dtype=dtype)
        cache[slots] = randn(total, kv_heads, dim, dtype=dtype, seed=seed).cpu()
        caches.append(cache.to(DEVICE))
    table = torch.full((len(lengths) + 1, max(lengths, default=0) + 5), 0x3F3F3F3F)
    begin = 0
    for lane, length in zip(order.tolist(), lengths, strict=True):
        table[lane, :length] = slots[begin : begin + length]
        begin += length
    return (*caches, table.int().to(DEVICE), order.int().to(DEVICE))
