"""Multiplies each head of selected tokens by a matrix of its own.

Used to absorb queries and to compute values from sums of latents; knows neither.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.autotune import num_sms


# step metadata lies anywhere in a staging buffer: one build for every alignment
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["state_ptr"])
def _heads_kernel(
    x_ptr,
    weight_ptr,
    state_ptr,
    out_ptr,
    num_tokens,
    x_row,
    x_head,
    weight_head,
    weight_k,
    weight_n,
    out_row,
    out_head,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1) // tl.cdiv(N, BLOCK_N)
    n = tl.program_id(1) % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    state = tl.load(state_ptr + token, mask=token < num_tokens, other=-1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if tl.max(state, axis=0) > 0:
        at = token.to(tl.int64)
        x_at = x_ptr + at[:, None] * x_row + head * x_head
        weight_at = weight_ptr + head * weight_head + n[None, :] * weight_n
        for begin in range(0, K, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x = tl.load(x_at + k[None, :], mask=(state > 0)[:, None] & (k < K)[None, :], other=0.0)
            inside = (k < K)[:, None] & (n < N)[None, :]
            weight = tl.load(weight_at + k[:, None] * weight_k, mask=inside, other=0.0)
            acc = tl.dot(x, weight, acc, input_precision="ieee")
    if tl.max(state, axis=0) >= 0:
        tl.store(
            out_ptr + token.to(tl.int64)[:, None] * out_row + head * out_head + n[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=(state >= 0)[:, None] & (n < N)[None, :],
        )


def heads(x: Tensor, weight: Tensor, state: Tensor, out: Tensor) -> Tensor:
    """``out[t, h] = x[t, h] @ weight[h]`` where ``state[t]`` is positive.

    Args:
        x: [num_tokens, num_heads, k]; the last dimension contiguous.
        weight: [num_heads, k, n], of any strides.
        state: [num_tokens] int32: positive: multiply; 0: the result is zero, and ``x`` may be
            undefined; negative: leave ``out`` as it is.
        out: [num_tokens, num_heads, n]; the last dimension contiguous.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``heads_ref``. Does not synchronise; safe in CUDA graphs.
    """
    num_tokens, num_heads, k = x.shape
    n = weight.shape[2]
    if weight.shape != (num_heads, k, n) or out.shape != (num_tokens, num_heads, n):
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, out do not fit")
    if state.shape != (num_tokens,) or state.dtype != torch.int32:
        raise ValueError(f"state {tuple(state.shape)} {state.dtype}: int32 of each token expected")
    if not x.dtype == weight.dtype == out.dtype:
        raise ValueError(f"dtypes: x {x.dtype}, weight {weight.dtype}, out {out.dtype}")
    if not 1 == x.stride(2) == out.stride(2):
        raise ValueError("the last dimensions of x and out must be contiguous")
    if num_tokens == 0:
        return out
    block_m = 16 if num_tokens <= 16 else 64
    blocks = triton.cdiv(num_tokens, block_m) * num_heads
    # narrow columns where there is not enough work for the device
    block_n = 128 if blocks * triton.cdiv(n, 128) >= num_sms(x.device) else 32
    block_n = max(16, min(block_n, triton.next_power_of_2(n)))
    block_k = max(16, min(64 if x.element_size() <= 2 else 32, triton.next_power_of_2(k)))
    _heads_kernel[(triton.cdiv(num_tokens, block_m), num_heads * triton.cdiv(n, block_n))](
        x,
        weight,
        state,
        out,
        num_tokens,
        x.stride(0),
        x.stride(1),
        weight.stride(0),
        weight.stride(1),
        weight.stride(2),
        out.stride(0),
        out.stride(1),
        K=k,
        N=n,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
    )
    return out


def heads_ref(x: Tensor, weight: Tensor, state: Tensor, out: Tensor) -> Tensor:
    """``heads`` in plain torch, fp32 throughout, rounded at the end."""
    made = torch.einsum("thk,hkn->thn", x.float(), weight.float())
    made = torch.where((state > 0)[:, None, None], made, 0.0).to(out.dtype)
    return out.copy_(torch.where((state >= 0)[:, None, None], made, out))
