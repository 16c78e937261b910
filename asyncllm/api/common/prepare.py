"""A conversation to be answered, whatever the protocol: prompt, form of the answer, what to part.

Knows turns in template form, offers and the served model's dialect; knows no protocol's JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Final

from asyncllm.api.common import tool_request
from asyncllm.api.common.request import Prompt
from asyncllm.api.common.response_format import Grammar
from asyncllm.api.common.tool_request import Offer, Turns
from asyncllm.api.common.validation import bad, show
from asyncllm.api.parsing.output_parser import Dialect, Parting
from asyncllm.api.parsing.tools import call_forms, call_schema

USUAL: Final = Parting()
# variables of templates that other fields of a request set
OWN_VARIABLES: Final = frozenset(
    {"add_generation_prompt", "continue_final_message", "documents", "messages", "tools"}
)
# what clients say to every model, whether its template knows it or not
USUAL_VARIABLES: Final = frozenset({"enable_thinking", "reasoning_effort", "thinking"})
NO_EFFORT: Final = "none"  # the effort that turns thinking off


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialog:
    """What a request's Generation is made of.

    Args:
        form: what holds the answer, behind any reasoning.
        parting: what is to be found in the answer; None: nothing.
    """

    prompt: Prompt
    form: Grammar | None
    parting: Parting | None


def dialog(
    turns: Turns,
    dialect: Dialect,
    *,
    offered: Offer,
    form: Grammar | None = None,
    thinking: bool | None = None,
    effort: str | None = None,
    kwargs: dict[str, Any] | None = None,
    opening: bool | None = None,
    going_on: bool = False,
    manner: Parting = USUAL,
) -> Dialog:
    """Everything that follows from a conversation.

    Args:
        form: the answer's form; a forced call has its own.
        thinking: whether the model is to think; None: as its template has it.
        effort: for the template; "none" turns thinking off.
        kwargs: further variables of the template, which win.
        opening: the prompt ends with the head of an assistant's turn; None: unless ``going_on``.
        going_on: the last turn is the beginning of the answer.
        manner: how reasoning is told; the rest of it does not count.

    Raises:
        RequestError: 400, as :func:`call_schema` and :func:`pack` do.
    """
    if offered.forced:
        wanted = offered.wanted
        schema = call_schema(offered.tools, wanted.name or None, wanted.parallel)
        form = "schema", json.dumps(schema)  # as long as tools may be
    elif form is None and any(tool.strict for tool in offered.tools):
        form = "calls", call_forms(dialect.spelling or dialect.calls, offered.tools)
    if thinking is None and effort == NO_EFFORT:
        thinking = False
    variables: dict[str, Any] = {}
    if thinking is not None:
        variables = {"enable_thinking": thinking, "thinking": thinking}
    if effort is not None and effort != NO_EFFORT:
        variables["reasoning_effort"] = effort
    variables |= kwargs or {}
    if going_on:
        variables["continue_final_message"] = True
    variables["add_generation_prompt"] = not going_on if opening is None else opening
    told, listed = tool_request.told(turns, offered, dialect)
    packed = pack(told, listed, variables)
    calls = "json" if offered.forced else dialect.calls if offered.tools else ""
    parting = None
    if calls or dialect.reasoning:
        parting = replace(
            manner,
            calls=calls,
            offered=offered.tools,
            parallel=offered.wanted.parallel,
            reasoning=dialect.reasoning,
            continued=turns[-1]["content"] if going_on else "",
        )
    return Dialog(prompt=Prompt(chat=packed), form=form, parting=parting)


def refuse_calls(turns: Turns, name: str) -> None:
    """Refuse calls at the end of what is to be continued. Raises RequestError (400)."""
    if turns[-1].get("tool_calls"):
        bad(f"{name}: the last turn calls tools, so their results must follow", name)


def settable(variables: Collection[str]) -> list[str]:
    """Those that requests may set, of the variables of a template; sorted."""
    return sorted(USUAL_VARIABLES.union(variables) - OWN_VARIABLES)


def check_variables(kwargs: dict[str, Any], variables: Collection[str], name: str) -> None:
    """Raises RequestError for a name that is no variable of the template, or not to be set."""
    known = settable(variables)
    for key in kwargs:
        if key not in known:
            bad(f"{name}: {show(key)} is not one of {', '.join(known)}", name)


def pack(
    conversation: list[dict[str, Any]], tools: list[Any] | None, kwargs: dict[str, Any]
) -> bytes:
    """The ``chat`` field of a Tokenize message. Raises RequestError for lone surrogates."""
    whole = {"messages": conversation, "tools": tools, "kwargs": kwargs}
    try:
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        bad("messages: not valid Unicode (a lone surrogate)", "messages")
    except RecursionError:
        bad("messages: nested too deeply", "messages")
