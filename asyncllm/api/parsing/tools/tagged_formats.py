"""Tool-call formats that write each argument between tags; the arguments become JSON.

The tool's schema decides each value's JSON type (:mod:`asyncllm.api.parsing.tools.schema`).
"""

from __future__ import annotations

import json
from typing import Final

from asyncllm.api.parsing.json_stream import escaped
from asyncllm.api.parsing.scanner import Literals, Out, Run
from asyncllm.api.parsing.tools.base import ToolParser
from asyncllm.api.parsing.tools.schema import argument_json, argument_types

MAX_KEY: Final = 1024


class _TaggedCalls(ToolParser):
    """What both have in common: arguments one by one."""

    def _key(self, key: str, num_args: int) -> None:
        head = "{" if num_args == 0 else ", "
        self._more(f"{head}{json.dumps(key, ensure_ascii=False)}: ")

    def _close(self, num_args: int) -> None:
        self._more("}" if num_args else "{}")
        self._end()


class Qwen3Coder(_TaggedCalls):
    """``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``.

    One line break after a parameter's begin tag and one before its end tag are not the value's.
    """

    marks = Literals("<tool_call>", "<function=")
    tokens = ("<tool_call>", "</tool_call>")
    tails = ("</tool_call>",)
    _name_end: Final = Literals(">", "\n", "<")
    _ends: Final = Literals("</parameter>", "</function>", "<parameter=")

    def _block(self, mark: str) -> Run[bool]:
        s = self._scan
        wrapped = mark == "<tool_call>"
        if wrapped:
            yield from s.spaces()
            if not (yield from s.accept("<function=")):
                return False
        while True:
            if not (yield from self._function()):
                return False
            if (yield from s.accept_next("</tool_call>")):
                return True
            if not (yield from s.accept_next("<function=")):
                return not wrapped

    def _function(self) -> Run[bool]:
        """A function whose ``<function=`` is passed."""
        s = self._scan
        name = yield from self._tag()
        if not name:
            return False
        self._begin(name)
        num_args = 0
        while True:
            yield from s.spaces()
            if (yield from s.accept("</function>")):
                self._close(num_args)
                return True
            if not (yield from s.accept("<parameter=")) or not (key := (yield from self._tag())):
                return False
            self._key(key, num_args)
            num_args += 1
            if not (yield from self._value(name, key)):
                return False

    def _tag(self) -> Run[str]:
        """Pass the rest of a tag, and return the name in it; "" if it is not a tag."""
        name = yield from self._name(self._name_end, MAX_KEY)
        return name if (yield from self._scan.accept(">")) else ""

    def _value(self, name: str, key: str) -> Run[bool]:
        s = self._scan
        value = _Value(argument_types(self.tools.get(name), key), self._more)
        if (yield from s.starts("\n")):
            s.pos += 1
        while mark := (yield from s.to_mark(self._ends, value.take)):
            if mark == "</parameter>":
                s.pos += len(mark)
                break
            if mark == "<parameter=" and value.at_line_start:
                break
            if mark == "</function>" and (yield from self._really_ends(len(mark))):
                break
            value.take(mark)
            s.pos += len(mark)
        if not mark:
            value.cut()
            return False
        value.end()
        return True

    def _really_ends(self, k: int) -> Run[bool]:
        """Whether a ``</function>`` inside a value ends the function, or the value continues."""
        s = self._scan
        k = yield from s.past_spaces(k)
        for literal in ("</tool_call>", "<tool_call>", "<function="):
            if (yield from s.starts(literal, k)):
                return True
        return False


class Glm47(_TaggedCalls):
    """``<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>``."""

    marks = Literals("<tool_call>")
    tokens = (
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
    )
    _name_end: Final = Literals("<", "{")
    _key_end: Final = Literals("</arg_key>")
    _ends: Final = Literals("</arg_value>", "</tool_call>")

    def _block(self, mark: str) -> Run[bool]:
        s = self._scan
        name = yield from self._name(self._name_end)
        if not name or " " in name:
            return False
        if not (yield from s.starts("<arg_key>")) and not (yield from s.starts("</tool_call>")):
            return False
        self._begin(name)
        num_args = 0
        while True:
            yield from s.spaces()
            if (yield from s.accept("</tool_call>")):
                self._close(num_args)
                return True
            if not (yield from s.accept("<arg_key>")):
                return False
            key = yield from s.through(self._key_end, MAX_KEY)
            if key is None or not (yield from s.accept_next("<arg_value>")):
                return False
            self._key(key.strip(), num_args)
            num_args += 1
            value = _Value(
                argument_types(self.tools.get(name), key.strip()), self._more, lines=False
            )
            end = yield from s.to_mark(self._ends, value.take)
            if not end:
                value.cut()
                return False
            value.end()
            if end == "</arg_value>":
                s.pos += len(end)


class _Value:
    """One argument on its way to JSON. Strings are passed on as they arrive, all else at the end.

    Args:
        types: JSON types it may have.
        out: takes JSON text.
        lines: the last line break is the format's, not the value's.
    """

    def __init__(self, types: frozenset[str], out: Out, *, lines: bool = True) -> None:
        self._types, self._out, self._lines = types, out, lines
        self._streams = types == {"string"}
        self._pieces: list[str] = []
        self._held = ""  # a line break that may be the last
        self._begun = False

    @property
    def at_line_start(self) -> bool:
        """Nothing, or a line break, is the last that came."""
        return bool(self._held) or not self._begun

    def take(self, text: str) -> None:
        """More of the value."""
        text = self._held + text
        self._held = ""
        self._open()
        if self._lines and text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        if self._streams:
            self._out(escaped(text))
        else:
            self._pieces.append(text)

    def end(self) -> None:
        """That was all of it."""
        if not self._streams:
            self._out(argument_json("".join(self._pieces), self._types))
            return
        self._open()
        self._out('"')

    def cut(self) -> None:
        """It would have gone on: what there is of it, and no JSON."""
        if not self._streams:
            self._out("".join(self._pieces))

    def _open(self) -> None:
        if self._streams and not self._begun:
            self._out('"')
        self._begun = True
