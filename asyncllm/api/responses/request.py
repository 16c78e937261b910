"""OpenAI's Responses: /v1/responses bodies to checked requests.

Knows request bodies and conversations; answers are in :mod:`asyncllm.api.responses.reply`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, Field

from asyncllm.api.common import conversation, response_format, tool_request
from asyncllm.api.common.conversation import Messages, with_system
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.other_fields import FOR_OPENAI, IGNORED
from asyncllm.api.common.prepare import ChatPrompt, prepare_chat, refuse_trailing_calls
from asyncllm.api.common.request import GenerationRequest, ModelName, ServedModel, temperature
from asyncllm.api.common.request_model import (
    AnyObject,
    Float,
    Items,
    NumBest,
    Positive,
    Range,
    RequestModel,
    Streamed,
    TaggedUnion,
    TopP,
    Unavailable,
    UnicodeStr,
    parse,
)
from asyncllm.api.common.response_format import FreeFormat, Grammar, ObjectFormat, checked_schema
from asyncllm.api.common.tool_request import MAX_TOOLS, MAX_TOOLS_CHARS
from asyncllm.api.common.validation import Body, reject
from asyncllm.api.responses.items import Input, input_messages
from asyncllm.api.responses.store import ResponseStore
from asyncllm.api.responses.tools import (
    HOSTED,
    FlatChoice,
    FlatTools,
    ResponsesTools,
    echoed,
    responses_choice,
    responses_tools,
)
from asyncllm.core.request import SamplingParams

MAX_METADATA: Final = 16
MAX_METADATA_CHARS: Final = 512
LOGPROBS: Final = "message.output_text.logprobs"  # of ``include``


class FlatSchemaFormat(RequestModel):
    ignored: ClassVar = {
        "description": "it is not put into the prompt",
        "strict": response_format.ALWAYS_STRICT,
    }
    type: Literal["json_schema"]
    name: UnicodeStr
    json_schema: Annotated[AnyObject, AfterValidator(checked_schema)] = Field(alias="schema")

    @property
    def form(self) -> Grammar:
        return response_format.of_object(self.json_schema)


class TextOptions(RequestModel):
    """How the text is to be."""

    verbosity: Literal["low", "medium", "high"] | None = None
    format: Annotated[FreeFormat | ObjectFormat | FlatSchemaFormat, TaggedUnion()] = Field(
        default_factory=lambda: FreeFormat(type="text")
    )


class ReasoningOptions(RequestModel):
    refused: ClassVar = {
        "context": Unavailable("choosing which reasoning the prompt has", "auto"),
        "mode": Unavailable("a mode of reasoning", "standard"),
    }
    ignored: ClassVar = dict.fromkeys(
        ("summary", "generate_summary"), "there are no summaries: reasoning is whole"
    )
    effort: UnicodeStr | None = None


class PromptRequest(RequestModel):
    """What the prompt is made of: all of a /v1/responses/input_tokens body."""

    model: ModelName = None
    refused: ClassVar = {
        "truncation": Unavailable("prompt truncation per request", "disabled"),
        "conversation": Unavailable("a stored conversation (use previous_response_id)"),
        "prompt": Unavailable("a stored prompt"),
        "context_management": Unavailable("context management", []),
        "image": Unavailable("images", {}),
        "personality": Unavailable("a personality (use instructions)"),
        **response_format.other_names("text.format"),
    }
    input: Input = Field(
        description="a string, or an array of items: messages with role (user, assistant, system, "
        "developer) and content (string, or parts input_text and output_text), function_call, "
        "custom_tool_call, their outputs, reasoning, compaction"
    )
    instructions: UnicodeStr | None = Field(
        None, description="a system message before everything else"
    )
    previous_response_id: UnicodeStr | None = Field(
        None, description="continue from this stored response; its instructions do not carry over"
    )
    text: TextOptions = Field(
        default_factory=TextOptions,
        description="{format: {type: text, json_object or json_schema, name, schema}, verbosity}: "
        "the output is JSON, or valid against the schema; verbosity is passed to the chat template",
    )
    tools: FlatTools = Field(
        default_factory=list,
        description="{type: function, name, description, parameters}, {type: namespace, name, tools} "
        "of such, {type: custom, name, description, format}: what the model may call, at most "
        f"{MAX_TOOLS} and {MAX_TOOLS_CHARS} characters of JSON; tools that OpenAI runs "
        f"({', '.join(HOSTED)}) are left out under auto",
    )
    tool_choice: FlatChoice | None = Field(
        None,
        description="none, auto, required, {type: function or custom, name}, or {type: "
        "allowed_tools, mode, tools}: a grammar forces required and named calls; default: auto if there are tools",
    )
    parallel_tool_calls: bool = Field(True, description="false: the answer has at most one call")
    reasoning: ReasoningOptions = Field(
        default_factory=ReasoningOptions,
        description="effort is passed to the chat template; none: turns thinking off; there are no "
        "summaries",
    )


class ResponseRequest(PromptRequest):
    refused: ClassVar = {
        "background": Unavailable("answering in the background", False),
        **PromptRequest.refused,
        "background_options": Unavailable("answering in the background", {}),
        "moderation": Unavailable("moderation"),
        "access_programs": Unavailable("an access program"),
    }
    ignored: ClassVar = {
        "user": IGNORED["user"],
        **FOR_OPENAI,
        "max_tool_calls": "it limits calls of tools that OpenAI runs; none run here",
        "stream_options": "chunks are not padded",
    }
    store: bool = Field(
        True, description="keep the response in memory for previous_response_id and GET"
    )
    max_output_tokens: Positive | None = Field(
        None,
        description="maximum number of tokens to generate; default: as many as fit into the context",
    )
    temperature: Annotated[Float, Range(0, 2)] = Field(1.0, description="0: greedy")
    top_p: TopP = 1.0
    include: Items[UnicodeStr] = Field(
        default_factory=list,
        description=f"{LOGPROBS}: log-probabilities of an answer without tools and reasoning; "
        "any other value is accepted and adds nothing",
    )
    top_logprobs: NumBest = Field(
        0, description=f"also return this many most likely tokens; needs {LOGPROBS} in include"
    )
    metadata: Annotated[
        dict[str, Annotated[UnicodeStr, Field(max_length=MAX_METADATA_CHARS)]],
        Field(max_length=MAX_METADATA),
    ] = Field(
        default_factory=dict,
        description=f"at most {MAX_METADATA} strings, returned in the response",
    )
    stream: Streamed = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest:
    """A checked /v1/responses body.

    Args:
        messages: the conversation so far, without instructions, and with calls as the client knows
            them.
        echo: what the answer repeats of the request.
        tools: how the client calls what the model calls.
    """

    generation: GenerationRequest
    messages: Messages
    echo: dict[str, Any]
    tools: ResponsesTools


def read(body: Body, served: ServedModel, store: ResponseStore) -> ResponsesRequest:
    """A /v1/responses body.

    Raises:
        RequestError: 400, also for a previous response that is not stored. NotAvailable: 400.
        ModelNotFound: 404.
    """
    request = parse(ResponseRequest, body, served).filled(served.defaults.sampling(body))
    made, messages, given = _prepared(request, served, store)
    params = SamplingParams(
        **served.defaults.beyond(ResponseRequest.model_fields),
        top_p=request.top_p or 1.0,
        max_new_tokens=request.max_output_tokens,
        temperature=temperature(request.temperature, request.top_p),
        grammar=made.grammar,
        logprobs=_logprobs(request, made.output_options is not None),
    )
    generation = GenerationRequest(
        prompts=(made.prompt,),
        params=params,
        seeded=False,
        stream=request.stream,
        add_special_tokens=False,
        output_options=made.output_options,
        omitted_tools=given.hosted,
        fields={
            "prompt": "input",
            "messages": "input",
            "max_tokens": "max_output_tokens",
            "grammar": response_format.field_of(
                made.grammar, {"text.format": request.text.format.form}, "tools"
            ),
        },
    )
    return ResponsesRequest(
        generation=generation, messages=messages, echo=_echo(body, request), tools=given
    )


def count(body: Body, served: ServedModel, store: ResponseStore) -> bytes:
    """A /v1/responses/input_tokens body: the conversation for a Count message. Raises as above."""
    made, _, _ = _prepared(parse(PromptRequest, body, served), served, store)
    assert made.prompt.chat is not None
    return made.prompt.chat


def _prepared(
    request: PromptRequest, served: ServedModel, store: ResponseStore
) -> tuple[ChatPrompt, Messages, ResponsesTools]:
    """The prompt, the conversation it is of, and its tools."""
    previous, messages = request.previous_response_id, input_messages(request.input)
    if previous is not None:
        messages = store.messages(previous) + messages
    if len(messages) > conversation.MAX_MESSAGES:
        reject(f"input: {len(messages)} messages, at most {conversation.MAX_MESSAGES}", "input")
    refuse_trailing_calls(messages, "input")
    given, verbosity = responses_tools(request.tools), request.text.verbosity
    tools = tool_request.resolve(
        given.offered, responses_choice(request.tool_choice, given), request.parallel_tool_calls
    )
    has_verbosity = verbosity is not None and "verbosity" in served.dialect.variables
    made = prepare_chat(
        with_system(request.instructions, given.told(messages)),
        served.dialect,
        tool_request=tools,
        grammar=request.text.format.form,
        effort=request.reasoning.effort,
        kwargs={"verbosity": verbosity} if has_verbosity else None,
    )
    return made, messages, given


def _logprobs(request: ResponseRequest, parted: bool) -> int:
    """How many log-probabilities are wanted, as SamplingParams has it."""
    if LOGPROBS not in request.include:
        if request.top_logprobs:
            reject(f"top_logprobs needs {LOGPROBS} in include", "top_logprobs")
        return -1
    if parted:
        raise NotAvailable(
            "include: log-probabilities of answers with tools or reasoning are not available here",
            param="include",
        )
    return request.top_logprobs


def _echo(body: Body, request: ResponseRequest) -> dict[str, Any]:
    """What the answer repeats of the request."""
    same = (
        "instructions", "max_output_tokens", "metadata", "parallel_tool_calls",
        "previous_response_id", "store", "temperature", "top_p",
    )  # fmt: skip
    choice = body.get("tool_choice")
    return {name: getattr(request, name) for name in same} | {
        "reasoning": {"effort": request.reasoning.effort, "summary": None},
        "text": {"format": request.text.format.model_dump(by_alias=True)}
        | ({} if (said := request.text.verbosity) is None else {"verbosity": said}),
        "tool_choice": "auto" if choice is None else choice,
        "tools": [echoed(tool) for tool in body.get("tools") or ()],
        "top_logprobs": request.top_logprobs,
    }
