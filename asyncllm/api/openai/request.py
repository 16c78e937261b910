"""OpenAI's requests: /v1/completions and /v1/chat/completions bodies to checked generations.

The models say which fields there are, with type, range, default and meaning. Knows request bodies;
answers are in :mod:`asyncllm.api.openai.completion_reply` and
:mod:`asyncllm.api.openai.chat_reply`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, TypedDict, TypeVar, Unpack

from annotated_types import Len
from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.json_schema import JsonSchemaValue

from asyncllm.api.common import prepare, response_format, tool_request
from asyncllm.api.common.conversation import Messages, TextPart, text_of
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.other_fields import (
    CHAT_IGNORED,
    CHAT_REFUSED,
    COMPLETION_REFUSED,
    IGNORED,
    REFUSED,
)
from asyncllm.api.common.prepare import prepare_chat, refuse_trailing_calls
from asyncllm.api.common.request import (
    GenerationRequest,
    ModelName,
    Prompt,
    ServedModel,
    served_by,
    temperature,
)
from asyncllm.api.common.request_model import (
    Checked,
    Float,
    Integer,
    Items,
    NonNegative,
    NumBest,
    NumChoices,
    Range,
    RepetitionPenalty,
    RequestModel,
    Seed,
    Streamed,
    TaggedUnion,
    ToldObject,
    UnicodeStr,
    WithSpecialTokens,
    parse,
)
from asyncllm.api.common.response_format import (
    MAX_CHARS,
    MAX_CHOICES,
    Choices,
    Grammar,
    GrammarText,
    ResponseFormat,
    SchemaOrText,
    StructuredOutputs,
    not_empty,
)
from asyncllm.api.common.sampling_fields import SamplingFields, Stop, Token
from asyncllm.api.common.tool_request import MAX_TOOLS, MAX_TOOLS_CHARS, ToolRequest
from asyncllm.api.common.validation import (
    MAX_INT32,
    MAX_LOGPROB_IDS,
    MAX_PROMPTS,
    MAX_STOP,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    Body,
    preview,
    reject,
    valid_text,
)
from asyncllm.api.openai.messages import ChatMessages, conversation, template_kwargs
from asyncllm.api.openai.tools import (
    ChatChoice,
    ChatCustomTool,
    ChatTools,
    FunctionCall,
    Functions,
    tool_choice,
)
from asyncllm.api.parsing.output_parser import OutputOptions
from asyncllm.core.request import SamplingParams

EXTENSIONS: Final = (
    "min_tokens", "do_sample", "top_k", "min_p", "repetition_penalty", "allowed_token_ids",
    "exponential_decay_length_penalty", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output", "return_token_ids", "return_tokens_as_token_ids",
    "guided_json", "guided_regex", "guided_grammar", "guided_choice", "structured_outputs",
    "logprob_token_ids", "add_special_tokens", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "max_thinking_tokens", "thinking_token_budget", "include_reasoning", "separate_reasoning", "stream_reasoning", "continuous_usage_stats",
)  # fmt: skip
R = TypeVar("R", bound="CommonRequest")
PredictedContent = Annotated[
    UnicodeStr | Items[TextPart], TaggedUnion("a string or an array of parts")
]


def _mark(schema: JsonSchemaValue) -> None:
    """Say what OpenAI does not have."""
    for name, field in schema["properties"].items():
        if name in EXTENSIONS and "enum" not in field:
            field["description"] += " (extension)"


class StreamOptions(RequestModel):
    model_config = ConfigDict(json_schema_extra=_mark)
    ignored: ClassVar = {"include_obfuscation": "chunks are not padded"}

    include_usage: bool = Field(False, description="send a chunk with the usage at the end")
    continuous_usage_stats: bool = Field(
        False, description="include the usage so far in every chunk"
    )


class CommonRequest(SamplingFields):
    """What both routes have."""

    model_config = ConfigDict(json_schema_extra=_mark)

    model: ModelName = None
    refused: ClassVar = REFUSED
    ignored: ClassVar = IGNORED
    max_tokens: NonNegative | None = Field(
        None,
        description="maximum number of tokens to generate; default: as many as fit into the context",
    )
    max_completion_tokens: NonNegative | None = Field(
        None, description="newer name for max_tokens; takes precedence"
    )
    min_tokens: NonNegative = Field(0, description="end and stop tokens are banned until then")
    do_sample: bool = Field(
        True, description="false: greedy, whatever temperature, top_p and top_k say"
    )
    temperature: Annotated[Float, Range(0, 2)] = Field(1.0, description="0: greedy")
    repetition_penalty: RepetitionPenalty = Field(
        1.0,
        description="divides positive logits of prompt and generated tokens, multiplies negative ones",
    )
    stop: Stop = Field(
        default_factory=list,
        description=f"a string or at most {MAX_STOP} of them, each of at most {MAX_STOP_CHARS} "
        "characters; removed from the text. The text of a special token stops at that token, even "
        "if special tokens are not shown",
    )
    stop_token_ids: Annotated[Items[Token], Field(max_length=MAX_STOP_IDS)] = Field(
        default_factory=list, description=f"ids that end the text, at most {MAX_STOP_IDS}"
    )
    include_stop_str_in_output: bool = Field(
        False,
        description="keep the stop string that ended the text, or the stop token unless it is a "
        "special one",
    )
    seed: Seed = Field(
        -1,
        description="same seed, same tokens, except for rounding; choice i of n uses seed + i; "
        "-1: a random seed",
    )
    n: NumChoices = Field(1, description="number of choices for each prompt")
    response_format: ResponseFormat | None = Field(
        None,
        description="{type: text, json_object or json_schema, json_schema: {schema}}: the output is "
        f"JSON, or valid against the schema (at most {MAX_CHARS} characters)",
    )
    guided_json: SchemaOrText = Field(
        None,
        description="a JSON schema, as an object or a string: the output is valid against it",
    )
    guided_regex: GrammarText = Field(
        "", description="a regular expression that the whole output matches"
    )
    guided_grammar: GrammarText = Field(
        "", description="EBNF rules; the output is a `root`; json: any JSON object"
    )
    guided_choice: Choices = Field(
        default_factory=list,
        description=f"at most {MAX_CHOICES} strings, one of which is the output",
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="vLLM's newer name for the above: {json, regex, choice, grammar or json_object}",
    )
    logprob_token_ids: Annotated[Items[Token], Field(max_length=MAX_LOGPROB_IDS)] = Field(
        default_factory=list,
        description=f"at most {MAX_LOGPROB_IDS} ids; return their log-probabilities at each position "
        "instead of those of the most likely tokens; needs logprobs",
    )
    return_token_ids: bool = Field(
        False, description="return token_ids and prompt_token_ids, like vLLM"
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="in log-probabilities, write tokens as token_id:ID instead of their text"
    )
    stream: Streamed = False
    stream_options: StreamOptions | None = Field(
        None, description="{include_usage, continuous_usage_stats}"
    )

    # on LightLLM's own routes empty ones are defaults, and mean none
    _not_empty = field_validator(
        "guided_json", "guided_regex", "guided_grammar", "guided_choice", "allowed_token_ids",
        mode="before",
    )(not_empty)  # fmt: skip

    def forms(self) -> dict[str, Grammar | None]:
        """The output's forms by the names of their fields. Raises RequestError."""
        given, structured = self.response_format, self.structured_outputs
        return {
            "response_format": None if given is None else given.form,
            "guided_json": self.guided_json,
            "guided_regex": response_format.regex(self.guided_regex),
            "guided_grammar": response_format.ebnf(self.guided_grammar),
            "guided_choice": response_format.choice(self.guided_choice),
            "structured_outputs": None
            if structured is None
            else structured.form("structured_outputs"),
        }


def _prompts(value: object, info: ValidationInfo) -> tuple[Prompt, ...]:
    """The four forms of ``prompt``. Raises RequestError."""
    served, words = (
        served_by(info),
        "a string, an array of strings, token ids, or an array of those",
    )
    if isinstance(value, str):
        return (Prompt(text=valid_text(value, "prompt")),)
    if not isinstance(value, list):
        reject(f"prompt must be {words}, not {preview(value)}", "prompt")
    if not value:
        reject("prompt must not be empty", "prompt")
    if not isinstance(value[0], str | list):
        return (served.prompt_of(value, "prompt"),)
    if len(value) > MAX_PROMPTS:
        reject(f"prompt: {len(value)} prompts, at most {MAX_PROMPTS}", "prompt")
    if isinstance(value[0], str):
        return tuple(Prompt(text=valid_text(v, f"prompt[{i}]")) for i, v in enumerate(value))
    return tuple(served.prompt_of(v, f"prompt[{i}]") for i, v in enumerate(value))


_Ids = Annotated[list[Token], Len(1)]
_Prompts = Annotated[list[str], Len(1, MAX_PROMPTS)] | Annotated[list[_Ids], Len(1, MAX_PROMPTS)]


class CompletionRequest(CommonRequest):
    refused: ClassVar = COMPLETION_REFUSED
    max_tokens: NonNegative | None = Field(
        None,
        description="maximum number of tokens to generate; default: "
        "--completions_default_max_tokens (16)",
    )
    prompt: Annotated[tuple[Prompt, ...], Checked(_prompts, str | _Ids | _Prompts)] = Field(
        description="a string, an array of strings, token ids, or an array of those; "
        f"at most {MAX_PROMPTS} prompts"
    )
    echo: bool = Field(False, description="return the prompt before the text")
    logprobs: NumBest | None = Field(
        None,
        description="log-probabilities of each token and of this many most likely ones; with echo "
        "also those of the prompt",
    )
    best_of: NumChoices | None = Field(None, description="must equal n")
    add_special_tokens: WithSpecialTokens = True


class Prediction(RequestModel):
    type: Literal["content"]
    content: PredictedContent


class ChatRequest(CommonRequest):
    refused: ClassVar = CHAT_REFUSED
    ignored: ClassVar = CHAT_IGNORED
    messages: ChatMessages = Field(
        description="the conversation: role and text content (string or text parts)"
    )
    logprobs: bool = Field(False, description="log-probability of each token")
    top_logprobs: NumBest = Field(
        0, description="and of this many most likely ones; needs logprobs"
    )
    chat_template_kwargs: ToldObject = Field(
        default_factory=dict,
        description="variables for the chat template: those that it reads, enable_thinking, thinking "
        "and reasoning_effort",
    )
    add_generation_prompt: bool | None = Field(
        None, description="end the prompt with the start of an assistant turn; default: true"
    )
    continue_final_message: bool = Field(
        False, description="the last message is the beginning of the answer"
    )
    reasoning_effort: UnicodeStr | None = Field(
        None, description="passed to the chat template; none: turns thinking off"
    )
    max_thinking_tokens: NonNegative | None = Field(
        None,
        description="maximum number of reasoning tokens; then the end of reasoning is forced and the "
        "answer follows; not with allowed_token_ids",
    )
    tools: ChatTools = Field(
        default_factory=list,
        description="what the model may call: {type: function, function: {name, description, "
        "parameters, strict}}, or for free text {type: custom, custom: {name, description, "
        f"format}}}}; at most {MAX_TOOLS} and {MAX_TOOLS_CHARS} characters of JSON",
    )
    tool_choice: ChatChoice | None = Field(
        None,
        description="none, auto, required, {type: function, function: {name}}, {type: custom, "
        "custom: {name}}, or {type: allowed_tools, allowed_tools: {mode, tools}}: a grammar forces required and named calls; "
        "default: auto if there are tools",
    )
    parallel_tool_calls: bool = Field(True, description="false: the answer has at most one call")
    functions: Functions = Field(
        default_factory=list,
        description="older name for tools: {name, description, parameters}; calls are returned as "
        "function_call",
    )
    function_call: FunctionCall | None = Field(
        None, description="none, auto or {name}; default: auto if there are functions"
    )
    prediction: Prediction | None = Field(
        None,
        description="{type: content, content}: a text that the answer may repeat, such as a file that "
        "it edits; a string or text parts. With --speculative ngram it is searched for drafts",
    )
    thinking_token_budget: Annotated[Integer, Range(-1, MAX_INT32)] | None = Field(
        None, description="vLLM's name for max_thinking_tokens; -1: no limit"
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(
        None, description="passed to the chat template, if it reads this variable"
    )
    include_reasoning: bool = Field(True, description="false: reasoning is not returned")
    separate_reasoning: bool = Field(True, description="false: reasoning is part of the content")
    stream_reasoning: bool = Field(
        True, description="false: a stream sends reasoning in one piece, when it has ended"
    )


def completion(body: Body, served: ServedModel) -> GenerationRequest:
    """A /v1/completions body. Raises RequestError (400), NotAvailable (400),
    ModelNotFound (404)."""
    request = _parse(CompletionRequest, body, served)
    if request.best_of not in (None, request.n):
        raise NotAvailable(
            f"best_of: {request.best_of} with n {request.n}; only best_of equal to n is available",
            param="best_of",
        )
    logprobs, forms = -1 if request.logprobs is None else request.logprobs, request.forms()
    grammar = response_format.only(forms)
    return _generation(
        request,
        served,
        prompts=request.prompt,
        logprobs=logprobs,
        prompt_logprobs=logprobs if request.echo else -1,
        grammar=grammar,
        fields={"grammar": response_format.field_of(grammar, forms)},
        echo=request.echo,
        add_special_tokens=request.add_special_tokens,
        usual_max=served.completion_tokens,
    )


def chat(body: Body, served: ServedModel) -> GenerationRequest:
    """A /v1/chat/completions body. Raises as :func:`completion` does."""
    request = _parse(ChatRequest, body, served)
    if request.top_logprobs and not request.logprobs:
        reject("top_logprobs needs logprobs: true", "top_logprobs")
    kwargs = template_kwargs(request.chat_template_kwargs)
    if request.verbosity is not None and "verbosity" in served.dialect.variables:
        kwargs.setdefault("verbosity", request.verbosity)
    prepare.check_variables(kwargs, served.dialect.variables, "chat_template_kwargs")
    messages = conversation(request.messages, served.dialect.roles)
    opening, continued = request.add_generation_prompt, request.continue_final_message
    if continued:
        _check_end(messages, opening)
    forms = request.forms()
    made = prepare_chat(
        messages,
        served.dialect,
        tool_request=_tool_request(request),
        grammar=response_format.only(forms),
        thinking=False if request.allowed_token_ids else None,  # they hold from the start
        effort=request.reasoning_effort,
        kwargs=kwargs,
        add_generation_prompt=opening,
        continue_final_message=continued,
        output_options=OutputOptions(
            separate=request.separate_reasoning,
            streamed=request.stream_reasoning,
            hidden=not request.include_reasoning,
        ),
    )
    return _generation(
        request,
        served,
        prompts=(made.prompt,),
        logprobs=request.top_logprobs if request.logprobs else -1,
        grammar=made.grammar,
        fields={
            "prompt": "messages",
            "grammar": response_format.field_of(
                made.grammar, forms, "functions" if request.functions else "tools"
            ),
        },
        max_thinking_tokens=_thinking_limit(request),
        add_special_tokens=False,
        output_options=made.output_options,
        functions=bool(request.functions),
        custom_tools=frozenset(
            each.custom.name for each in request.tools if isinstance(each, ChatCustomTool)
        ),
        prediction=None if request.prediction is None else text_of(request.prediction.content),
    )


def _thinking_limit(request: ChatRequest) -> int | None:
    """In tokens; None: there is none. Raises RequestError."""
    most, budget = request.max_thinking_tokens, request.thinking_token_budget
    name = "thinking_token_budget" if most is None else "max_thinking_tokens"
    if most is None and budget != -1:
        most = budget
    elif most is not None and budget not in (None, most):
        reject(f"{name}: {most} is not thinking_token_budget {budget}, its other name", name)
    if most is not None and request.allowed_token_ids:
        reject(f"{name} and allowed_token_ids exclude each other", name)
    return most


def _parse(model: type[R], body: Body, served: ServedModel) -> R:
    request = parse(model, body, served).filled(served.defaults.sampling(body))
    if request.stream_options is not None and not request.stream:
        reject("stream_options needs stream: true", "stream_options")
    return request


class _RouteFields(TypedDict, total=False):
    """What only one of the routes asks for."""

    echo: bool
    add_special_tokens: bool
    usual_max: int
    output_options: OutputOptions | None
    functions: bool
    custom_tools: frozenset[str]
    prediction: str | None


def _generation(
    request: CommonRequest,
    served: ServedModel,
    *,
    prompts: tuple[Prompt, ...],
    logprobs: int,
    prompt_logprobs: int = -1,
    grammar: Grammar | None,
    fields: dict[str, str],
    max_thinking_tokens: int | None = None,
    **more: Unpack[_RouteFields],
) -> GenerationRequest:
    most, least, stop = request.max_tokens, request.min_tokens, request.stop
    told = "max_tokens"
    if request.max_completion_tokens is not None:
        most, told = request.max_completion_tokens, "max_completion_tokens"
    if most is not None and least > most:
        reject(f"min_tokens: {least} is more than {told} {most}", "min_tokens")
    served.check_ids(request.stop_token_ids, "stop_token_ids")
    if ids := tuple(dict.fromkeys(request.logprob_token_ids)):
        served.check_ids(ids, "logprob_token_ids")
        if logprobs < 0:
            reject("logprob_token_ids needs logprobs", "logprob_token_ids")
        logprobs = len(ids)
    unchanged = request.unchanged(served)
    response_format.without_tokens(grammar, request.allowed_token_ids, "allowed_token_ids")
    params = SamplingParams(
        **unchanged,
        max_new_tokens=most,
        min_new_tokens=least,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop=request.include_stop_str_in_output,
        temperature=temperature(request.temperature, request.top_p) if request.do_sample else 0.0,
        top_k=request.top_k or -1,
        penalize_prompt=request.repetition_penalty != 1.0,
        grammar=grammar,
        max_thinking_tokens=max_thinking_tokens,
        seed=max(request.seed, 0),
        logprobs=logprobs,
        logprob_ids=ids,
        prompt_logprobs=prompt_logprobs,
    )
    options = request.stream_options or StreamOptions()
    return GenerationRequest(
        prompts=prompts,
        params=params,
        seeded=request.seed >= 0,
        n=request.n,
        stream=request.stream,
        include_usage=options.include_usage,
        continuous_usage=options.continuous_usage_stats,
        token_ids=request.return_token_ids,
        tokens_as_ids=request.return_tokens_as_token_ids,
        fields={**fields, "max_tokens": told},
        **more,
    )


def _tool_request(request: ChatRequest) -> ToolRequest:
    """Tools, or functions as they were called before."""
    choice, wanted = tool_choice(request.tool_choice), tool_choice(request.function_call)
    if not request.functions and (wanted is None or wanted.mode != "named"):
        tools = [each.tool for each in request.tools]
        return tool_request.resolve(tools, choice, request.parallel_tool_calls)
    if request.tools or choice is not None:
        reject("functions and tools exclude each other", "functions")
    functions = [each.tool for each in request.functions]
    return tool_request.resolve(functions, wanted, parallel=False, name="function_call")


def _check_end(messages: Messages, opening: bool | None) -> None:
    """Refuse what ``continue_final_message`` cannot go on with."""
    name = "continue_final_message"
    if opening:
        reject(f"{name} and add_generation_prompt exclude each other", name)
    if messages[-1]["role"] != "assistant":
        reject(f"{name} needs an assistant message at the end", name)
    refuse_trailing_calls(messages, name)
