"""Constrains an output to a list of tokens (``allowed_token_ids``)."""

from __future__ import annotations

from asyncllm.constrain.protocol import Constraint


class AllowedTokens(Constraint):
    """The same tokens all the way."""

    def __init__(self, mask: bytes) -> None:
        self._mask = mask

    def mask(self) -> bytes:
        return self._mask

    def mask_is_stable_for(self, ahead: int) -> bool:
        return True

    def accept(self, token: int) -> bool:
        return False
