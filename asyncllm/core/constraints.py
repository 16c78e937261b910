"""What restricts the tokens of one request: a grammar, a list of tokens, ...

Owns the rules that need no grammar; each is a :class:`asyncllm.core.request.Constraint`. Knows token
ids and their bytes; knows neither text formats nor tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from asyncllm.core.request import Constraint, SamplingParams
from asyncllm.errors import RequestError

ANY = b""  # the mask that any token passes


def unconstrained(kind: str, text: str) -> Constraint:
    """Makes no grammars. Raises RequestError."""
    raise RequestError("constrained output is off on this server (--output_constraint_mode)")


class Constraints:
    """Makes the constraint of each request.

    Args:
        vocab_size: width of the logits.
        eos_ids: tokens that end an output.
        grammar: a fresh constraint of a grammar (kind, text); raises RequestError.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_ids: Collection[int],
        grammar: Callable[[str, str], Constraint] = unconstrained,
    ) -> None:
        self._vocab_size, self._eos_ids, self._grammar = vocab_size, eos_ids, grammar

    def of(self, params: SamplingParams) -> Constraint | None:
        """A fresh constraint; None: any token may come. Raises RequestError."""
        if params.grammar is not None:
            return self._grammar(*params.grammar)
        if params.allowed_token_ids:
            ends = () if params.ignore_eos else self._eos_ids
            return Allowed(bits((*params.allowed_token_ids, *ends), self._vocab_size))
        return None


class Allowed:
    """The same tokens all the way."""

    def __init__(self, mask: bytes) -> None:
        self._mask = mask

    def mask(self) -> bytes:
        return self._mask

    def holds(self, ahead: int) -> bool:
        return True

    def accept(self, token: int) -> bool:
        return False


def bits(tokens: Collection[int], vocab_size: int) -> bytes:
    """The mask that ``tokens`` pass."""
    mask = bytearray(-(-vocab_size // 32) * 4)
    for token in tokens:
        if token < vocab_size:
            mask[token >> 3] |= 1 << (token & 7)
    return bytes(mask)
