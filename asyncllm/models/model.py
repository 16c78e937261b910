"""The model interface that the engine uses, and the context in which a rank's model is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from asyncllm.models.attention import AttentionBackend, Batch, LayerKv
from asyncllm.models.ops import Comm, Ops, World
from asyncllm.models.quantization import Quantisation
from asyncllm.models.weights import AnyTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContext:
    """Where a model runs: its rank, device and operators.

    Attributes:
        comm: the rank's tensor-parallel group, which splits everything except experts.
        world: the ranks that split experts: the same, except with several groups in lockstep.
        whole_experts: each of these ranks has whole experts rather than a slice of each.
        device: of the parameters; ``meta`` only to measure its size.
        quantisation: which linear layers are quantised.
        path: prefix of the checkpoint's names of the part being built.
    """

    comm: Comm
    world: World
    whole_experts: bool
    ops: Ops
    attention: AttentionBackend
    dtype: torch.dtype
    device: torch.device
    quantisation: Quantisation = field(default_factory=Quantisation)
    path: str = ""

    def below(self, path: str) -> ModelContext:
        """The site of a sub-part, with ``path`` appended to the prefix."""
        return replace(self, path=f"{self.path}{path}")

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate a parameter; zeroed if it may be filled only in part (padding), or if steps may
        run while it is being read (CUDA)."""
        padded = max(self.comm.size, self.world.size) > 1
        make = torch.zeros if padded or self.device.type == "cuda" else torch.empty
        return make(*shape, dtype=dtype or self.dtype, device=self.device)


class Model(Protocol):
    """A decoder, or one tensor-parallel share of it."""

    site: ModelContext
    vocab_size: int
    hidden_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""

    def work_bytes(self, num_tokens: int) -> int:
        """Upper bound of a step's bytes besides parameters, K/V and logits."""

    def targets(self) -> Iterator[tuple[str, AnyTarget]]:
        """Checkpoint name -> where its values go on this rank."""

    def ignores(self, name: str) -> bool:
        """True for checkpoint tensors that are not parameters here."""

    def pack(self) -> None:
        """Repack weights into the operators' preferred layout."""

    def forward(self, batch: Batch, kv: Sequence[LayerKv]) -> Tensor:
        """Hidden states [num_tokens, hidden] after the last norm; K/V are written to ``kv``."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocab_size] float32, gathered over the ranks."""
