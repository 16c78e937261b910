"""Interfaces of operators, linear layers and a rank's groups, which models are run with.

The engine implements them for CPU (torch) and CUDA (Triton).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from asyncllm.models.quantization import QuantRows, QuantStack, QuantWeight, RowForm
from asyncllm.models.spec import Activation, ExpertsSpec
from asyncllm.models.weights import AnyTarget

if TYPE_CHECKING:
    from asyncllm.models.gguf_packed import PackedMatrix

Activations = Tensor | QuantRows  # [T, width]
Stack = Tensor | list[Tensor] | QuantStack  # the same matrix of all of a rank's experts


@dataclass
class LocalExperts:
    """The experts of a rank.

    Attributes:
        numbers: their numbers among the layer's experts.
        gate_up: [E, 2 * I, hidden], the first rows are used.
        down: [E, hidden, I].
    """

    numbers: range
    num_experts: int
    gate_up: Stack
    down: Stack
    activation: Activation


class PackedOps(Protocol):
    """Operators on matrices of GGUF files in their own formats."""

    def pack(self, matrix: PackedMatrix) -> None:
        """Convert it to the layout that the others read; start-up only."""

    def linear(
        self, x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x @ matrix.T + bias."""

    def linear_bytes(self, matrix: PackedMatrix, num_rows: int, itemsize: int) -> int:
        """Of work space of :meth:`linear` beside x and the result, at most; ``itemsize``: of the
        dtype of x."""

    def rows(self, tokens: Tensor, matrix: PackedMatrix) -> Tensor:
        """Rows of the matrix, [num_tokens, columns]."""

    def logits(self, x: Tensor, matrix: PackedMatrix) -> Tensor:
        """x @ matrix.T as float32, never rounded to the dtype of x."""


class Ops(Protocol):
    """The operators that a decoder uses, on one device.

    Attributes:
        packed: None: matrices of GGUF files are dequantised on this device.
    """

    @property
    def packed(self) -> PackedOps | None: ...

    def pack(self, weight: Tensor) -> Tensor:
        """``weight`` [out, in] in the form that :meth:`linear` reads fastest; start-up only."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """x @ weight.T + bias."""

    def pack_quant(self, weight: QuantWeight, dtype: torch.dtype) -> QuantWeight:
        """``weight``, as its docstring has it, in the form that :meth:`quant_linear` reads fastest;
        prepares what products with activations of ``dtype`` take. Start-up only."""

    def row_form(self, weight: QuantWeight, num_rows: int) -> RowForm | None:
        """In which form :meth:`quant_linear` best reads so many rows, if what makes them can give
        it; None: as they are, which it reads in any case."""

    def quant_linear(
        self,
        x: Activations,
        weight: QuantWeight,
        bias: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [T, in] times the matrix, plus ``bias``, in the dtype of x: [T, out]. Rows in the form
        of the weight's kind give what those that they are made of give."""

    def quant_bytes(self, weight: QuantWeight, num_rows: int, itemsize: int) -> int:
        """Of work space of :meth:`quant_linear` beside x and the result, at most; ``itemsize``: of
        the dtype of x."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x @ weight.T as float32, never rounded to the dtype of the two."""

    def embed_rmsnorm(
        self, tokens: Tensor, table: Tensor, weight: Tensor, eps: float, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(norm of the embeddings times ``scale``, the embeddings), [num_tokens, hidden] each."""

    def rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Norm of each row, rounded to the weight's dtype, times the weight, in the dtype of x."""

    def add_rmsnorm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm(residual + x), residual + x)."""

    def rmsnorm_rows(self, x: Tensor, weight: Tensor, eps: float, form: RowForm) -> QuantRows:
        """:meth:`rmsnorm` in 8 bits."""

    def add_rmsnorm_rows(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: RowForm
    ) -> tuple[QuantRows, Tensor]:
        """:meth:`add_rmsnorm`, the norm in 8 bits."""

    def qk_rmsnorm(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, num_q: int, num_k: int, eps: float
    ) -> None:
        """The norm of each of the ``num_q`` heads of q and ``num_k`` of k, in place."""

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """[T, 2 * I] -> [T, I]: ``activation`` of the first half times the second."""

    def gated_rows(self, x: Tensor, activation: Activation, form: RowForm) -> QuantRows:
        """:meth:`gated` in 8 bits."""

    def pack_experts(self, held: LocalExperts, spec: ExpertsSpec, dtype: torch.dtype) -> None:
        """Bring ``held`` into the form that :meth:`experts` reads fastest, and prepare what
        running them with tokens of ``dtype`` takes; start-up only."""

    def route(
        self, logits: Tensor, bias: Tensor | None, spec: ExpertsSpec, live: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """float32 logits [T, num_experts] -> the experts [T, top_k] int32 of each token and their
        weights, float32; where ``live`` [T] int32 is 0, experts are -1, which nobody has."""

    def experts(
        self,
        x: Tensor,
        held: LocalExperts,
        routed: tuple[Tensor, Tensor],
        shared: tuple[Tensor, Tensor | None] | None,
        out: Tensor | None,
    ) -> Tensor:
        """Each token's weighted sum over its experts: [T, hidden].

        Args:
            held: experts of this rank; others add nothing.
            routed: what :meth:`route` gives.
            shared: added to the sum: [T, hidden], and the logits [T, 1] float32 whose sigmoid
                multiplies it.
        """

    def experts_bytes(self, spec: ExpertsSpec, hidden: int, inner: int, itemsize: int) -> int:
        """Of work space per token of :meth:`route` and :meth:`experts`, at most; ``inner`` is what
        this rank has of an expert."""

    def experts_quant_bytes(
        self, held: LocalExperts, num_tokens: int, top_k: int, dtype: torch.dtype
    ) -> int:
        """Of work space of :meth:`experts` for weights in 8 bits, beside that, at most; ``dtype``:
        of the tokens."""


class Product(Protocol):
    """Computes this rank's part of a sum over ranks."""

    def __call__(self, x: Activations, out: Tensor | None = None) -> Tensor:
        """[n, in] -> [n, out]."""


class Linear(Product, Protocol):
    """x @ weight.T + bias, whatever the weight is made of. Sharded by inputs, a call gives this
    rank's part of a sum. Any linear takes rows as they are."""

    def row_form(self, num_rows: int) -> RowForm | None:
        """In which form it best reads so many rows, and takes them; None: as they are."""

    def work_bytes(self, num_rows: int) -> int:
        """Of work space beside its input and its result, at most."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on this rank."""

    def targets(self, prefix: str) -> Iterator[tuple[str, AnyTarget]]:
        """Checkpoint name -> where its values go; names begin with ``prefix``."""

    def pack(self) -> None:
        """Repack the loaded weight into the operators' preferred layout."""


class Comm(Protocol):
    """The tensor-parallel group of a rank."""

    rank: int
    size: int

    def linear_reduce(self, linear: Product, x: Activations) -> Tensor:
        """``linear(x)`` summed over ranks; valid until the call after the next one."""

    def gather_last(self, x: Tensor) -> Tensor:
        """[n, v] of each rank -> [n, size * v], ranks side by side."""


class World(Protocol):
    """All ranks that share the experts of a model: those of all groups.

    Each group attends to its own tokens; the experts see those of all groups, equally many of each.
    With one group it is the group itself.
    """

    rank: int
    size: int

    def gather_tokens(self, x: Tensor) -> Tensor:
        """[n, h] of each group -> [groups * n, h], group by group."""

    def gather_flags(self, x: Tensor) -> Tensor:
        """[n] int32 of each group -> [groups * n], group by group."""

    def sum_tokens(self, product: Product, x: Tensor) -> Tensor:
        """``product(x)`` [groups * n, h] summed over all ranks -> this group's [n, h]; valid until
        the call after the next one."""
