"""Finds tool calls in a model's output, incrementally: what all formats share.

Owns content and its white space, numbering, ids, and the treatment of malformed and cut calls. A
format is a subclass that reads one block of calls; it need not care how the text is cut.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from asyncllm.api.parsing.events import (
    Arguments,
    Call,
    CallEnd,
    CallStart,
    Content,
    Event,
    Tool,
)
from asyncllm.api.parsing.json_stream import loads, object_text, read_string, read_value
from asyncllm.api.parsing.scanner import SPACE, IncrementalParser, Literals, Run

NewId = Callable[[], str]  # 24 hex digits
MAX_NAME: Final = 256
_ARGUMENTS: Final = ("arguments", "parameters")
_BARE_KEYS: Final = frozenset({"name", "type", "id", *_ARGUMENTS})


def new_id() -> str:
    """24 random hex digits."""
    return secrets.token_hex(12)


def is_name(text: str) -> bool:
    """Whether a function may have this name."""
    return 0 < len(text) <= MAX_NAME and text.isprintable()


class ToolParser(IncrementalParser[Event]):
    """Content and calls of one answer.

    ``push(text)`` and ``finish()`` give events. Joined, they are the same wherever the text is cut:
    Content is the text for the user, Arguments between CallStart and CallEnd are a call's.

    Args:
        tools: what may be called.
        make_id: 24 hex digits for each call's id.
    """

    marks: ClassVar[Literals]  # each may begin a block of calls
    # those that any JSON has: what is read of it in vain is text, and no part of it is read again
    bare: ClassVar[tuple[str, ...]] = ()
    tokens: ClassVar[tuple[str, ...]] = ()  # marks that may be special tokens of a model
    # what may still follow the last arguments of a block, without white space
    tails: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Sequence[Tool], make_id: NewId = new_id) -> None:
        super().__init__()
        self.tools = {tool.name: tool for tool in tools}
        self.calls: list[Call] = []
        self._make_id = make_id
        self._open: Call | None = None
        self._pieces: list[str] = []  # of its arguments
        self._pending: list[str] = []  # those not in an event yet
        self._space = ""  # white space that ends the content so far
        self._kept = ""  # white space before calls, content if more follows
        self._said = False  # there is visible content
        self._beside = False  # nothing visible since the last call

    # -- what a format does ----------------------------------------------------------------------

    def _block(self, mark: str) -> Run[bool]:
        """Read one block of calls after its ``mark``.

        Returns False, at any point, if this is not a block of calls or stops being one. Text since
        the last call is then content; a call that is open is broken.
        """
        raise NotImplementedError

    def _id_of(self, name: str, given: str) -> str:
        """The id of a new call; ``given`` is what the model wrote for one."""
        return f"call_{self._make_id()}"

    # -- for formats -----------------------------------------------------------------------------

    def _begin(self, name: str, given: str = "") -> None:
        """Start a call; the text since the last one cannot become content any more."""
        assert self._open is None
        self._drop_space()
        call = Call(len(self.calls), self._id_of(name, given), name)
        self.calls.append(call)
        self._open = call
        self._scan.release()
        self._found.append(CallStart(call.index, call.id, name))

    def _more(self, arguments: str) -> None:
        """More of the open call's arguments."""
        if arguments:
            self._pieces.append(arguments)
            self._pending.append(arguments)

    def _end(self, complete: bool = True) -> None:
        """End the arguments of the open call."""
        call = self._open
        assert call is not None
        self._settle()
        call.arguments, call.complete = "".join(self._pieces), complete
        self._pieces.clear()
        self._open = None
        self._found.append(CallEnd(call.index, complete))
        self._absorb()

    def _absorb(self) -> None:
        """Count the text since the last call as its own."""
        self.calls[-1].text += self._scan.passed()
        self._scan.mark()

    def _ended(self, mark: str, k: int | None = None) -> Run[bool]:
        """Pass the end mark of a call, at ``k`` or behind white space; text may follow without."""
        s = self._scan
        passed = s.accept_next(mark) if k is None else s.accept(mark, k=k)
        if not (yield from passed):
            return not s.starved
        self._absorb()
        return True

    def _name(self, marks: Literals, limit: int = MAX_NAME) -> Run[str]:
        """Pass a name, up to a mark; "": this is none."""
        name = ((yield from self._scan.until(marks, limit)) or "").strip()
        return name if is_name(name) else ""

    def _whole(self, name: str, given: str = "") -> Run[bool]:
        """A call of which only the arguments, a JSON value, are still missing."""
        if (yield from self._scan.at()) == "{":
            self._begin(name, given)
            if not (yield from read_value(self._scan, self._more)):
                return False
            self._end()
            return True
        pieces: list[str] = []
        ok = yield from read_value(self._scan, pieces.append)
        text = object_text("".join(pieces)) if ok else None
        if text is None:
            return False
        self._begin(name, given)
        self._more(text)
        self._end()
        return True

    def _object(self, *, bare: bool = False) -> Run[bool]:
        """A call as one JSON object with "name" and "arguments" or "parameters".

        With ``bare``, where nothing but the object itself says that it is a call, the name must be
        a tool's, and there must be arguments and no other keys.
        """
        s = self._scan
        name, early, done = "", "", False
        if not (yield from s.accept("{")):
            return False
        while True:
            yield from s.spaces()
            key = yield from self._string()
            yield from s.spaces()
            if key is None or not (yield from s.accept(":")):
                return False
            yield from s.spaces()
            if bare and not done and key not in _BARE_KEYS:
                return False
            if key == "name" and not name:
                name = (yield from self._string()) or ""
                if not is_name(name) or (bare and name not in self.tools):
                    return False
            elif key in _ARGUMENTS and name and not (done or early):
                if not (yield from self._whole(name)):
                    return False
                done = True
            else:
                pieces: list[str] = []
                if not (yield from read_value(s, pieces.append)):
                    return False
                if key in _ARGUMENTS:
                    early = early or "".join(pieces)
            yield from s.spaces()
            end = yield from s.accept(",", "}")
            if end == "}":
                break
            if not end:
                return False
        if not done:
            text = early if early.startswith("{") else object_text(early or "null")
            if not name or text is None or (bare and not early):
                return False
            self._begin(name)
            self._more(text)
            self._end()
        self._absorb()
        return True

    def _string(self) -> Run[str | None]:
        """Pass a JSON string, and return its value."""
        pieces: list[str] = []
        if (yield from self._scan.at()) != '"':
            return None
        if not (yield from read_string(self._scan, pieces.append)):
            return None
        return str(loads("".join(pieces)))

    # -- the answer as a whole -------------------------------------------------------------------

    def _run(self) -> Run[None]:
        s = self._scan
        while True:
            s.free()
            mark = yield from s.to_mark(self.marks, self._text)
            if not mark:
                self._end_text()
                return
            num_calls = len(self.calls)
            s.mark()
            s.pos = len(mark)
            if (yield from self._block(mark)):
                self._absorb()
                continue
            if self._open is not None:
                if s.starved:  # the rest is half a JSON token of the arguments
                    s.pos = len(s.buf)
                self._end(complete=False)
                continue
            read = s.pos
            s.rewind()
            if len(self.calls) == num_calls:
                s.pos = max(read, len(mark)) if mark in self.bare else len(mark)
                self._text(s.buf[: s.pos])
            elif s.starved and self._is_tail("".join(s.buf.split())):
                s.pos = len(s.buf)
                self._absorb()

    def _is_tail(self, rest: str) -> bool:
        return any(tail.startswith(rest) for tail in self.tails)

    def _text(self, text: str) -> None:
        if not text.rstrip(SPACE):
            self._space += text
            return
        text = self._space + text
        body = text.rstrip(SPACE)
        self._space = text[len(body) :]
        body = self._kept + body if self._said or not self.calls else body.lstrip(SPACE)
        self._kept = ""
        self._said, self._beside = True, False
        if self._found and isinstance(last := self._found[-1], Content):
            self._found[-1] = Content(last.text + body)
        else:
            self._found.append(Content(body))

    def _drop_space(self) -> None:
        """A call begins: white space before it is content only between visible content."""
        if self._said and not self._beside:
            self._kept = self._space
        self._space = ""
        self._beside = True

    def _end_text(self) -> None:
        if self._space and not self._beside:
            self._found.append(Content(self._space))

    def _settle(self) -> None:
        if self._pending:
            index = self.calls[-1].index
            self._found.append(Arguments(index, "".join(self._pending)))
            self._pending.clear()
