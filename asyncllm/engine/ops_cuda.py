"""The operators of a decoder on a CUDA device, as Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncllm.engine import quant_cuda
from asyncllm.engine.quant_cuda import EIGHT_BITS
from asyncllm.kernels.embedding import embed_rmsnorm
from asyncllm.kernels.gated import gated
from asyncllm.kernels.linear import linear
from asyncllm.kernels.moe.experts import experts, prepare
from asyncllm.kernels.moe.route import route
from asyncllm.kernels.qk_rmsnorm import qk_rmsnorm
from asyncllm.kernels.quant.rows import gated_rows, rmsnorm_rows
from asyncllm.kernels.rmsnorm import add_rmsnorm, rmsnorm
from asyncllm.models.ops import Activations, LocalExperts
from asyncllm.models.quantization import QuantRows, QuantStack, QuantWeight, RowForm
from asyncllm.models.spec import Activation, ExpertsSpec

GEMV_OUT = 65536  # up to this many outputs our one-row kernel is faster than cuBLAS


class TritonOps:
    """Implements :class:`asyncllm.models.ops.Ops`."""

    packed = None

    def __init__(self) -> None:
        self._prepared: set[tuple[str, int, int, int, torch.dtype]] = set()

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if len(x) == 1 and len(weight) <= GEMV_OUT and x.element_size() == 2:
            return linear(x, weight, bias, out)
        if out is None:
            return torch.nn.functional.linear(x, weight, bias)
        torch.mm(x, weight.t(), out=out)
        return out if bias is None else out.add_(bias)

    def pack_quant(self, weight: QuantWeight, dtype: torch.dtype) -> QuantWeight:
        packed = quant_cuda.pack_quant(weight)
        shape = weight.kind, weight.out_features, weight.in_features, weight.group, dtype
        if shape not in self._prepared:
            self._prepared.add(shape)
            quant_cuda.prepare(packed, dtype)
        return packed

    def row_form(self, weight: QuantWeight, num_rows: int) -> RowForm | None:
        return quant_cuda.row_form(weight, num_rows)

    def quant_linear(
        self,
        x: Activations,
        weight: QuantWeight,
        bias: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return quant_cuda.quant_linear(x, weight, bias, out)

    def quant_bytes(self, weight: QuantWeight, num_rows: int, itemsize: int) -> int:
        return quant_cuda.quant_bytes(weight, num_rows, itemsize)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.mm(x, weight.t())
        if len(x) == 1 and len(weight) <= GEMV_OUT:
            return linear(x, weight, out=x.new_empty(1, len(weight), dtype=torch.float32))
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    def embed_rmsnorm(
        self, tokens: Tensor, table: Tensor, weight: Tensor, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        return embed_rmsnorm(tokens, table, weight, eps, scale)

    def rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rmsnorm(x, weight, eps)

    def add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rmsnorm(x, residual, weight, eps)

    def rmsnorm_rows(self, x: Tensor, weight: Tensor, eps: float, form: RowForm) -> QuantRows:
        made = rmsnorm_rows(x, weight, eps, EIGHT_BITS[form], blocked=form == "fp8_block")
        return QuantRows(form, *made, x.dtype)

    def add_rmsnorm_rows(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: RowForm
    ) -> tuple[QuantRows, Tensor]:
        kind, blocked = EIGHT_BITS[form], form == "fp8_block"
        made = rmsnorm_rows(x, weight, eps, kind, residual=residual, blocked=blocked)
        return QuantRows(form, *made, x.dtype), residual

    def qk_rmsnorm(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float
    ) -> None:
        qk_rmsnorm(qkv, q_weight, k_weight, num_q, num_k, eps)

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        return gated(x, activation)

    def gated_rows(self, x: Tensor, activation: Activation, form: RowForm) -> QuantRows:
        made = gated_rows(x, activation, EIGHT_BITS[form], blocked=form == "fp8_block")
        return QuantRows(form, *made, x.dtype)

    def pack_experts(self, held: LocalExperts, spec: ExpertsSpec, dtype: torch.dtype) -> None:
        stacks, scales = _stacks(held)
        prepare(*stacks, scales, held.numbers, spec.top_k, held.activation, dtype)

    def route(
        self, logits: Tensor, bias: Tensor | None, spec: ExpertsSpec, live: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return route(
            logits,
            spec.top_k,
            sigmoid=spec.scoring == "sigmoid",
            bias=bias,
            live=live,
            groups=spec.groups,
            top_groups=spec.top_groups,
            top2=spec.group_score == "top2",
            renormalise=spec.renormalise,
            scale=spec.scale,
        )

    def experts(
        self,
        x: Tensor,
        held: LocalExperts,
        routed: tuple[Tensor, Tensor],
        shared: tuple[Tensor, Tensor | None] | None,
        out: Tensor | None,
    ) -> Tensor:
        added, gate = (None, None) if shared is None else shared
        stacks, scales = _stacks(held)
        return experts(
            x,
            *stacks,
            *routed,
            scales=scales,
            held=held.numbers,
            num_experts=held.num_experts,
            activation=held.activation,
            shared=added,
            shared_gate=gate,
            out=out,
        )

    def experts_bytes(self, spec: ExpertsSpec, hidden: int, inner: int, itemsize: int) -> int:
        # logits, choice and weights; each pair's row between and after the products
        return 4 * spec.num_experts + spec.top_k * (20 + itemsize * (inner + hidden))

    def experts_quant_bytes(
        self, held: LocalExperts, num_tokens: int, top_k: int, dtype: torch.dtype
    ) -> int:
        """Tokens in 8 bits, and then what the first product makes of each pair."""
        rows = ((held.gate_up, num_tokens), (held.down, num_tokens * top_k))
        found = (
            quant_cuda.quant_bytes(stack[0], num_rows, dtype.itemsize)
            for stack, num_rows in rows
            if isinstance(stack, QuantStack)
        )
        return max(found, default=0)


def _stacks(
    held: LocalExperts,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Matrices of both products, and their scales."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for stack in (held.gate_up, held.down):
        assert not isinstance(stack, list)
        if isinstance(stack, Tensor):
            found.append((stack, None))
        else:
            found.append((stack.data, stack.scales))
    (gate_up, gate_up_scales), (down, down_scales) = found
    return (gate_up, down), (gate_up_scales, down_scales)
