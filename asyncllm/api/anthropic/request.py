"""Anthropic's requests: /v1/messages and /v1/messages/count_tokens bodies to checked requests.

Knows request bodies; messages are read in :mod:`asyncllm.api.anthropic.messages`, answers are in
:mod:`asyncllm.api.anthropic.reply`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from asyncllm.api.anthropic import messages as anthropic_messages
from asyncllm.api.common import response_format, tool_request, validation
from asyncllm.api.common.conversation import with_system
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.prepare import ChatPrompt, prepare_chat, refuse_trailing_calls
from asyncllm.api.common.request import GenerationRequest, ServedModel, temperature
from asyncllm.api.common.response_format import Grammar
from asyncllm.api.common.validation import (
    Body,
    Field,
    UnsupportedField,
    expect,
    number,
    preview,
    reject,
    text,
)
from asyncllm.api.parsing.output_parser import OutputOptions
from asyncllm.core.request import SamplingParams

F = Field
THINKING: Final = ("enabled", "adaptive", "disabled")
DISPLAYS: Final = ("summarized", "omitted")


@dataclass(frozen=True, slots=True)
class ThinkingOptions:
    """What ``thinking`` asks for. ``most``: tokens of it, None: no limit."""

    on: bool
    most: int | None = None
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """What ``output_config`` asks for."""

    effort: str | None = None
    grammar: Grammar | None = None


def thinking(value: Any, name: str) -> ThinkingOptions:
    """Whether the model is to think, and for how long. Raises RequestError."""
    kind, display = value.get("type"), value.get("display")
    if kind not in THINKING:
        reject(f"{name}.type: {preview(kind)} is not one of {', '.join(THINKING)}", f"{name}.type")
    if display not in (None, *DISPLAYS):
        known = ", ".join(DISPLAYS)
        reject(f"{name}.display: {preview(display)} is not one of {known}", f"{name}.display")
    most = None
    if kind == "enabled":
        most = number(value.get("budget_tokens"), f"{name}.budget_tokens", integer=True)
        if not 1 <= most <= validation.MAX_INT32:
            limit = f"[1, {validation.MAX_INT32}]"
            reject(
                f"{name}.budget_tokens: {preview(most)} is not in {limit}", f"{name}.budget_tokens"
            )
    return ThinkingOptions(kind != "disabled", most, display == "omitted")


def output_format(value: Any, name: str) -> Grammar | None:
    """{type: json_schema, schema}. Raises RequestError."""
    if (kind := value.get("type")) != "json_schema":
        reject(f"{name}.type: {preview(kind)} is not json_schema", f"{name}.type")
    schema = expect(value.get("schema"), dict, f"{name}.schema", "an object")
    return response_format.schema(schema, f"{name}.schema")


def output_config(value: Any, name: str) -> Output:
    """{effort, format}. Raises RequestError."""
    effort, grammar = value.get("effort"), value.get("format")
    return Output(
        None if effort is None else text(effort, f"{name}.effort"),
        None
        if grammar is None
        else output_format(expect(grammar, dict, f"{name}.format", "an object"), f"{name}.format"),
    )


def stop_sequences(value: Any, name: str) -> tuple[str, ...]:
    """A list of stop strings, within the limits."""
    return validation.stop_strings(value, name)


PROMPT: Final = (
    F(name="model", kind="string", doc="a name in /v1/models; missing or \"default\": the one served"),
    F(name="messages", kind="array", parse=anthropic_messages.conversation, required=True,
      doc="turns of user and assistant (and system); content is a string or blocks: text, thinking, "
      "redacted_thinking, tool_use, tool_result. An assistant turn at the end is the beginning of the "
      "answer"),
    F(name="system", kind="any", parse=anthropic_messages.content_text,
      doc="the system prompt: a string or text blocks"),
    F(name="tools", kind="array", parse=tool_request.custom_tools,
      doc=f"{{name, description, input_schema}}: what the model may call, at most {tool_request.MAX_TOOLS} and "
      f"{tool_request.MAX_TOOLS_CHARS} characters of JSON"),
    F(name="tool_choice", kind="object", parse=tool_request.custom_choice,
      doc="{type: auto, any, tool or none, name, disable_parallel_tool_use}: a grammar forces any and "
      "tool; default: auto if there are tools"),
    F(name="thinking", kind="object", parse=thinking,
      doc="{type: enabled, budget_tokens}, adaptive or disabled; display: omitted does not show it. "
      "Absent: as the chat template has it"),
    F(name="output_config", kind="object", default=Output(), parse=output_config,
      doc="{effort, format}: effort is handed to the chat template; format {type: json_schema, schema}: "
      "the output is valid against the schema"),
    F(name="output_format", kind="object", parse=output_format,
      doc="the older name of output_config.format"),
)  # fmt: skip

MESSAGES: Final = (
    *PROMPT,
    F(name="max_tokens", kind="integer", low=1, high=validation.MAX_INT32, required=True,
      doc="tokens to generate at most"),
    F(name="stop_sequences", kind="array", default=(), parse=stop_sequences, to="stop",
      doc=f"at most {validation.MAX_STOP} strings of at most {validation.MAX_STOP_CHARS} characters; cut from "
      "the text"),
    F(name="temperature", kind="number", default=1.0, low=0, high=1, doc="0: greedy"),
    F(name="top_p", kind="number", default=1.0, low=0, high=1, above=True, to="top_p",
      doc="smallest set of tokens with this probability"),
    F(name="top_k", kind="integer", default=-1, low=-1, high=validation.MAX_INT32,
      doc="this many best tokens; -1 or 0: all"),
    F(name="metadata", kind="object", doc="ignored"),
    F(name="stream", kind="boolean", default=False, doc="answer as server-sent events"),
)  # fmt: skip

UNAVAILABLE: Final = (
    UnsupportedField(name="container", doc="a container"),
    UnsupportedField(name="mcp_servers", neutral=([],), doc="MCP"),
)  # fmt: skip


def messages(body: Body, served: ServedModel) -> GenerationRequest:
    """A /v1/messages body. Raises RequestError (400), NotAvailable (400), ModelNotFound (404)."""
    served.check_name(PROMPT[0].read(body))
    _refuse_thread(body)
    validation.refuse(UNAVAILABLE, body)
    values = validation.read(MESSAGES, body, silent=served.defaults.sampling(body))
    made = _prepared(values, served)
    params = SamplingParams(
        **validation.sampling(MESSAGES, values),
        **served.defaults.beyond(MESSAGES),
        max_new_tokens=values["max_tokens"],
        temperature=temperature(values["temperature"]),
        top_k=values["top_k"] or -1,
        grammar=made.grammar,
        max_thinking_tokens=None if values["thinking"] is None else values["thinking"].most,
    )
    return GenerationRequest(
        prompts=(made.prompt,),
        params=params,
        seeded=False,
        stream=values["stream"],
        add_special_tokens=False,
        output_options=made.output_options,
    )


def count(body: Body, served: ServedModel) -> bytes:
    """A /v1/messages/count_tokens body: the conversation for a Count message. Raises as above."""
    served.check_name(PROMPT[0].read(body))
    made = _prepared(validation.read(PROMPT, body), served)
    assert made.prompt.chat is not None
    return made.prompt.chat


def _refuse_thread(body: Body) -> None:
    """The SDK then sends the whole conversation itself. Raises NotAvailable (400)."""
    if body.get("thread") is not None:
        error = NotAvailable("thread: a stored conversation is not available on this server")
        error.details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise error


def _prepared(values: dict[str, Any], served: ServedModel) -> ChatPrompt:
    output: Output = values["output_config"]
    thoughts: ThinkingOptions | None = values["thinking"]
    if output.grammar is not None and values["output_format"] is not None:
        reject("output_config.format and output_format exclude each other", "output_format")
    grammar = output.grammar or values["output_format"]
    tools = tool_request.resolve(values["tools"], values["tool_choice"])
    messages = values["messages"]
    continue_final_message = messages[-1]["role"] == "assistant"
    if continue_final_message:
        refuse_trailing_calls(messages, "messages")
    return prepare_chat(
        with_system(values["system"], messages),
        served.dialect,
        tool_request=tools,
        grammar=grammar,
        thinking=None if thoughts is None else thoughts.on,
        effort=output.effort,
        continue_final_message=continue_final_message,
        output_options=OutputOptions(hidden=thoughts is not None and thoughts.hidden),
    )
