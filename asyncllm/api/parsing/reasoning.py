"""Separates reasoning from the answer, incrementally.

Owns the marks around reasoning and what a rendered prompt says about them. Calls are looked for in
the answer only: :class:`Splitter` puts a tool parser behind a reasoning parser.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Final, Literal

from asyncllm.api.parsing.events import Call, Content, Event, Reasoning
from asyncllm.api.parsing.scanner import SPACE, IncrementalParser, Literals, Run
from asyncllm.api.parsing.tools import deepseek
from asyncllm.api.parsing.tools.base import ToolParser
from asyncllm.api.parsing.tools.detect import without_comments
from asyncllm.constrain.reasoning import ReasoningTags

PromptState = Literal["open", "closed", "none"]
OPENED: Final = {"open": True, "closed": False}  # by PromptState; None: it does not say


@dataclass(frozen=True, slots=True)
class _Think:
    """A pair of tags around reasoning, which comes first in an answer.

    Args:
        pairs: (begin, end); any may be used.
        ends: marks that end reasoning too and belong to what follows: single tokens that begin a
            call, which a model writes for nothing else.
    """

    pairs: tuple[tuple[str, str], ...] = (("<think>", "</think>"),)
    ends: tuple[str, ...] = ()


_THINK: Final = _Think()
_FORMATS: Final[dict[str, _Think]] = {
    "deepseek-r1": _Think(ends=(deepseek.CALLS,)),
    "qwen3": _THINK,
    "glm45": _THINK,
    "kimi_k2": _Think(
        pairs=(("<think>", "</think>"), ("◁think▷", "◁/think▷")),
        ends=("<|tool_calls_section_begin|>",),
    ),
    "mistral": _Think(pairs=(("[THINK]", "[/THINK]"),), ends=("[TOOL_CALLS]",)),
    "think": _THINK,
}
FORMATS: Final = (*_FORMATS, "gpt-oss")


class ReasoningParser(IncrementalParser[Event]):
    """``push(text)`` and ``finish()`` give Reasoning and Content events.

    Joined, they are the same wherever the text is cut. ``inside`` tells whether the next character
    would be reasoning, as far as that is known.
    """

    inside = False

    def _think(self, text: str) -> None:
        self._add(Reasoning(text))

    def _say(self, text: str) -> None:
        self._add(Content(text))

    def _add(self, event: Reasoning | Content) -> None:
        last = self._found[-1] if self._found else None
        if isinstance(last, Reasoning) and isinstance(event, Reasoning):
            self._found[-1] = Reasoning(last.text + event.text)
        elif isinstance(last, Content) and isinstance(event, Content):
            self._found[-1] = Content(last.text + event.text)
        else:
            self._found.append(event)


def make_reasoning(format_name: str, *, opened: bool | None) -> ReasoningParser:
    """A parser for one answer.

    Args:
        format_name: one of FORMATS.
        opened: the prompt ends inside reasoning (True), after it (False: all is content), or says
            nothing (None: reasoning if the answer begins so). ``OPENED.get(prompt_state(..))``.

    Raises:
        KeyError: no such format.
    """
    if format_name == "gpt-oss":
        return _Harmony(opened)
    return _TaggedReasoning(_FORMATS[format_name], opened)


def detect_format(template: str) -> str | None:
    """The format of reasoning that a chat template shows; None if it shows none for certain.

    An end tag is enough: templates that leave reasoning out of earlier turns look for it.
    """
    plain = without_comments(template)
    if "<|channel|>analysis" in plain:
        return "gpt-oss"
    if "[/THINK]" in plain:
        return "mistral"
    pairs = [pair for pair in _FORMATS["kimi_k2"].pairs if pair[1] in plain]
    if not pairs:
        return None
    if pairs[-1][0] != "<think>" or "<|tool_calls_section_begin|>" in plain:
        return "kimi_k2"
    return "deepseek-r1" if deepseek.BAR in plain else "think"


def special_tokens(format_name: str) -> tuple[str, ...]:
    """Marks that are special tokens in some models: they must be in the text that is parsed.

    Raises:
        KeyError: no such format.
    """
    if format_name == "gpt-oss":
        return _Harmony.TOKENS
    style = _FORMATS[format_name]
    return tuple(tag for pair in style.pairs for tag in pair) + style.ends


def tags(format_name: str, pieces: Container[bytes]) -> ReasoningTags:
    """The marks of a format, for the tokens of a model.

    Args:
        pieces: texts of all tokens; of several pairs of tags a model uses one that is in it.

    Raises:
        KeyError: no such format.
    """
    if format_name == "gpt-oss":
        final = b"<|channel|>final<|message|>"
        return ReasoningTags(
            begins=(b"<|channel|>analysis<|message|>",),
            ends=(b"<|end|>", b"<|start|>"),
            close=b"<|end|><|start|>assistant" + final,
            answer=final,
        )
    style = _FORMATS[format_name]
    pairs = [(begin.encode(), end.encode()) for begin, end in style.pairs]
    _, close = next((pair for pair in pairs if pair[0] in pieces), pairs[0])
    return ReasoningTags(
        begins=tuple(begin for begin, _ in pairs),
        ends=tuple(end for _, end in pairs),
        close=close,
        strays=tuple(mark.encode() for mark in style.ends),
    )


def prompt_state(format_name: str, rendered_prompt: str, continued: str = "") -> PromptState:
    """Where the answer to a prompt begins: inside reasoning, after it, or neither.

    Only the end of the prompt counts: tags in older messages say nothing.

    Args:
        format_name: one of FORMATS.
        rendered_prompt: the text of the whole prompt.
        continued: its end if that is the beginning of the answer (continue_final_message).

    Raises:
        KeyError: no such format.
    """
    head = rendered_prompt.removesuffix(continued).rstrip(SPACE)
    if format_name == "gpt-oss":
        said = re.search(r"<\|channel\|>(\w+)<\|message\|>[^<]*$", head + continued)
        return "none" if said is None else "open" if said[1] == "analysis" else "closed"
    pairs = _FORMATS[format_name].pairs
    begun = max(continued.rfind(begin) for begin, _ in pairs)
    ended = max(continued.rfind(end) for _, end in pairs)
    if begun != ended:
        return "open" if begun > ended else "closed"
    if head.endswith(tuple(begin for begin, _ in pairs)):
        return "open"
    if head.endswith(tuple(end for _, end in pairs)):
        return "closed"
    return "closed" if continued.strip(SPACE) else "none"


class Splitter:
    """An answer in its three parts: reasoning, content, calls.

    ``push(text)`` and ``finish()`` give all kinds of events. The tool parser sees content only.
    """

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning, self._tools = reasoning, tools

    def push(self, text: str) -> list[Event]:
        """What is certain after this piece of text."""
        if self._reasoning is None:
            return self._parse(text)
        return self._pass_on(self._reasoning.push(text))

    def finish(self) -> list[Event]:
        """The text has ended: the rest."""
        found = [] if self._reasoning is None else self._pass_on(self._reasoning.finish())
        return found if self._tools is None else found + self._tools.finish()

    @property
    def inside(self) -> bool:
        """The model is thinking."""
        return self._reasoning is not None and self._reasoning.inside

    @property
    def calls(self) -> list[Call]:
        """Calls so far."""
        return [] if self._tools is None else self._tools.calls

    def _pass_on(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += self._parse(event.text) if isinstance(event, Content) else [event]
        return found

    def _parse(self, text: str) -> list[Event]:
        if self._tools is not None:
            return self._tools.push(text)
        return [Content(text)] if text else []


class _TaggedReasoning(ReasoningParser):
    """One piece of reasoning, at the beginning; later tags are content."""

    def __init__(self, style: _Think, opened: bool | None) -> None:
        super().__init__()
        self._style, self._opened = style, opened
        self.inside = opened is True
        self._space = ""

    def _run(self) -> Run[None]:
        s = self._scan
        if self._opened is not False and (yield from self._begins()):
            self.inside = True
            yield from s.spaces()
            ends = tuple(end for _, end in self._style.pairs)
            mark = yield from s.to_mark(Literals(*ends, *self._style.ends), self._hold)
            self.inside = not mark
            if mark in ends:
                yield from s.accept(mark)
            yield from s.spaces()
        yield from s.rest(self._say)

    def _begins(self) -> Run[bool]:
        """Does reasoning begin here? Passes a begin tag, also one that repeats the prompt's."""
        begins = [begin for begin, _ in self._style.pairs]
        return bool((yield from self._scan.accept_next(*begins))) or self._opened is True

    def _hold(self, text: str) -> None:
        """Reasoning without the white space at its end."""
        if not text.rstrip(SPACE):
            self._space += text
            return
        text = self._space + text
        body = text.rstrip(SPACE)
        self._space = text[len(body) :]
        self._think(body)


class _Harmony(ReasoningParser):
    """Messages on channels: analysis is reasoning, final and commentary are content.

    A message to somebody (``to=``) is a call: it is left in the content as it is, with its marks,
    for the tool parser of this format.
    """

    TOKENS: Final = (
        *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"),
        *("<|end|>", "<|return|>", "<|call|>"),
    )
    _marks: Final = Literals("<|start|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>")
    _body: Final = Literals("<|message|>")
    _HEAD_LEN: Final = 512
    _HEADS: Final = tuple(
        f"{start}<|channel|>{channel}<|message|>"
        for start in ("", "<|start|>assistant")
        for channel in ("analysis", "commentary", "final")
    )

    def __init__(self, opened: bool | None) -> None:
        super().__init__()
        self.inside = opened is True
        self._told: set[type[Event]] = set()
        self._apart = ""  # goes between two messages of a kind
        self._raw = False  # in a message to somebody

    def _run(self) -> Run[None]:
        s = self._scan
        while True:
            s.free()
            mark = yield from s.to_mark(self._marks, self._take)
            if not mark:
                return
            s.mark()
            s.pos = len(mark)
            if mark in ("<|start|>", "<|channel|>"):
                yield from self._header(mark)
                continue
            if self._raw and mark == "<|call|>":
                self._say(mark)
            self._raw = self.inside = False

    def _header(self, mark: str) -> Run[None]:
        s = self._scan
        if (yield from s.until(self._body, self._HEAD_LEN)) is None:
            if s.starved and any(head.startswith(s.buf) for head in self._HEADS):
                s.pos = len(s.buf)  # the answer is cut in a header
                return
            s.rewind()
            self._take(mark)
            s.pos = len(mark)
            return
        head = s.passed()
        yield from s.accept(*self._body.all)
        self._raw, self.inside, self._apart = " to=" in head, False, ""
        if self._raw:
            self._say(s.passed())
            return
        self.inside = re.search(r"<\|channel\|>\s*analysis\b", head) is not None
        if (Reasoning if self.inside else Content) in self._told:
            self._apart = "\n"

    def _take(self, text: str) -> None:
        if not self._raw:
            self._told.add(Reasoning if self.inside else Content)
        text, self._apart = self._apart + text, ""
        if self.inside:
            self._think(text)
        else:
            self._say(text)
