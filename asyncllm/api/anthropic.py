"""Anthropic's requests: /v1/messages and /v1/messages/count_tokens bodies to checked requests.

Knows request bodies; answers are in :mod:`asyncllm.api.anthropic_reply`.
"""

from __future__ import annotations

from typing import Any, Final

from asyncllm.api import chatparts, fields
from asyncllm.api.errors import NotAvailable
from asyncllm.api.fields import Body, Field, Refused, bad, show, text, typed
from asyncllm.api.generation import Generation, Prompt, Served, temperature
from asyncllm.core.request import SamplingParams

F = Field


def conversation(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages in template form; neighbours of one role are one turn, as Anthropic has it."""
    if not value:
        bad(f"{name} must hold at least one message", name)
    if len(value) > chatparts.MAX_MESSAGES:
        bad(f"{name}: {len(value)} messages, at most {chatparts.MAX_MESSAGES}", name)
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(value):
        at = f"{name}[{i}]"
        typed(message, dict, at, "an object")
        role = message.get("role")
        if role not in ("user", "assistant"):
            bad(f"{at}.role: {show(role)} is not one of user, assistant", f"{at}.role")
        content = content_text(message.get("content"), f"{at}.content")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + content
        else:
            turns.append({"role": role, "content": content})
    return turns


def content_text(value: Any, name: str) -> str:
    """The text of a string or of text blocks. Raises RequestError or NotAvailable."""
    if isinstance(value, str):
        return text(value, name)
    typed(value, list, name, "a string or an array of blocks")
    return "\n".join(_block(block, f"{name}[{i}]") for i, block in enumerate(value))


def _block(value: Any, name: str) -> str:
    typed(value, dict, name, "an object")
    kind = value.get("type")
    if kind == "text":
        return text(value.get("text"), f"{name}.text")
    if not isinstance(kind, str):
        bad(f"{name}.type must be a string, not {show(kind)}", f"{name}.type")
    raise NotAvailable(
        f"{name}: blocks of type {show(kind)} are not available on this server; text is",
        param=f"{name}.type",
    )


def stop_sequences(value: Any, name: str) -> tuple[str, ...]:
    """A list of stop strings, within the limits."""
    return fields.stop_strings(value, name)


def _output(value: Any, name: str) -> None:
    if value.get("format") is not None:
        raise NotAvailable(
            f"{name}.format: structured output is not available on this server",
            param=f"{name}.format",
        )


PROMPT: Final = (
    F(name="model", kind="string", doc="a name in /v1/models; missing or \"default\": the one served"),
    F(name="messages", kind="array", parse=conversation, required=True,
      doc="turns of user and assistant; content is a string or text blocks. An assistant turn at the "
      "end is the beginning of the answer"),
    F(name="system", kind="any", parse=content_text, doc="the system prompt: a string or text blocks"),
)  # fmt: skip

MESSAGES: Final = (
    *PROMPT,
    F(name="max_tokens", kind="integer", low=1, high=fields.MAX_INT32, required=True,
      doc="tokens to generate at most"),
    F(name="stop_sequences", kind="array", default=(), parse=stop_sequences, to="stop",
      doc=f"at most {fields.MAX_STOP} strings of at most {fields.MAX_STOP_CHARS} characters; cut from "
      "the text"),
    F(name="temperature", kind="number", default=1.0, low=0, high=1, doc="0: greedy"),
    F(name="top_p", kind="number", default=1.0, low=0, high=1, above=True, to="top_p",
      doc="smallest set of tokens with this probability"),
    F(name="top_k", kind="integer", default=-1, low=-1, high=fields.MAX_INT32,
      doc="this many best tokens; -1 or 0: all"),
    F(name="metadata", kind="object", doc="ignored"),
    F(name="output_config", kind="object", parse=_output, doc="without format; effort is ignored"),
    F(name="stream", kind="boolean", default=False, doc="answer as server-sent events"),
)  # fmt: skip

PROMPT_UNAVAILABLE: Final = (
    Refused(name="tools", neutral=([],), doc="calling tools"),
    Refused(name="tool_choice", neutral=({"type": "none"},), doc="calling tools"),
    Refused(name="thinking", neutral=({"type": "disabled"},), doc="thinking"),
)  # fmt: skip

UNAVAILABLE: Final = (
    *PROMPT_UNAVAILABLE,
    Refused(name="output_format", doc="structured output"),
    Refused(name="container", doc="a container"),
    Refused(name="mcp_servers", neutral=([],), doc="MCP"),
)  # fmt: skip


def messages(body: Body, served: Served) -> Generation:
    """A /v1/messages body. Raises RequestError (400), NotAvailable (400), ModelNotFound (404)."""
    served.check_name(PROMPT[0].read(body))
    fields.refuse(UNAVAILABLE, body)
    values = fields.read(MESSAGES, body)
    params = SamplingParams(
        **fields.sampling(MESSAGES, values),
        max_new_tokens=values["max_tokens"],
        temperature=temperature(values["temperature"]),
        top_k=values["top_k"] or -1,
    )
    return Generation(
        prompts=(Prompt(chat=_pack(values)),),
        params=params,
        seeded=False,
        stream=values["stream"],
        add_special_tokens=False,
    )


def count(body: Body, served: Served) -> bytes:
    """A /v1/messages/count_tokens body: the conversation for a Count message. Raises as above."""
    served.check_name(PROMPT[0].read(body))
    fields.refuse(PROMPT_UNAVAILABLE, body)
    return _pack(fields.read(PROMPT, body))


def _pack(values: dict[str, Any]) -> bytes:
    turns: list[dict[str, Any]] = values["messages"]
    going_on = turns[-1]["role"] == "assistant"
    if values["system"]:
        turns = [{"role": "system", "content": values["system"]}, *turns]
    kwargs = {"add_generation_prompt": not going_on}
    if going_on:
        kwargs["continue_final_message"] = True
    return chatparts.pack(turns, None, kwargs)
