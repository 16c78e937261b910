"""Events that parsers find in a model's output. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call.

    Args:
        name: as the model writes it.
        parameters: JSON schema of its arguments, an object schema; empty: anything.
        description: for the prompt.
        strict: calls are to fit the schema even where the model is free to call or not.
        lark: of a grammar in Lark's notation is every argument; "": of none.
        custom: one of OpenAI's custom tools, whose only argument is its free text.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    strict: bool = False
    lark: str = ""
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Content:
    """More content."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; calls are numbered from 0 and never overlap."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call has ended. ``complete`` False: its arguments are cut or broken, and no JSON."""

    index: int
    complete: bool


Event = Content | Reasoning | CallStart | Arguments | CallEnd


@dataclass(slots=True)
class Call:
    """A call so far.

    Args:
        arguments: JSON text.
        complete: the arguments are whole.
        text: what the model wrote for it, marks included; set when the call ends.
    """

    index: int
    id: str
    name: str
    arguments: str = ""
    complete: bool = False
    text: str = ""
