"""The embedding and the output matrix, which may be tied: replicated, and split by vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from asyncllm.models.gguf_packed import PackedMatrix, PackedTarget
from asyncllm.models.linear import share
from asyncllm.models.model import ModelContext
from asyncllm.models.spec import ModelSpec
from asyncllm.models.weights import AnyTarget, Target


class Embedding:
    """Maps ids to the first residual stream, and normed hidden states to logits.

    The embedding is replicated; the output matrix is split by vocabulary, as a view of the
    embedding if the two are tied. For a GGUF file either may stay in its own format.
    """

    def __init__(self, site: ModelContext, spec: ModelSpec) -> None:
        self._site, self._spec = site, spec
        local = -(-spec.vocab_size // site.comm.size)
        types = site.quantisation.gguf if site.quantisation.asked.type is None else {}
        self._names = f"{spec.prefix}embed_tokens.weight", f"{spec.head}.weight"
        if spec.tie_embeddings:
            self._names = (self._names[0],) * 2
        kinds = [types.get(name) for name in self._names]
        self._one = spec.tie_embeddings and (kinds[0] is None or site.comm.size == 1)
        shape = local * site.comm.size, spec.hidden_size
        self.table: Tensor | PackedMatrix = self._make(shape, kinds[0], self._one)
        self.head: Tensor | PackedMatrix = self.table
        if not self._one:
            self.head = self._make((local, spec.hidden_size), kinds[1], True)
        elif isinstance(self.table, Tensor):
            self.head = self.table.narrow(0, site.comm.rank * local, local)
        # rounded like the embeddings
        self._scale = float(torch.tensor(spec.embed_scale, dtype=site.dtype))

    def _make(self, shape: tuple[int, int], kind: str | None, spare: bool) -> Tensor | PackedMatrix:
        if kind is None:
            return self._site.empty(*shape)
        return PackedMatrix(self._site, shape, kind, spare=spare)

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + (0 if self._one else self.head.nbytes)

    def targets(self) -> Iterator[tuple[str, AnyTarget]]:
        vocab = self._spec.vocab_size
        yield self._names[0], _target(self.table, vocab, (0, 0, vocab))
        if not self._one:
            yield self._names[1], _target(self.head, vocab, share(vocab, self._site))

    def pack(self) -> None:
        packed = self._site.ops.packed
        if isinstance(self.head, Tensor):
            self.head = self._site.ops.pack(self.head)
        for matrix in {id(each): each for each in (self.table, self.head)}.values():
            if isinstance(matrix, PackedMatrix):
                assert packed is not None
                packed.pack(matrix)

    def embed(self, tokens: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the embeddings, the embeddings), [num_tokens, hidden] each."""
        ops, eps = self._site.ops, self._spec.rms_eps
        if isinstance(self.table, Tensor):
            return ops.embed_rmsnorm(tokens, self.table, norm, eps, self._scale)
        assert ops.packed is not None
        residual = ops.packed.rows(tokens, self.table).mul_(self._scale)
        return ops.rmsnorm(residual, norm, eps), residual

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of this rank's part of the vocabulary, float32."""
        if isinstance(self.head, Tensor):
            return self._site.ops.logits(hidden, self.head)
        assert self._site.ops.packed is not None
        return self._site.ops.packed.logits(hidden, self.head)


def _target(matrix: Tensor | PackedMatrix, size: int, span: tuple[int, int, int]) -> AnyTarget:
    if isinstance(matrix, Tensor):
        return Target(matrix, 0, size, (span,))
    return PackedTarget(matrix, 0, size, (span,))
