"""Calls whose arguments must fit a schema, among text that may be anything.

Owns where one output is: in text, or in a call, which a mark begins. Knows bytes and tokens; what a
call looks like behind its mark is a :class:`Form`, made elsewhere.
"""

from __future__ import annotations

from typing import Protocol

from asyncllm.core.request import Again, Constraint
from asyncllm.core.thinking import Thinking
from asyncllm.core.vocabulary import every, passes, without


class Form(Constraint, Protocol):
    """What follows a mark, up to the end of the arguments."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""

    def restart(self) -> None:
        """Back to the beginning, whose mask is made."""

    def begin(self, text: bytes) -> bool:
        """Go on by ``text``, and make the next mask. False: it cannot begin like that."""


class Calls(Constraint):
    """A :class:`asyncllm.core.request.Constraint`.

    Text has no mask, and goes on without waiting for tokens that are not known yet. So the token
    behind a mark may have been sampled without the mask it needed: if it does not fit,
    :meth:`accept` raises Again.

    Args:
        mark: begins a call; UTF-8.
        form: what follows it.
        vocab_size: width of the logits.
        thinking: reasoning before the text, where marks begin nothing; None: there is none.
    """

    def __init__(
        self,
        mark: bytes,
        form: Form,
        vocab_size: int,
        thinking: Thinking | None = None,
    ) -> None:
        self._mark, self._form = mark, form
        self._vocab_size, self._thinking = vocab_size, thinking
        self._calling = False
        self._text = b""  # the end of the text, as far as a mark may begin in it
        self._banned: set[int] = set()  # tokens that were refused here

    def slow(self, token: int | None) -> bool:
        if token is None:
            return False
        return self._form.slow(token) if self._calling else self._ends_mark(token)

    def holds(self, ahead: int) -> bool:
        if ahead == 0:
            return True
        if self._calling or self._banned:
            return False
        return self._thinking is None or self._thinking.holds(ahead)

    def mask(self) -> bytes:
        if self._calling:
            return self._form.mask()
        if self._banned:
            return without(every(self._vocab_size), self._banned)
        return b"" if self._thinking is None else self._thinking.mask()

    def accept(self, token: int) -> bool:
        if self._calling:
            if not passes(self._form.mask(), token):
                raise Again
            self._calling = not self._form.accept(token)
            return False
        piece = self._form.piece(token)
        before, found, rest = (self._text + piece).partition(self._mark)
        if found and not self._thinks():
            self._form.restart()
            if rest and not self._form.begin(rest):
                self._banned.add(token)
                raise Again
            self._calling, self._text = True, b""
        elif not found:
            self._text = before[1 - len(self._mark) :] if len(self._mark) > 1 else b""
        self._banned.clear()
        if self._thinking is not None:
            self._thinking.accept(token)
            if self._thinks():
                self._text = b""
        return False

    def _ends_mark(self, token: int) -> bool:
        return self._mark in self._text + self._form.piece(token) and not self._thinks()

    def _thinks(self) -> bool:
        return self._thinking is not None and self._thinking.inside
