"""Validates Anthropic's requests: /v1/messages and /v1/messages/count_tokens.

Knows request bodies; messages are in :mod:`asyncllm.api.anthropic.messages`, answers in
:mod:`asyncllm.api.anthropic.reply`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import AfterValidator, Field

from asyncllm.api.anthropic.messages import (
    InputMessage,
    TextContent,
    conversation,
    system_text,
    with_recent_thoughts,
)
from asyncllm.api.common import sse, tool_request
from asyncllm.api.common.conversation import MAX_MESSAGES, with_system
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.other_fields import CACHE_CONTROL, LATE_TOOLS
from asyncllm.api.common.prepare import ChatPrompt, prepare_chat, refuse_trailing_calls
from asyncllm.api.common.request import GenerationRequest, ModelName, ServedModel, temperature
from asyncllm.api.common.request_model import (
    Float,
    Items,
    Positive,
    Range,
    RequestModel,
    StopString,
    Streamed,
    TaggedUnion,
    ToldObject,
    TopK,
    TopP,
    Unavailable,
    UnicodeStr,
    parse,
)
from asyncllm.api.common.response_format import SchemaObject, other_names
from asyncllm.api.common.tool_request import MAX_TOOLS, MAX_TOOLS_CHARS, ToolChoice, ToolRef
from asyncllm.api.common.validation import (
    MAX_STOP,
    MAX_STOP_CHARS,
    Body,
    reject,
)
from asyncllm.api.parsing.events import Tool
from asyncllm.api.parsing.output_parser import OutputOptions
from asyncllm.core.request import SamplingParams

_BILLING: Final = "nothing is billed"


class CustomTool(RequestModel):
    ignored: ClassVar = {
        **CACHE_CONTROL,
        **LATE_TOOLS,
        "eager_input_streaming": "arguments are streamed as they come",
    }
    type: Literal["custom"] = "custom"
    name: tool_request.ToolName
    description: UnicodeStr = ""
    input_schema: tool_request.ToolSchema
    strict: bool = False
    allowed_callers: tool_request.Callers | None = None
    input_examples: Items[ToldObject] = Field(default_factory=list)

    @property
    def tool(self) -> Tool:
        lines = [self.description] if self.description else []
        lines += [f"Input, for example: {sse.dumps(each)}" for each in self.input_examples]
        return Tool(self.name, self.input_schema, "\n".join(lines), self.strict)


def _offered(tools: list[CustomTool]) -> list[CustomTool]:
    tool_request.as_offered([each.tool for each in tools])
    return tools


class ModeChoice(RequestModel):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool = False

    @property
    def choice(self) -> ToolChoice:
        mode = "required" if self.type == "any" else self.type
        return ToolChoice(mode, parallel=not self.disable_parallel_tool_use)


class NamedChoice(RequestModel):
    type: Literal["tool"]
    name: UnicodeStr
    disable_parallel_tool_use: bool = False

    @property
    def choice(self) -> ToolChoice:
        ref = ToolRef(self.name)
        return ToolChoice("named", (ref,), parallel=not self.disable_parallel_tool_use)


class _Thinking(RequestModel):
    """Whether the model is to think, and whether that is shown."""

    ignored: ClassVar = {"block_binding": "reasoning is not checked"}
    display: Literal["summarized", "omitted"] = "summarized"


class ThinkingMode(_Thinking):
    type: Literal["adaptive", "disabled"]


class ThinkingBudget(_Thinking):
    type: Literal["enabled"]
    budget_tokens: Positive


class OutputFormat(RequestModel):
    type: Literal["json_schema"]
    grammar: SchemaObject = Field(alias="schema")


class OutputConfig(RequestModel):
    refused: ClassVar = {"task_budget": Unavailable("a task budget")}
    effort: UnicodeStr | None = None
    format: OutputFormat | None = None


class ThinkingTurns(RequestModel):
    type: Literal["thinking_turns"] = "thinking_turns"
    value: Positive


class AllThinking(RequestModel):
    type: Literal["all"]


class ClearThinking(RequestModel):
    type: Literal["clear_thinking_20251015"]
    keep: Annotated[
        Literal["all"] | ThinkingTurns | AllThinking, TaggedUnion("all, or an object")
    ] = Field(default_factory=lambda: ThinkingTurns(value=1))


class ContextManagement(RequestModel):
    edits: Items[
        Annotated[ClearThinking, TaggedUnion(other="edits of type {} are not available")]
    ] = Field(default_factory=list)


class CountRequest(RequestModel):
    refused: ClassVar = {
        "mcp_servers": Unavailable("MCP", []),
        "compaction": Unavailable("compaction"),
        "inference_geo": Unavailable("choosing where the model runs", "global"),
        "speed": Unavailable("choosing a speed", "standard"),
        **other_names("output_config.format"),
    }
    ignored: ClassVar = {
        "cache_control": "the prefix cache needs no hints",
        "service_tier": "there is only one service tier",
        "fallbacks": "there is only one model, and no policy by which it declines",
        "fallback_credit_token": _BILLING,
        "billing_policy": _BILLING,
        "user_profile_id": _BILLING,
        "workspace_id": _BILLING,
        "betas": "the fields of a beta are honoured or refused by name",
        "diagnostics": "it asks about the cache of Anthropic's servers",
    }
    model: ModelName = None
    messages: Annotated[Items[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="turns of user and assistant (and system); content is a string or blocks: text, "
        "thinking, redacted_thinking, tool_use, tool_result. An assistant turn at the end is the "
        "beginning of the answer"
    )
    system: TextContent = Field("", description="the system prompt: a string or text blocks")
    tools: Annotated[
        Items[Annotated[CustomTool, TaggedUnion(other="tools of type {} are not available")]],
        Field(max_length=MAX_TOOLS),
        AfterValidator(_offered),
    ] = Field(
        default_factory=list,
        description="{name, description, input_schema}: what the model may call, at most "
        f"{MAX_TOOLS} and {MAX_TOOLS_CHARS} characters of JSON",
    )
    tool_choice: Annotated[ModeChoice | NamedChoice, TaggedUnion()] | None = Field(
        None,
        description="{type: auto, any, tool or none, name, disable_parallel_tool_use}: a grammar "
        "forces any and tool; default: auto if there are tools",
    )
    thinking: Annotated[ThinkingMode | ThinkingBudget, TaggedUnion()] | None = Field(
        None,
        description="{type: enabled, budget_tokens}, adaptive or disabled; display: omitted hides it. "
        "Default: what the chat template does",
    )
    output_config: OutputConfig = Field(
        default_factory=OutputConfig,
        description="{effort, format}: effort is passed to the chat template; format {type: "
        "json_schema, schema}: the output is valid against the schema",
    )
    context_management: ContextManagement | None = Field(
        None,
        description="{edits: [{type: clear_thinking_20251015, keep}]}: reasoning is removed from all "
        "assistant turns but the last ones that have any (keep: {type: thinking_turns, value}; "
        "default: 1 turn; all: keep every turn)",
    )
    output_format: OutputFormat | None = Field(
        None, description="older name for output_config.format"
    )


class MessageRequest(CountRequest):
    refused: ClassVar = {**CountRequest.refused, "container": Unavailable("a container")}
    ignored: ClassVar = {**CountRequest.ignored, "metadata": "nothing is stored about users"}
    max_tokens: Positive = Field(description="maximum number of tokens to generate")
    stop_sequences: Annotated[Items[StopString], Field(max_length=MAX_STOP)] = Field(
        default_factory=list,
        description=f"at most {MAX_STOP} strings of at most {MAX_STOP_CHARS} characters; removed "
        "from the text",
    )
    temperature: Annotated[Float, Range(0, 1)] = Field(1.0, description="0: greedy")
    top_p: TopP = 1.0
    top_k: TopK = -1
    stream: Streamed = False


def messages(body: Body, served: ServedModel) -> GenerationRequest:
    """A /v1/messages body. Raises RequestError (400), NotAvailable (400), ModelNotFound (404)."""
    _refuse_thread(body)
    request = parse(MessageRequest, body, served).filled(served.defaults.sampling(body))
    made = _prepared(request, served)
    thinking = request.thinking
    params = SamplingParams(
        **served.defaults.beyond(MessageRequest.model_fields),
        stop=tuple(request.stop_sequences),
        max_new_tokens=request.max_tokens,
        temperature=temperature(request.temperature, request.top_p),
        top_p=request.top_p or 1.0,
        top_k=request.top_k or -1,
        grammar=made.grammar,
        max_thinking_tokens=thinking.budget_tokens
        if isinstance(thinking, ThinkingBudget)
        else None,
    )
    return GenerationRequest(
        prompts=(made.prompt,),
        params=params,
        seeded=False,
        stream=request.stream,
        add_special_tokens=False,
        output_options=made.output_options,
    )


def count(body: Body, served: ServedModel) -> bytes:
    """A /v1/messages/count_tokens body: the conversation for a Count message. Raises as above."""
    _refuse_thread(body)
    made = _prepared(parse(CountRequest, body, served), served)
    assert made.prompt.chat is not None
    return made.prompt.chat


def _refuse_thread(body: Body) -> None:
    """The SDK then sends the whole conversation itself. Raises NotAvailable (400)."""
    if body.get("thread") is not None:
        error = NotAvailable("thread: a stored conversation is not available on this server")
        error.details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise error


def _prepared(request: CountRequest, served: ServedModel) -> ChatPrompt:
    output, older, thinking = request.output_config, request.output_format, request.thinking
    if output.format is not None and older is not None:
        reject("output_config.format and output_format exclude each other", "output_format")
    form = output.format or older
    choice = None if request.tool_choice is None else request.tool_choice.choice
    turns = conversation(request.messages)
    edits = () if request.context_management is None else request.context_management.edits
    if kept := [edit.keep.value for edit in edits if isinstance(edit.keep, ThinkingTurns)]:
        turns = with_recent_thoughts(turns, min(kept))
    continue_final_message = turns[-1]["role"] == "assistant"
    if continue_final_message:
        refuse_trailing_calls(turns, "messages")
    return prepare_chat(
        with_system(system_text(request.system), turns),
        served.dialect,
        tool_request=tool_request.resolve([each.tool for each in request.tools], choice),
        grammar=None if form is None else form.grammar,
        thinking=None if thinking is None else thinking.type != "disabled",
        effort=output.effort,
        continue_final_message=continue_final_message,
        output_options=OutputOptions(hidden=thinking is not None and thinking.display == "omitted"),
    )
