"""Constrains the arguments of tool calls inside otherwise free text.

Owns where one output is: in text, or in a call, which a mark begins. Knows bytes and tokens; what a
call looks like after its mark is a :class:`CallGrammar`, made elsewhere.
"""

from __future__ import annotations

from typing import Protocol

from asyncllm.constrain.protocol import NO_PATH, Constraint, Path, ResampleToken
from asyncllm.constrain.reasoning import ReasoningConstraint
from asyncllm.constrain.vocabulary import every, passes, without


class CallGrammar(Constraint, Protocol):
    """A grammar of the text between a mark and the end of the arguments."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""

    def restart(self) -> None:
        """Return to the start, whose mask is known."""

    def begin(self, text: bytes) -> bool:
        """Advance by ``text``, and make the next mask. False: a call cannot begin with it."""


class ToolCallConstraint(Constraint):
    """A :class:`asyncllm.constrain.protocol.Constraint`.

    Text has no mask, and continues without waiting for tokens that are not known yet. So the token
    after a mark may have been sampled without the mask it needed: if it does not fit,
    :meth:`accept` raises ResampleToken.

    Args:
        mark: begins a call; UTF-8.
        form: what follows it.
        vocab_size: width of the logits.
        thinking: reasoning before the text, in which marks do not count; None: none.
    """

    def __init__(
        self,
        mark: bytes,
        form: CallGrammar,
        vocab_size: int,
        thinking: ReasoningConstraint | None = None,
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

    def mask_is_stable_for(self, ahead: int) -> bool:
        if ahead == 0:
            return True
        if self._calling or self._banned:
            return False
        return self._thinking is None or self._thinking.mask_is_stable_for(ahead)

    def mask(self) -> bytes:
        if self._calling:
            return self._form.mask()
        if self._banned:
            return without(every(self._vocab_size), self._banned)
        return b"" if self._thinking is None else self._thinking.mask()

    def accept(self, token: int) -> bool:
        if self._calling:
            if not passes(self._form.mask(), token):
                raise ResampleToken
            self._calling = not self._form.accept(token)
            return False
        piece = self._form.piece(token)
        before, found, rest = (self._text + piece).partition(self._mark)
        if found and not self._thinks():
            self._form.restart()
            if rest and not self._form.begin(rest):
                self._banned.add(token)
                raise ResampleToken
            self._calling, self._text = True, b""
        elif not found:
            self._text = before[1 - len(self._mark) :] if len(self._mark) > 1 else b""
        self._banned.clear()
        if self._thinking is not None:
            self._thinking.accept(token)
            if self._thinks():
                self._text = b""
        return False

    def look_ahead(self, guess: Path, most: int) -> None:
        if self._calling:
            self._form.look_ahead(guess, most)

    @property
    def path(self) -> Path:
        return self._form.path if self._calling else NO_PATH

    def _ends_mark(self, token: int) -> bool:
        return self._mark in self._text + self._form.piece(token) and not self._thinks()

    def _thinks(self) -> bool:
        return self._thinking is not None and self._thinking.inside
