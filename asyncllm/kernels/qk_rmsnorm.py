"""RMS norm of each head of q and of k in a packed qkv row, before the rotation.

Owns the in-place norm of heads; does not know how they are used.
"""

# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyncllm.kernels.autotune import launches_early
from asyncllm.kernels.early import begun, launched_early
from asyncllm.kernels.rmsnorm import rmsnorm_ref


@triton.jit
def _qk_rmsnorm_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    qkv_stride,
    eps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    begun(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, DIM_PAD)
    dim_live = dim < DIM
    live = (head < Q_HEADS + K_HEADS)[:, None] & dim_live[None, :]
    ptr = qkv_ptr + token * qkv_stride + head[:, None] * DIM + dim[None, :]
    x = tl.load(ptr, mask=live, other=0.0)
    q_weight = tl.load(q_weight_ptr + dim, mask=dim_live, other=0.0)
    k_weight = tl.load(k_weight_ptr + dim, mask=dim_live, other=0.0)
    weight = tl.where((head < Q_HEADS)[:, None], q_weight[None, :], k_weight[None, :])
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / DIM + eps)
    normed = (wide * scale[:, None]).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(ptr, normed.to(x.dtype), mask=live)


def qk_rmsnorm(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float
) -> None:
    """Normalise each head of q and k in place.

    Args:
        qkv: [num_tokens, (num_q + num_k + ...) * head_dim], rows [q | k | ...], of which what
            comes behind k is left alone; rows may be strided.
        q_weight, k_weight: [head_dim], both in the dtype of qkv or both float32; they multiply
            as in ``rmsnorm``.
        num_q, num_k: heads of q and of k in a row.
        eps: added to the mean square.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.

    Reference: ``qk_rmsnorm_ref``. Does not synchronise; safe in CUDA graphs.
    """
    dim = len(q_weight)
    for weight in (q_weight, k_weight):
        fits = weight.dtype in {qkv.dtype, torch.float32} and weight.is_contiguous()
        if weight.shape != (dim,) or weight.dtype != q_weight.dtype or not fits:
            raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit")
    if qkv.dim() != 2 or qkv.stride(1) != 1 or qkv.shape[1] < (num_q + num_k) * dim:
        raise ValueError(f"qkv {tuple(qkv.shape)}: rows of {num_q + num_k} heads of {dim} expected")
    if not len(qkv):
        return
    dim_pad = triton.next_power_of_2(dim)
    heads = max(1, min(2048 // dim_pad, triton.next_power_of_2(num_q + num_k)))
    early = launches_early(qkv.device, "norm of heads")
    _qk_rmsnorm_kernel[(len(qkv), triton.cdiv(num_q + num_k, heads))](
        qkv,
        q_weight,
        k_weight,
        qkv.stride(0),
        eps,
        Q_HEADS=num_q,
        K_HEADS=num_k,
        DIM=dim,
        DIM_PAD=dim_pad,
        HEADS=heads,
        EARLY=early,
        num_warps=4,
        **launched_early(early, qkv),
    )


def qk_rmsnorm_ref(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float
) -> None:
    """``qk_rmsnorm`` in plain torch; same in-place effects."""
    heads = qkv.unflatten(1, (-1, len(q_weight)))
    for weight, part in ((q_weight, heads[:, :num_q]), (k_weight, heads[:, num_q : num_q + num_k])):
        part.copy_(rmsnorm_ref(part, weight, eps))
