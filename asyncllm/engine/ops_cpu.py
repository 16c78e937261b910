"""The operators of a decoder on the CPU, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear, rms_norm, silu

from asyncllm.engine import experts_cpu, quant_torch
from asyncllm.engine.int4_cpu import TorchPackedOps
from asyncllm.models.ops import Activations, LocalExperts
from asyncllm.models.quantization import ROW_FORMS, QuantRows, QuantStack, QuantWeight, RowForm
from asyncllm.models.spec import Activation, ExpertsSpec

WIDENED_ROWS = 8192  # rows of the output matrix converted to float32 at a time


def stage(
    tokens: Tensor,
    token_lanes: Tensor,
    positions: Tensor,
    slots: Tensor,
    last_token: Tensor,
    table: Tensor,
    history: Tensor,
    sliding_table: Tensor | None = None,
    sliding_slots: Tensor | None = None,
) -> Tensor:
    """See :func:`asyncllm.kernels.embedding.stage`."""
    lanes = token_lanes.long()
    where = lanes * table.shape[1] + positions.long()
    table.view(-1).index_copy_(0, where, slots)
    if sliding_table is not None and sliding_slots is not None:
        sliding_table.view(-1).index_copy_(0, where, sliding_slots)
    given = tokens.long()
    tokens = torch.where(given < 0, last_token[lanes], given)
    history.view(-1).index_copy_(0, where, tokens.int())
    return tokens


class TorchOps:
    """Implements :class:`asyncllm.models.ops.Ops`."""

    packed = TorchPackedOps()

    def pack(self, weight: Tensor) -> Tensor:
        """oneDNN's packed layout for bfloat16: halves the time of products with few rows."""
        if weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        return packed

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        if weight.is_mkldnn:
            made = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        else:
            made = linear(x, weight, bias)
        return made if out is None else out.copy_(made)

    def pack_quant(self, weight: QuantWeight, dtype: torch.dtype) -> QuantWeight:
        return weight

    def row_form(self, weight: QuantWeight, num_rows: int) -> RowForm | None:
        return ROW_FORMS.get(weight.kind)

    def quant_linear(
        self,
        x: Activations,
        weight: QuantWeight,
        bias: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return quant_torch.quant_linear(x, weight, bias, out)

    def quant_bytes(self, weight: QuantWeight, num_rows: int, itemsize: int) -> int:
        return quant_torch.quant_bytes(weight, num_rows)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Accurate to 2**-16 where the weight is packed, by computing the product twice.

        oneDNN rounds its results to bfloat16, but subtracts before rounding; so a second product
        minus the first gives the first one's rounding error. Takes half the time of float32
        weights.
        """
        if weight.is_mkldnn:
            product = torch.ops.mkldnn._linear_pointwise
            rounded: Tensor = product(x, weight, None, "none", [], "")
            return rounded.float().add_(product.binary(x, rounded, weight, None, "sub"))
        if x.dtype == torch.float32:
            return linear(x, weight)
        x, out = x.float(), x.new_empty(len(x), len(weight), dtype=torch.float32)
        for first in range(0, len(weight), WIDENED_ROWS):
            part = slice(first, first + WIDENED_ROWS)
            out[:, part] = linear(x, weight[part].float())
        return out

    def embed_rmsnorm(
        self, tokens: Tensor, table: Tensor, weight: Tensor, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        residual = embedding(tokens, table)
        if scale != 1.0:
            residual.mul_(scale)
        return self.rmsnorm(residual, weight, eps), residual

    def rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # torch requires one dtype and accumulates in a wider one anyway
        return rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)

    def add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return self.rmsnorm(residual, weight, eps), residual

    def rmsnorm_rows(self, x: Tensor, weight: Tensor, eps: float, form: RowForm) -> QuantRows:
        return quant_torch.in_8_bits(self.rmsnorm(x, weight, eps), form)

    def add_rmsnorm_rows(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: RowForm
    ) -> tuple[QuantRows, Tensor]:
        normed, total = self.add_rmsnorm(x, residual, weight, eps)
        return quant_torch.in_8_bits(normed, form), total

    def qk_rmsnorm(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float
    ) -> None:
        heads = qkv.view(len(qkv), -1, len(q_weight))
        for weight, part in ((q_weight, heads[:, :num_q]), (k_weight, heads[:, num_q:][:, :num_k])):
            part.copy_(self.rmsnorm(part, weight, eps))

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        active = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
        return active.mul_(up)

    def gated_rows(self, x: Tensor, activation: Activation, form: RowForm) -> QuantRows:
        return quant_torch.in_8_bits(self.gated(x, activation), form)

    def pack_experts(self, held: LocalExperts, spec: ExpertsSpec, dtype: torch.dtype) -> None:
        if not isinstance(held.gate_up, QuantStack):
            held.gate_up = [self.pack(weight) for weight in held.gate_up]
        if not isinstance(held.down, QuantStack):
            held.down = [self.pack(weight) for weight in held.down]

    def route(
        self, logits: Tensor, bias: Tensor | None, spec: ExpertsSpec, live: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return experts_cpu.route(logits, bias, spec, live)

    def experts(
        self,
        x: Tensor,
        held: LocalExperts,
        routed: tuple[Tensor, Tensor],
        shared: tuple[Tensor, Tensor | None] | None,
        out: Tensor | None,
    ) -> Tensor:
        def mlp(expert: int, rows: Tensor) -> Tensor:
            inner = self.gated(self._of_expert(rows, held.gate_up[expert]), held.activation)
            return self._of_expert(inner, held.down[expert])

        total = torch.zeros(x.shape, dtype=torch.float32)
        experts_cpu.add_experts(total, mlp, x, routed, held.numbers)
        if shared is not None:
            made, gate = shared
            total += made if gate is None else made * gate.sigmoid()
        return total.to(x.dtype) if out is None else out.copy_(total)

    def _of_expert(self, x: Tensor, weight: Tensor | QuantWeight) -> Tensor:
        if isinstance(weight, QuantWeight):
            return self.quant_linear(x, weight)
        return self.linear(x, weight)

    def experts_bytes(self, spec: ExpertsSpec, hidden: int, inner: int, itemsize: int) -> int:
        return experts_cpu.work_bytes(spec, hidden, inner, itemsize)

    def experts_quant_bytes(
        self, held: LocalExperts, num_tokens: int, top_k: int, dtype: torch.dtype
    ) -> int:
        """Each expert by itself, which may get all tokens."""
        stacks = [each for each in (held.gate_up, held.down) if isinstance(each, QuantStack)]
        return max((quant_torch.quant_bytes(each[0], num_tokens) for each in stacks), default=0)
