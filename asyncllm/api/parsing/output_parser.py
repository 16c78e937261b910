"""Splits a model's output into reasoning, content and tool calls, incrementally.

Owns how the served model writes calls and reasoning, which of them a request wants, and the state
of one choice. Knows neither the JSON of protocols nor prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from asyncllm.api.parsing import reasoning, tools
from asyncllm.api.parsing.events import (
    Arguments,
    Call,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    Tool,
)
from asyncllm.api.parsing.reasoning import OPENED, Splitter, make_reasoning
from asyncllm.api.parsing.tools import call_grammar, detect

SEPARATOR: Final = "\n\n"  # between reasoning and the text after it, where both are content


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How the served model writes calls and reasoning.

    Args:
        calls: the format of calls, one of ``tools.FORMATS``.
        spelling: its variant, as ``call_grammar.spelling`` names it; "": it has none.
        lists_tools: its chat template puts tools into the prompt.
        tools_in_system: it takes them as JSON text, of the system message.
        tells_results: it renders messages of the role tool even where calls are plain text.
        reasoning: the format of reasoning, one of ``reasoning.FORMATS``; "": none.
        variables: what its chat template reads.
        roles: of messages, those that its chat template mentions.
    """

    calls: str = "hermes"
    spelling: str = ""
    lists_tools: bool = False
    tools_in_system: bool = False
    tells_results: bool = False
    reasoning: str = ""
    variables: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()

    @property
    def call_text(self) -> str:
        """How calls are written, by the name in ``call_grammar.CALL_TEXTS``."""
        return self.spelling or self.calls


def dialect_of(
    templates: Mapping[str, str], calls: str | None = None, thoughts: str | None = None
) -> Dialect:
    """The dialect that chat templates show.

    Args:
        templates: as ``ChatTemplate`` takes them.
        calls, thoughts: formats that are known; None: detect them.
    """
    usual = templates.get("default", "")
    offering = templates.get("tool_use", usual)
    lists_tools = detect.template_uses_tools(offering)
    detected = detect.detect_format(offering)
    name = calls or detected or "hermes"
    spelling = call_grammar.spelling(name, offering)
    in_system = not lists_tools and detect.tools_in_system(offering)
    knows = detect.template_tells_results(offering) or in_system
    return Dialect(
        calls=name,
        spelling="" if spelling == name else spelling,
        lists_tools=lists_tools,
        tools_in_system=in_system,
        tells_results=not lists_tools and name == detected and knows,
        reasoning=thoughts or reasoning.detect_format(usual) or "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Which parts of the output to parse, and how to report them.

    Args:
        calls: the format of calls; "": calls are content.
        tools: what may be called.
        parallel: False: only the first call is reported.
        reasoning: the format of reasoning; "": reasoning is content.
        separate: False: reasoning is parsed, and reported as content.
        hidden: reasoning is parsed, and not reported.
        streamed: False: reasoning is reported in one piece, once it has ended.
        continued: the end of the prompt that is the beginning of the answer.
    """

    calls: str = ""
    tools: tuple[Tool, ...] = ()
    parallel: bool = True
    reasoning: str = ""
    separate: bool = True
    hidden: bool = False
    streamed: bool = True
    continued: str = ""

    @property
    def shown(self) -> tuple[str, ...]:
        """Special tokens that must be in the text."""
        calls = tools.special_tokens(self.calls) if self.calls else ()
        thoughts = reasoning.special_tokens(self.reasoning) if self.reasoning else ()
        return tuple(dict.fromkeys(calls + thoughts))

    def parser(self, thoughts: str) -> OutputParser:
        """For one answer that begins at ``thoughts``, as ``prompt_state`` has found; "": "none"."""
        opened = OPENED.get(thoughts)
        found = make_reasoning(self.reasoning, opened=opened) if self.reasoning else None
        calls = tools.make_parser(self.calls, self.tools) if self.calls else None
        return OutputParser(Splitter(found, calls), self)


class OutputParser:
    """The parts of one answer. Joined, they are the same wherever the text is cut.

    Attributes:
        num_reasoning_tokens: tokens of reasoning so far, its end tag included.
    """

    def __init__(self, splitter: Splitter, options: OutputOptions) -> None:
        self._splitter, self._options = splitter, options
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._events: list[Event] = []
        self._after_reasoning = False  # and no content after them yet
        self._delayed: list[str] = []  # reasoning to report once it has ended
        self._ended = False
        self.num_reasoning_tokens = 0

    @property
    def content(self) -> str:
        """All content so far."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """All reasoning so far; "" where it is reported as content."""
        return "".join(self._reasoning)

    @property
    def looks_for_reasoning(self) -> bool:
        """Whether reasoning is parsed."""
        return bool(self._options.reasoning)

    @property
    def calls(self) -> Sequence[Call]:
        """Calls so far; their arguments are there when they have ended."""
        return self._splitter.calls if self._options.parallel else self._splitter.calls[:1]

    def take(self, text: str, pieces: Sequence[str], num_tokens: int) -> None:
        """Parse more text.

        Args:
            pieces: the text of each token; together they are ``text`` unless a possible stop string
                is held back. Then tokens of reasoning are counted by the text before them.
        """
        splitter = self._splitter
        if num_tokens > 1 and self.looks_for_reasoning and "".join(pieces) == text:
            for piece in pieces:
                self.num_reasoning_tokens += splitter.inside
                self._add(splitter.push(piece))
            return
        if splitter.inside:
            self.num_reasoning_tokens += num_tokens
        if text:
            self._add(splitter.push(text))

    def finish(self) -> None:
        """The text has ended."""
        if not self._ended:
            self._ended = True
            self._add(self._splitter.finish())
            self._flush()

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        found, self._events = self._events, []
        return found

    def finish_reason(self, reason: str) -> str:
        """``tool_calls`` for an answer that ended with ``stop`` and whose calls are all whole."""
        whole = bool(self.calls) and all(call.complete for call in self.calls)
        return "tool_calls" if reason == "stop" and whole else reason

    def _add(self, events: list[Event]) -> None:
        for event in events:
            match event:
                case Reasoning(text):
                    if self._options.hidden:
                        continue
                    if self._options.separate:
                        self._reasoning.append(text)
                        if not self._options.streamed:
                            self._delayed.append(text)
                            continue
                    else:
                        event = Content(text)
                        self._content.append(text)
                        self._after_reasoning = True
                case Content(text):
                    if self._after_reasoning:
                        self._after_reasoning = False
                        event = Content(text := SEPARATOR + text)
                    self._content.append(text)
                case CallStart() | Arguments() | CallEnd():
                    if event.index and not self._options.parallel:
                        continue
            self._flush()
            self._events.append(event)

    def _flush(self) -> None:
        if self._delayed:
            self._events.append(Reasoning("".join(self._delayed)))
            self._delayed.clear()
