"""Validates OpenAI's /v1/responses requests.

Knows request bodies and conversations; answers are in :mod:`asyncllm.api.responses.reply`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

from asyncllm.api.common import conversation, response_format, tool_request, validation
from asyncllm.api.common.conversation import Messages, with_system
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.prepare import prepare_chat, refuse_trailing_calls
from asyncllm.api.common.request import GenerationRequest, ServedModel, temperature
from asyncllm.api.common.response_format import Grammar
from asyncllm.api.common.validation import (
    Body,
    Field,
    UnsupportedField,
    expect,
    preview,
    reject,
    text,
)
from asyncllm.api.responses.items import input_messages
from asyncllm.api.responses.store import Store
from asyncllm.api.responses.tools import HOSTED, ResponsesTools, responses_choice, responses_tools
from asyncllm.core.request import SamplingParams

F = Field
MAX_METADATA: Final = 16
MAX_METADATA_CHARS: Final = 512
VERBOSITIES: Final = ("low", "medium", "high")
LOGPROBS: Final = "message.output_text.logprobs"  # of ``include``


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What ``text`` asks for, and its format as it comes back."""

    grammar: Grammar | None = None
    verbosity: str | None = None
    given: dict[str, Any] = field(default_factory=lambda: {"type": "text"})


def text_options(value: Any, name: str) -> TextOptions:
    """{format, verbosity}. Raises RequestError, NotAvailable (400)."""
    verbosity = value.get("verbosity")
    if verbosity is not None and verbosity not in VERBOSITIES:
        known = ", ".join(VERBOSITIES)
        reject(f"{name}.verbosity: {preview(verbosity)} is not one of {known}", f"{name}.verbosity")
    return replace(_format(value.get("format"), name), verbosity=verbosity)


def _format(given: Any, name: str) -> TextOptions:
    if given is None:
        return TextOptions()
    at = f"{name}.format"
    expect(given, dict, at, "an object")
    match kind := given.get("type"):
        case "text":
            return TextOptions()
        case "json_object":
            return TextOptions(("json", ""), given={"type": kind})
        case "json_schema":
            called = text(given.get("name"), f"{at}.name")
            schema = expect(given.get("schema"), dict, f"{at}.schema", "an object")
            grammar = response_format.schema(schema, f"{at}.schema")
            told = {"type": kind, "name": called, "schema": schema}
            return TextOptions(grammar, given=told)
        case _:
            known = "text, json_object, json_schema"
            reject(f"{at}.type: {preview(kind)} is not one of {known}", f"{at}.type")


def effort(value: Any, name: str) -> str | None:
    """The effort of {effort, summary}. Raises RequestError."""
    given = value.get("effort")
    return None if given is None else text(given, f"{name}.effort")


def metadata(value: Any, name: str) -> dict[str, str]:
    """A few short strings by name."""
    if len(value) > MAX_METADATA:
        reject(f"{name}: {len(value)} entries, at most {MAX_METADATA}", name)
    for key, item in value.items():
        if len(text(item, f"{name}[{preview(key)}]")) > MAX_METADATA_CHARS:
            reject(f"{name}: a value of {len(item)} characters, at most {MAX_METADATA_CHARS}", name)
    return dict(value)


def include(value: Any, name: str) -> bool:
    """Whether log-probabilities are to be included. Raises RequestError."""
    return LOGPROBS in [text(each, f"{name}[{i}]") for i, each in enumerate(value)]


RESPONSES: Final = (
    F(name="model", kind="string", doc="a name in /v1/models; missing or \"default\": the one served"),
    F(name="input", kind="any", parse=input_messages, required=True,
      doc="a string, or an array of items: messages with role (user, assistant, system, developer) and "
      "content (string, or parts input_text and output_text), function_call, custom_tool_call, their "
      "outputs, reasoning, compaction"),
    F(name="instructions", kind="string", doc="a system message before everything else"),
    F(name="previous_response_id", kind="string",
      doc="go on from this stored response; its instructions do not count"),
    F(name="store", kind="boolean", default=True,
      doc="keep the response in memory for previous_response_id and GET"),
    F(name="max_output_tokens", kind="integer", low=1, high=validation.MAX_INT32,
      doc="tokens to generate at most; absent: what fits into the context"),
    F(name="temperature", kind="number", default=1.0, low=0, high=2, doc="0: greedy"),
    F(name="top_p", kind="number", default=1.0, low=0, high=1, above=True, to="top_p",
      doc="smallest set of tokens with this probability"),
    F(name="text", kind="object", default=TextOptions(), parse=text_options,
      doc="{format: {type: text, json_object or json_schema, name, schema}, verbosity}: the output is "
      "JSON, or valid against the schema; verbosity is handed to the chat template"),
    F(name="tools", kind="array", default=ResponsesTools(), parse=responses_tools,
      doc=f"{{type: function, name, description, parameters}}, {{type: namespace, name, tools}} of "
      "such, {type: custom, name, description, format}: what the model may call, at most "
      f"{tool_request.MAX_TOOLS} and {tool_request.MAX_TOOLS_CHARS} characters of JSON; tools that "
      f"OpenAI runs ({', '.join(HOSTED)}) are left out under auto"),
    F(name="tool_choice", kind="any",
      doc="none, auto, required, {type: function or custom, name}, or {type: allowed_tools, mode, "
      "tools}: a grammar forces required and named calls; default: auto if there are tools"),
    F(name="parallel_tool_calls", kind="boolean", default=True,
      doc="false: the first call is the only one in the answer"),
    F(name="reasoning", kind="object", parse=effort,
      doc="effort is handed to the chat template, none: thinking is off; there are no summaries"),
    F(name="include", kind="array", parse=include,
      doc=f"{LOGPROBS}: log-probabilities of an answer without tools and reasoning; anything else has "
      "nothing to include"),
    F(name="top_logprobs", kind="integer", low=0, high=validation.MAX_LOGPROBS,
      doc=f"and of this many best tokens; needs {LOGPROBS} in include"),
    F(name="metadata", kind="object", default={}, parse=metadata,
      doc=f"at most {MAX_METADATA} strings, which come back"),
    F(name="stream", kind="boolean", default=False, doc="answer as server-sent events"),
)  # fmt: skip

UNAVAILABLE: Final = (
    UnsupportedField(name="background", neutral=(False,), doc="answering in the background"),
    UnsupportedField(name="truncation", neutral=("disabled",), doc="truncating the prompt"),
    UnsupportedField(name="conversation", doc="a stored conversation (previous_response_id is there)"),
    UnsupportedField(name="prompt", doc="a stored prompt"),
    UnsupportedField(name="context_management", neutral=([],), doc="context management"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """A checked /v1/responses body.

    Args:
        messages: the conversation so far, without instructions.
        echo: what the answer repeats of the request.
        tools: how the client calls what the model calls.
    """

    generation: GenerationRequest
    messages: Messages
    echo: dict[str, Any]
    tools: ResponsesTools


def read(body: Body, served: ServedModel, store: Store) -> ResponsesRequest:
    """A /v1/responses body.

    Raises:
        RequestError: 400, also for a previous response that is not stored. NotAvailable: 400.
        ModelNotFound: 404.
    """
    served.check_name(RESPONSES[0].read(body))
    validation.refuse(UNAVAILABLE, body)
    values = validation.read(RESPONSES, body, silent=served.defaults.sampling(body))
    previous = values["previous_response_id"]
    messages = values["input"] if previous is None else store.messages(previous) + values["input"]
    if len(messages) > conversation.MAX_MESSAGES:
        reject(f"input: {len(messages)} messages, at most {conversation.MAX_MESSAGES}", "input")
    refuse_trailing_calls(messages, "input")
    options: TextOptions = values["text"]
    given: ResponsesTools = values["tools"]
    choice = responses_choice(values["tool_choice"], given, "tool_choice")
    tools = tool_request.resolve(given.offered, choice, values["parallel_tool_calls"])
    has_verbosity = options.verbosity and "verbosity" in served.dialect.variables
    made = prepare_chat(
        with_system(values["instructions"], messages),
        served.dialect,
        tool_request=tools,
        grammar=options.grammar,
        effort=values["reasoning"],
        kwargs={"verbosity": options.verbosity} if has_verbosity else None,
    )
    params = SamplingParams(
        **validation.sampling(RESPONSES, values),
        **served.defaults.beyond([field.name for field in RESPONSES]),
        max_new_tokens=values["max_output_tokens"],
        temperature=temperature(values["temperature"]),
        grammar=made.grammar,
        logprobs=_logprobs(values, made.output_options is not None),
    )
    generation = GenerationRequest(
        prompts=(made.prompt,),
        params=params,
        seeded=False,
        stream=values["stream"],
        add_special_tokens=False,
        output_options=made.output_options,
        omitted_tools=given.hosted,
    )
    return ResponsesRequest(
        generation=generation, messages=messages, echo=_echo(body, values), tools=given
    )


def _logprobs(values: dict[str, Any], parted: bool) -> int:
    """How many log-probabilities are wanted, as SamplingParams has it."""
    most = values["top_logprobs"] or 0
    if not values["include"]:
        if most:
            reject(f"top_logprobs needs {LOGPROBS} in include", "top_logprobs")
        return -1
    if parted:
        raise NotAvailable(
            "include: log-probabilities of answers with tools or reasoning are not available here",
            param="include",
        )
    return most


def _echo(body: Body, values: dict[str, Any]) -> dict[str, Any]:
    """What the answer repeats of the request."""
    same = (
        "instructions", "max_output_tokens", "metadata", "parallel_tool_calls",
        "previous_response_id", "store", "temperature", "top_p",
    )  # fmt: skip
    choice = body.get("tool_choice")
    return {name: values[name] for name in same} | {
        "reasoning": {"effort": values["reasoning"], "summary": None},
        "text": {"format": values["text"].given}
        | ({} if (said := values["text"].verbosity) is None else {"verbosity": said}),
        "tool_choice": "auto" if choice is None else choice,
        "tools": list(values["tools"].echo),
        "top_logprobs": values["top_logprobs"] or 0,
    }
