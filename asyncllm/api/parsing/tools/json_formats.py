"""Tool-call formats whose arguments are JSON."""

from __future__ import annotations

import re
from typing import ClassVar, Final

from asyncllm.api.parsing.scanner import SPACE, Literals, Run
from asyncllm.api.parsing.tools import deepseek
from asyncllm.api.parsing.tools.base import MAX_NAME, ToolParser, is_name

_HEADER: Final = 2 * MAX_NAME  # characters before the arguments of a call, at most


class Hermes(ToolParser):
    """``<tool_call>{"name": .., "arguments": {..}}</tool_call>``; also several objects in one.

    Brackets too many or too few between the arguments and the end tag are overlooked.
    """

    marks = Literals("<tool_call>")
    tokens = ("<tool_call>", "</tool_call>")
    tails = ("}</tool_call>", "</tool_call>")

    def _block(self, mark: str) -> Run[bool]:
        s = self._scan
        while True:
            num_calls = len(self.calls)
            yield from s.spaces()
            whole = yield from self._object()
            if self._open is not None or len(self.calls) == num_calls:
                return False
            if (yield from s.accept_next("</tool_call>", skip=SPACE + "}],")):
                return True
            if not whole:
                return False
            yield from s.accept_next(",")


class Llama3Calls(ToolParser):
    """``{"name": .., "parameters": {..}}``, several separated by ``;``, perhaps after a mark."""

    marks = Literals("<|python_tag|>", "{")
    bare = ("{",)
    tokens = ("<|python_tag|>",)
    tails = ("}",)

    def _block(self, mark: str) -> Run[bool]:
        s = self._scan
        if mark == "{":
            s.pos -= 1
        while True:
            yield from s.spaces()
            if not (yield from self._object(bare=mark == "{")):
                return False
            k = yield from s.past_spaces()
            if not (yield from s.starts(";", k)):
                return True
            k = yield from s.past_spaces(k + 1)
            if (yield from s.starts("<|python_tag|>", k)):
                k = yield from s.past_spaces(k + len("<|python_tag|>"))
            if not (yield from s.starts("{", k)):
                return not s.starved
            s.pos += k


class BareJson(ToolParser):
    """The whole answer is a call object or a list of them: what a forced call looks like."""

    marks = Literals("[", "{")
    bare = marks.all
    tails = ("}]", "]")

    def _block(self, mark: str) -> Run[bool]:
        if mark == "[":
            return (yield from _array(self))
        self._scan.pos -= 1
        return (yield from self._object(bare=True))


class Mistral(ToolParser):
    """``[TOOL_CALLS] [{..}, ..]``, and ``[TOOL_CALLS]name[ARGS]{..}`` once for each call.

    Ids are nine letters or digits: Mistral's own templates refuse others.
    """

    marks = Literals("[TOOL_CALLS]")
    tokens = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    tails = ("}]", "]")
    _ends: Final = Literals("[CALL_ID]", "[ARGS]", "{")

    def _block(self, mark: str) -> Run[bool]:
        s = self._scan
        yield from s.spaces()
        c = yield from s.at()
        if c == "{":
            return (yield from self._object())
        if c == "[":
            s.pos += 1
            return (yield from _array(self))
        name = yield from self._name(self._ends)
        given: str | None = ""
        if (yield from s.accept("[CALL_ID]")):
            given = yield from s.until(self._ends, MAX_NAME)
        if not name or given is None or " " in name:
            return False
        yield from s.accept("[ARGS]")
        yield from s.spaces()
        return (yield from self._whole(name, given.strip()))

    def _id_of(self, name: str, given: str) -> str:
        taken = {call.id for call in self.calls}
        if re.fullmatch("[A-Za-z0-9]{9}", given) and given not in taken:
            return given
        return self._make_id()[:9]


class Phi4(ToolParser):
    """``<|tool_call|>[{"name": .., "arguments": {..}}]<|/tool_call|>``, or ``functools[..]``."""

    marks = Literals("<|tool_call|>", "functools[")
    tokens = ("<|tool_call|>", "<|/tool_call|>")
    tails = ("}]<|/tool_call|>", "]<|/tool_call|>", "<|/tool_call|>", "}]", "]")

    def _block(self, mark: str) -> Run[bool]:
        s = self._scan
        yield from s.spaces()
        if mark == "<|tool_call|>" and (yield from s.at()) == "{":
            whole = yield from self._object()
        else:
            if mark == "<|tool_call|>" and not (yield from s.accept("[")):
                return False
            whole = yield from _array(self)
        return whole and ((yield from self._ended("<|/tool_call|>")) or mark == "functools[")


class _Sections(ToolParser):
    """Calls between marks, in a section between marks; or one without a section.

    Attributes:
        section, call: their begin and end marks.
        head: ends what comes before the arguments of a call.
    """

    section: ClassVar[tuple[str, str]]
    call: ClassVar[tuple[str, str]]
    head: ClassVar[Literals]

    def _block(self, mark: str) -> Run[bool]:
        s, num_calls = self._scan, len(self.calls)
        if mark != self.section[0]:
            return (yield from self._call())
        while (yield from s.accept_next(self.call[0])):
            if not (yield from self._call()):
                return False
        return bool((yield from s.accept_next(self.section[1]))) and len(self.calls) > num_calls

    def _call(self) -> Run[bool]:
        """A call whose begin mark is passed."""
        raise NotImplementedError


class DeepSeekV3(_Sections):
    """DeepSeek's marks: V3 and R1 with the name and a ```json block, V3.1 with name and object."""

    section = deepseek.CALLS, deepseek.CALLS_END
    call = deepseek.CALL, deepseek.CALL_END
    marks = Literals(deepseek.CALLS, deepseek.CALL)
    tokens = (*section, *call, deepseek.SEP)
    tails = (f"```{deepseek.CALL_END}", deepseek.CALL_END, deepseek.CALLS_END)
    head = Literals(deepseek.SEP)
    _line: Final = Literals("\n", "{")

    def _call(self) -> Run[bool]:
        s = self._scan
        name = yield from s.through(self.head, MAX_NAME)
        if name is None:
            return False
        yield from s.spaces()
        fenced = (yield from s.at()) != "{"
        if fenced:
            name = yield from s.until(self._line, MAX_NAME)
            yield from s.spaces()
            if name is None or not (yield from s.accept("```json", "```")):
                return False
            yield from s.spaces()
        if not is_name(name := name.strip()) or not (yield from self._whole(name)):
            return False
        k = yield from s.past_spaces()
        if fenced and (yield from s.starts("```", k)):
            k = yield from s.past_spaces(k + 3)
        return (yield from self._ended(self.call[1], k))


class KimiK2(_Sections):
    """Kimi's marks; ``functions.name:number`` before the arguments is the call's id."""

    section = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    call = "<|tool_call_begin|>", "<|tool_call_end|>"
    marks = Literals(section[0], call[0])
    head = Literals("<|tool_call_argument_begin|>")
    tokens = (*section, *call, *head.all)
    tails = (call[1], section[1])

    def _call(self) -> Run[bool]:
        s = self._scan
        head = (yield from s.through(self.head, _HEADER)) or ""
        yield from s.spaces()
        found = re.fullmatch(r"(?:functions\.)?(.+?)(?::([0-9]+))?", head.strip())
        if found is None or not is_name(found[1]):
            return False
        whole = yield from self._whole(*found.groups(""))
        return whole and (yield from self._ended(self.call[1]))

    def _id_of(self, name: str, given: str) -> str:
        taken = {call.id for call in self.calls}
        number = int(given[:9]) if given else len(self.calls)
        while (made := f"functions.{name}:{number}") in taken:
            number += 1
        return made


class GptOss(ToolParser):
    """Harmony: a message on a channel, to ``functions.name``, whose body is the arguments."""

    marks = Literals("<|start|>assistant", "<|channel|>")
    tokens = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>")
    tails = ("<|call|>",)
    _body: Final = Literals("<|message|>")

    def _block(self, mark: str) -> Run[bool]:
        s = self._scan
        head = yield from s.through(self._body, _HEADER)
        to = re.search(r"\bto=functions\.([^\s<]+)", head or "")
        if to is None or not is_name(to[1]):
            return False
        yield from s.spaces()
        if not (yield from self._whole(to[1])):
            return False
        k = yield from s.past_spaces()
        if (yield from s.accept("<|call|>", k=k)) or not (yield from s.at(k)):
            return True  # the mark ends the answer, so it may not be shown
        return not s.starved


def _array(p: ToolParser) -> Run[bool]:
    """Call objects after a ``[``, up to and including the ``]``."""
    s = p._scan
    while True:
        yield from s.spaces()
        if not (yield from p._object()):
            return False
        if (c := (yield from s.accept_next(",", "]"))) != ",":
            return c == "]"
