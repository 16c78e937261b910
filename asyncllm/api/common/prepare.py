"""Turns a conversation, its tools and options into a prompt, a grammar and output options.

All chat protocols share it. Knows no protocol's JSON.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from asyncllm.api.common.conversation import Messages
from asyncllm.api.common.request import Prompt
from asyncllm.api.common.response_format import Grammar
from asyncllm.api.common.tool_request import ToolRequest, with_tools_in_prompt
from asyncllm.api.common.validation import preview, reject
from asyncllm.api.parsing.output_parser import Dialect, OutputOptions
from asyncllm.api.parsing.tools.call_grammar import call_forms
from asyncllm.api.parsing.tools.schema import call_schema

DEFAULT_OPTIONS: Final = OutputOptions()
# variables of templates that other fields of a request set
OWN_VARIABLES: Final = frozenset(
    {"add_generation_prompt", "continue_final_message", "documents", "messages", "tools"}
)
# what clients say to every model, whether its template knows it or not
USUAL_VARIABLES: Final = frozenset({"enable_thinking", "reasoning_effort", "thinking"})
NO_EFFORT: Final = "none"  # the effort that turns thinking off


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """What follows from a conversation.

    Args:
        grammar: constrains the answer, after any reasoning; None: it is free.
        output_options: which parts of the output to parse; None: all text is content.
    """

    prompt: Prompt
    grammar: Grammar | None
    output_options: OutputOptions | None


def prepare_chat(
    messages: Messages,
    dialect: Dialect,
    *,
    tool_request: ToolRequest,
    grammar: Grammar | None = None,
    thinking: bool | None = None,
    effort: str | None = None,
    kwargs: dict[str, object] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    output_options: OutputOptions = DEFAULT_OPTIONS,
) -> ChatPrompt:
    """Everything that follows from a conversation.

    Args:
        tool_request: the tools, and whether one must be called.
        grammar: constrains the answer; a forced call has its own.
        thinking: whether the model is to think; None: as its template has it.
        effort: for the template; "none" turns thinking off.
        kwargs: further variables of the template, which win.
        add_generation_prompt: the prompt ends with the beginning of an assistant message; None:
            unless ``continue_final_message``.
        continue_final_message: the last message is the beginning of the answer.
        output_options: how reasoning is reported; the other fields are set here.

    Raises:
        RequestError: 400, as :func:`call_schema` and :func:`pack` do.
    """
    if tool_request.forced:
        choice = tool_request.choice
        schema = call_schema(tool_request.tools, choice.name, choice.parallel)
        grammar = "schema", json.dumps(schema)  # as long as tools may be
    elif grammar is None and any(tool.strict for tool in tool_request.tools):
        grammar = "calls", call_forms(dialect.call_text, tool_request.tools)
    variables = _thinking_variables(thinking, effort) | (kwargs or {})
    if continue_final_message:
        variables["continue_final_message"] = True
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    variables["add_generation_prompt"] = add_generation_prompt
    told, template_tools = with_tools_in_prompt(messages, tool_request, dialect)
    packed = pack(told, template_tools, variables)
    calls = "json" if tool_request.forced else dialect.calls if tool_request.tools else ""
    options = None
    if calls or dialect.reasoning:
        options = replace(
            output_options,
            calls=calls,
            tools=tool_request.tools,
            parallel=tool_request.choice.parallel,
            reasoning=dialect.reasoning,
            continued=messages[-1]["content"] if continue_final_message else "",
        )
    return ChatPrompt(prompt=Prompt(chat=packed), grammar=grammar, output_options=options)


def _thinking_variables(thinking: bool | None, effort: str | None) -> dict[str, object]:
    """The template variables that say whether, and how much, the model is to think."""
    if thinking is None and effort == NO_EFFORT:
        thinking = False
    variables: dict[str, object] = {}
    if thinking is not None:
        variables = {"enable_thinking": thinking, "thinking": thinking}
    if effort is not None and effort != NO_EFFORT:
        variables["reasoning_effort"] = effort
    return variables


def refuse_trailing_calls(messages: Messages, name: str) -> None:
    """Refuse to continue a message that ends with calls. Raises RequestError (400)."""
    if messages[-1].get("tool_calls"):
        reject(f"{name}: the last turn calls tools, so their results must follow", name)


def settable(variables: Collection[str]) -> list[str]:
    """Those that requests may set, of the variables of a template; sorted."""
    return sorted(USUAL_VARIABLES.union(variables) - OWN_VARIABLES)


def check_variables(kwargs: dict[str, object], variables: Collection[str], name: str) -> None:
    """Raises RequestError for a name that the template does not read, or that may not be set."""
    known = settable(variables)
    for key in kwargs:
        if key not in known:
            reject(f"{name}: {preview(key)} is not one of {', '.join(known)}", name)


def pack(
    conversation: list[dict[str, object]], tools: list[object] | None, kwargs: dict[str, object]
) -> bytes:
    """The ``chat`` field of a Tokenize message. All text in it has been validated."""
    whole = {"messages": conversation, "tools": tools, "kwargs": kwargs}
    try:
        return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    except RecursionError:
        reject("messages: nested too deeply", "messages")
