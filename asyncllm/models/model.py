"""What the engine needs of a model, and what a model of one rank is made with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from asyncllm.models.attention import AttentionBackend, Batch, LayerKv
from asyncllm.models.ops import Comm, Ops, World
from asyncllm.models.weights import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a model is put: its rank, and what computes there.

    Attributes:
        comm: the rank's tensor-parallel group, which cuts everything but experts.
        world: what cuts experts: the same, but for several groups that step together.
        whole_experts: of which each has some experts, not a slice of every one.
        device: of the parameters; ``meta`` for a model that only shows what it would take.
    """

    comm: Comm
    world: World
    whole_experts: bool
    ops: Ops
    attention: AttentionBackend
    dtype: torch.dtype
    device: torch.device

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter; zero where heads or slices may be padding (filled only in part)."""
        make = torch.zeros if max(self.comm.size, self.world.size) > 1 else torch.empty
        return make(*shape, dtype=dtype or self.dtype, device=self.device)


class Model(Protocol):
    """A decoder, or one tensor-parallel share of it."""

    site: Site
    vocab_size: int
    hidden_size: int

    @property
    def nbytes(self) -> int:
        """Of its parameters."""

    def work_bytes(self, num_tokens: int) -> int:
        """At most, of what a step of ``num_tokens`` needs besides parameters, K/V and logits."""

    def targets(self) -> Iterator[tuple[str, Target]]:
        """Checkpoint name -> where its values go on this rank."""

    def ignores(self, name: str) -> bool:
        """True for checkpoint tensors that are not parameters here."""

    def pack(self) -> None:
        """Let the operators lay out the loaded weights as they like them best."""

    def forward(self, batch: Batch, kv: Sequence[LayerKv]) -> Tensor:
        """Hidden states [num_tokens, hidden] after the last norm; K/V are written to ``kv``."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab_size] float32, gathered over the ranks."""
