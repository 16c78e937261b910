"""Splits an answer into numbered content blocks, for protocols with a block or item for each part.

A block is a stretch of reasoning, of content, or a call. Knows events; knows no protocol's JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, Protocol

from asyncllm.api.common.answer import Answer, Choice, Reply
from asyncllm.api.parsing.events import Arguments, CallEnd, CallStart, Content, Event, Reasoning

BlockKind = type[Content] | type[Reasoning] | type[CallStart]


@dataclass(slots=True, eq=False)
class ContentBlock:
    """A stretch of output of one kind.

    Args:
        index: from 0 on.
        kind: reasoning, content, or a call (CallStart).
        call: its name and id, if it is a call.
        complete: the arguments of a call are whole JSON; any other block has not been cut.
    """

    index: int
    kind: BlockKind
    call: CallStart | None = None
    pieces: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def text(self) -> str:
        """All of it: reasoning, content, or the JSON of arguments."""
        return "".join(self.pieces)


BlockEvent = tuple[Literal["begin", "more", "end"], ContentBlock, str]


class BlockBuilder:
    """Makes content blocks of events as they arrive."""

    def __init__(self) -> None:
        self.all: list[ContentBlock] = []
        self._open: ContentBlock | None = None

    def add(self, events: Iterable[Event]) -> Iterator[BlockEvent]:
        """What these events do to the blocks."""
        for event in events:
            match event:
                case CallStart():
                    yield from self.end()
                    yield self._begin(CallStart, event)
                case CallEnd():
                    yield from self.end(event.complete)
                case Arguments():
                    yield self._more(event.text)
                case Content() | Reasoning():
                    if self._open is None or self._open.kind is not type(event):
                        yield from self.end()
                        yield self._begin(type(event))
                    yield self._more(event.text)

    def end(self, complete: bool = True) -> Iterator[BlockEvent]:
        """End the block in progress, if there is one."""
        if self._open is not None:
            block, self._open = self._open, None
            block.complete = complete
            yield "end", block, ""

    def _begin(self, kind: BlockKind, call: CallStart | None = None) -> BlockEvent:
        self._open = ContentBlock(len(self.all), kind, call)
        self.all.append(self._open)
        return "begin", self._open, ""

    def _more(self, text: str) -> BlockEvent:
        assert self._open is not None  # a call starts before its arguments
        self._open.pieces.append(text)
        return "more", self._open, text


class ContentBlockReply(Reply, Protocol):
    """A reply with one choice, sent block by block; subclasses render the blocks."""

    blocks: BlockBuilder

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.blocks = BlockBuilder()

    def block_start(self, block: ContentBlock) -> bytes:
        """Events for the start of a block."""

    def block_delta(self, block: ContentBlock, text: str) -> bytes:
        """Events for more text of a block."""

    def block_stop(self, block: ContentBlock) -> bytes:
        """Events for the end of a block."""

    def piece(self, choice: Choice, text: str, count: int) -> bytes:
        """Events for what has been found in new text."""
        if choice.output is not None:
            return self._tell(self.blocks.add(choice.output.take_events()))
        return self._tell(self.blocks.add([Content(text)])) if text else b""

    def flush(self, choice: Choice) -> bytes:
        """Events for what was held back, and the end of the last block."""
        found = [] if choice.output is None else choice.output.take_events()
        return self._tell(self.blocks.add(found)) + self._tell(self.blocks.end(not choice.is_cut))

    def all_blocks(self, choice: Choice) -> list[ContentBlock]:
        """All blocks of an answer that has not been streamed."""
        if choice.output is not None:
            found = choice.output.take_events()
        else:
            found = [Content(choice.text)] if choice.text else []
        self.blocks = BlockBuilder()
        for _ in chain(self.blocks.add(found), self.blocks.end(not choice.is_cut)):
            pass
        return self.blocks.all

    def _tell(self, steps: Iterator[BlockEvent]) -> bytes:
        out = b""
        for what, block, text in steps:
            match what:
                case "begin":
                    out += self.block_start(block)
                case "more":
                    out += self.block_delta(block, text)
                case "end":
                    out += self.block_stop(block)
        return out
