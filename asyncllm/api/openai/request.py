"""OpenAI's requests: /v1/completions and /v1/chat/completions bodies to checked generations.

The tables say which fields there are, with type, range, default and meaning. Knows request bodies;
answers are in :mod:`asyncllm.api.openai.completion_reply` and
:mod:`asyncllm.api.openai.chat_reply`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from asyncllm.api.common import prepare, response_format, tool_request, validation
from asyncllm.api.common.conversation import Messages
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.prepare import prepare_chat, refuse_trailing_calls
from asyncllm.api.common.request import GenerationRequest, Prompt, ServedModel, temperature
from asyncllm.api.common.tool_request import ToolChoice, ToolRequest
from asyncllm.api.common.validation import Body, Field, UnsupportedField, expect, reject
from asyncllm.api.openai import messages
from asyncllm.api.parsing.output_parser import OutputOptions
from asyncllm.core.request import SamplingParams

F = Field

COMMON: Final = (
    F(name="model", kind="string", doc="a name in /v1/models; missing or \"default\": the one served"),
    F(name="max_tokens", kind="integer", low=0, high=validation.MAX_INT32,
      doc="tokens to generate at most; absent: what fits into the context"),
    F(name="max_completion_tokens", kind="integer", low=0, high=validation.MAX_INT32,
      doc="the newer name of max_tokens; wins over it"),
    F(name="min_tokens", kind="integer", default=0, low=0, high=validation.MAX_INT32, to="min_new_tokens",
      doc="eos and stop tokens are banned before (extension)"),
    F(name="do_sample", kind="boolean", default=True,
      doc="false: greedy, whatever temperature, top_p and top_k say (extension, LightLLM's)"),
    F(name="temperature", kind="number", default=1.0, low=0, high=2, doc="0: greedy"),
    F(name="top_p", kind="number", default=1.0, low=0, high=1, above=True, to="top_p",
      doc="smallest set of tokens with this probability"),
    F(name="top_k", kind="integer", default=-1, low=-1, high=validation.MAX_INT32,
      doc="this many best tokens; -1 or 0: all (extension)"),
    F(name="min_p", kind="number", default=0.0, low=0, high=1, to="min_p",
      doc="tokens at least this share of the best one's probability (extension)"),
    F(name="presence_penalty", kind="number", default=0.0, low=-2, high=2, to="presence_penalty",
      doc="subtracted once from the logit of each generated token"),
    F(name="frequency_penalty", kind="number", default=0.0, low=-2, high=2, to="frequency_penalty",
      doc="subtracted per occurrence from the logit of each generated token"),
    F(name="repetition_penalty", kind="number", default=1.0, low=0, high=10, above=True,
      to="repetition_penalty",
      doc="divides positive, multiplies negative logits of prompt and generated tokens (extension)"),
    F(name="exponential_decay_length_penalty", kind="any", parse=validation.length_penalty,
      to="length_penalty",
      doc="[start, factor], factor in "
      f"[1, {validation.MAX_DECAY:g}]: after start tokens the end tokens' logits grow by "
      "abs(logit) * (factor^(generated - start) - 1), as in transformers (extension)"),
    F(name="logit_bias", kind="object", default=(), parse=validation.logit_bias, to="logit_bias",
      doc=f"{{\"token id\": bias}}, bias in [-100, 100], at most {validation.MAX_BIAS} entries"),
    F(name="allowed_token_ids", kind="any", default=(), parse=validation.allowed_ids,
      to="allowed_token_ids",
      doc=f"at most {validation.MAX_ALLOWED} ids: no others come, but end tokens unless ignore_eos; not "
      "with a grammar (extension)"),
    F(name="stop", kind="any", default=(), parse=validation.stop_strings, to="stop",
      doc=f"a string or at most {validation.MAX_STOP} of them, each of at most {validation.MAX_STOP_CHARS} "
      "characters; cut from the text. That of a special token stops at it, shown or not"),
    F(name="stop_token_ids", kind="any", default=(), parse=validation.stop_ids, to="stop_token_ids",
      doc=f"ids that end the text, at most {validation.MAX_STOP_IDS} (extension)"),
    F(name="ignore_eos", kind="boolean", default=False, to="ignore_eos",
      doc="go on after the end-of-sequence token (extension)"),
    F(name="seed", kind="integer", default=-1, low=-1, high=validation.MAX_SEED,
      doc="same seed, same tokens; choice i of n has seed + i; -1: draw one"),
    F(name="n", kind="integer", default=1, low=1, high=validation.MAX_N, doc="choices for each prompt"),
    F(name="skip_special_tokens", kind="boolean", default=True, to="skip_special_tokens",
      doc="leave special tokens out of the text (extension)"),
    F(name="response_format", kind="object", parse=response_format.response_format,
      doc="{type: text | json_object | json_schema, json_schema: {schema}}: the output is JSON, or "
      f"valid against the schema (at most {response_format.MAX_CHARS} characters)"),
    F(name="guided_json", kind="any", parse=response_format.schema,
      doc="a JSON schema, as an object or a string: the output is valid against it (extension)"),
    F(name="guided_regex", kind="string", parse=response_format.regex,
      doc="a regular expression that the whole output matches (extension)"),
    F(name="guided_grammar", kind="string", parse=response_format.ebnf,
      doc="rules in EBNF; the output is a `root`; json: any JSON object (extension)"),
    F(name="guided_choice", kind="array", parse=response_format.choice,
      doc=f"at most {response_format.MAX_CHOICES} strings, one of which is the output (extension)"),
    F(name="structured_outputs", kind="object", parse=response_format.structured,
      doc="{json, regex, choice, grammar or json_object}: the same under vLLM's newer name (extension)"),
    F(name="stream", kind="boolean", default=False, doc="answer as server-sent events"),
    F(name="stream_options", kind="object", doc="{include_usage, continuous_usage_stats}"),
)  # fmt: skip

STREAM_OPTIONS: Final = (
    F(name="include_usage", kind="boolean", default=False, doc="a chunk with the usage at the end"),
    F(name="continuous_usage_stats", kind="boolean", default=False,
      doc="the usage so far in every chunk (extension)"),
)  # fmt: skip

SOME_TOKENS: Final = "tokens to generate at most; absent: --completions_default_max_tokens, 16"

COMPLETION: Final = (
    *(replace(field, doc=SOME_TOKENS) if field.name == "max_tokens" else field for field in COMMON),
    F(name="prompt", kind="any", doc="a string, an array of strings, token ids, or an array of those; "
      f"at most {validation.MAX_PROMPTS} prompts"),
    F(name="echo", kind="boolean", default=False, doc="the prompt goes before the text"),
    F(name="logprobs", kind="integer", low=0, high=validation.MAX_LOGPROBS,
      doc="log-probability of each token and of this many best ones; with echo the prompt's too"),
    F(name="best_of", kind="integer", low=1, high=validation.MAX_N, doc="only equal to n"),
    F(name="add_special_tokens", kind="boolean", default=True,
      doc="the tokenizer may put a bos token before a text prompt (extension)"),
)  # fmt: skip

CHAT: Final = (
    *COMMON,
    F(name="messages", kind="array", parse=messages.messages,
      doc="the conversation: role and text content (string or text parts)"),
    F(name="logprobs", kind="boolean", default=False, doc="log-probability of each token"),
    F(name="top_logprobs", kind="integer", low=0, high=validation.MAX_LOGPROBS,
      doc="and of this many best ones; needs logprobs"),
    F(name="chat_template_kwargs", kind="object", default={}, parse=messages.template_kwargs,
      doc="variables for the chat template: those that it reads, enable_thinking, thinking and "
      "reasoning_effort (extension)"),
    F(name="add_generation_prompt", kind="boolean",
      doc="end the prompt with the head of an assistant turn; default true (extension)"),
    F(name="continue_final_message", kind="boolean", default=False,
      doc="the last message is the beginning of the answer (extension)"),
    F(name="reasoning_effort", kind="string", doc="handed to the chat template; none: thinking is off"),
    F(name="max_thinking_tokens", kind="integer", low=0, high=validation.MAX_INT32,
      doc="tokens of reasoning, after which its end is forced and the answer follows; not with "
      "allowed_token_ids (extension)"),
    F(name="tools", kind="array", parse=tool_request.tools,
      doc=f"functions the model may call, at most {tool_request.MAX_TOOLS} and {tool_request.MAX_TOOLS_CHARS} "
      "characters of JSON"),
    F(name="tool_choice", kind="any", parse=tool_request.choice,
      doc="none, auto, required, {type: function, function: {name}}, or {type: allowed_tools, "
      "allowed_tools: {mode, tools}}: a grammar forces required and named calls; default: auto if "
      "there are tools"),
    F(name="parallel_tool_calls", kind="boolean", default=True,
      doc="false: the first call is the only one in the answer"),
    F(name="functions", kind="array", parse=tool_request.functions,
      doc="the older name of tools: {name, description, parameters}; calls come as function_call"),
    F(name="function_call", kind="any", parse=tool_request.function_call,
      doc="none, auto or {name}; default: auto if there are functions"),
    F(name="separate_reasoning", kind="boolean", default=True,
      doc="false: reasoning goes into the content (extension)"),
    F(name="stream_reasoning", kind="boolean", default=True,
      doc="false: a stream has reasoning in one piece, once it has ended (extension)"),
)  # fmt: skip

GRAMMARS: Final = (
    "response_format", "guided_json", "guided_regex", "guided_grammar", "guided_choice",
    "structured_outputs",
)  # fmt: skip

UNAVAILABLE: Final = (
    UnsupportedField(name="regular_constraint", neutral=("",), doc="LightLLM's name of guided_regex"),
    UnsupportedField(name="bad_words", neutral=([],), doc="banning words (logit_bias bans tokens)"),
    UnsupportedField(name="use_beam_search", neutral=(False,), doc="beam search"),
    UnsupportedField(name="length_penalty", neutral=(1, 1.0), doc="beam search"),
    UnsupportedField(name="prompt_embeds", doc="a prompt of embeddings"),
    UnsupportedField(name="prompt_logprobs", neutral=(-1,),
            doc="prompt_logprobs (echo with logprobs gives them on /v1/completions)"),
    UnsupportedField(name="truncate_prompt_tokens", doc="truncating the prompt"),
    UnsupportedField(name="logits_processors", neutral=([],), doc="a logits processor"),
)  # fmt: skip

COMPLETION_UNAVAILABLE: Final = (
    *UNAVAILABLE,
    UnsupportedField(name="suffix", neutral=("",), doc="suffix"),
)

CHAT_UNAVAILABLE: Final = (
    *UNAVAILABLE,
    UnsupportedField(name="audio", doc="audio"),
    UnsupportedField(name="modalities", neutral=(["text"], []), doc="output other than text"),
    UnsupportedField(name="prediction", doc="predicted output"),
    UnsupportedField(name="web_search_options", doc="searching the web"),
    UnsupportedField(name="echo", neutral=(False,), doc="echo"),
    UnsupportedField(name="best_of", neutral=(1,), doc="best_of"),
    UnsupportedField(name="add_special_tokens", neutral=(False,), doc="adding special tokens to a chat"),
    UnsupportedField(name="chat_template", doc="a chat template of the request"),
    UnsupportedField(name="documents", neutral=([],), doc="documents"),
    UnsupportedField(name="mm_processor_kwargs", neutral=({},), doc="multimodal input"),
)  # fmt: skip


def completion(body: Body, served: ServedModel) -> GenerationRequest:
    """A /v1/completions body. Raises RequestError (400), NotAvailable (400),
    ModelNotFound (404)."""
    values = _read(COMPLETION, COMPLETION_UNAVAILABLE, body, served)
    if values["best_of"] not in (None, values["n"]):
        raise NotAvailable(
            f"best_of: {values['best_of']} with n {values['n']}; "
            "only best_of equal to n is available",
            param="best_of",
        )
    prompts = _prompts(values["prompt"], served)
    logprobs = -1 if values["logprobs"] is None else values["logprobs"]
    generation = _generation(
        values,
        served,
        prompts=prompts,
        logprobs=logprobs,
        prompt_logprobs=logprobs if values["echo"] else -1,
        grammar=response_format.only(values, GRAMMARS),
        echo=values["echo"],
        add_special_tokens=values["add_special_tokens"],
    )
    return replace(generation, usual_max=served.completion_tokens)


def chat(body: Body, served: ServedModel) -> GenerationRequest:
    """A /v1/chat/completions body. Raises as :func:`completion` does."""
    values = _read(CHAT, CHAT_UNAVAILABLE, body, served)
    if values["messages"] is None:
        reject("messages is missing", "messages")
    if values["top_logprobs"] and not values["logprobs"]:
        reject("top_logprobs needs logprobs: true", "top_logprobs")
    variables, name = served.dialect.variables, "chat_template_kwargs"
    prepare.check_variables(values[name], variables, name)
    if values["continue_final_message"]:
        _check_end(values["messages"], values["add_generation_prompt"])
    made = prepare_chat(
        values["messages"],
        served.dialect,
        tool_request=_tool_request(values),
        grammar=response_format.only(values, GRAMMARS),
        thinking=False if values["allowed_token_ids"] else None,  # they hold from the start
        effort=values["reasoning_effort"],
        kwargs=values["chat_template_kwargs"],
        add_generation_prompt=values["add_generation_prompt"],
        continue_final_message=values["continue_final_message"],
        output_options=OutputOptions(
            separate=values["separate_reasoning"], streamed=values["stream_reasoning"]
        ),
    )
    generation = _generation(
        values,
        served,
        prompts=(made.prompt,),
        logprobs=(values["top_logprobs"] or 0) if values["logprobs"] else -1,
        grammar=made.grammar,
        add_special_tokens=False,
    )
    most = values["max_thinking_tokens"]
    if most is not None and values["allowed_token_ids"]:
        reject(
            "max_thinking_tokens and allowed_token_ids exclude each other", "max_thinking_tokens"
        )
    params = replace(generation.params, max_thinking_tokens=most)
    old = bool(values["functions"])
    return replace(generation, params=params, output_options=made.output_options, functions=old)


def _read(
    table: tuple[Field, ...], refused: tuple[UnsupportedField, ...], body: Body, served: ServedModel
) -> dict[str, Any]:
    served.check_name(table[0].read(body))
    validation.refuse(refused, body)
    values = validation.read(table, body, silent=served.defaults.sampling(body))
    options = validation.read(STREAM_OPTIONS, values["stream_options"] or {}, "stream_options.")
    values.update(options)
    if values["stream_options"] is not None and not values["stream"]:
        reject("stream_options needs stream: true", "stream_options")
    if values["max_completion_tokens"] is not None:
        values["max_tokens"] = values["max_completion_tokens"]
    return values


def _generation(
    values: dict[str, Any],
    served: ServedModel,
    *,
    prompts: tuple[Prompt, ...],
    logprobs: int,
    prompt_logprobs: int = -1,
    grammar: response_format.Grammar | None,
    echo: bool = False,
    add_special_tokens: bool,
) -> GenerationRequest:
    most, least = values["max_tokens"], values["min_tokens"]
    if most is not None and least > most:
        reject(f"min_tokens: {least} is more than max_tokens {most}", "min_tokens")
    direct = validation.sampling(COMMON, values)
    served.check_ids(direct["stop_token_ids"], "stop_token_ids")
    served.check_ids(tuple(t for t, _ in direct["logit_bias"]), "logit_bias")
    served.check_ids(direct["allowed_token_ids"], "allowed_token_ids")
    response_format.without_tokens(grammar, direct["allowed_token_ids"], "allowed_token_ids")
    params = SamplingParams(
        **direct,
        max_new_tokens=most,
        temperature=temperature(values["temperature"]) if values["do_sample"] else 0.0,
        top_k=values["top_k"] or -1,
        penalize_prompt=values["repetition_penalty"] != 1.0,
        grammar=grammar,
        seed=max(values["seed"], 0),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    return GenerationRequest(
        prompts=prompts,
        params=params,
        seeded=values["seed"] >= 0,
        n=values["n"],
        stream=values["stream"],
        echo=echo,
        add_special_tokens=add_special_tokens,
        include_usage=values["include_usage"],
        continuous_usage=values["continuous_usage_stats"],
    )


def _prompts(value: Any, served: ServedModel) -> tuple[Prompt, ...]:
    """The four forms of ``prompt``."""
    if value is None:
        reject("prompt is missing", "prompt")
    if isinstance(value, str):
        return (Prompt(text=validation.text(value, "prompt")),)
    expect(value, list, "prompt", "a string, an array of strings, token ids, or an array of those")
    if not value:
        reject("prompt must not be empty", "prompt")
    if not isinstance(value[0], str | list):
        return (served.prompt_of(value, "prompt"),)
    if len(value) > validation.MAX_PROMPTS:
        reject(f"prompt: {len(value)} prompts, at most {validation.MAX_PROMPTS}", "prompt")
    if isinstance(value[0], str):
        return tuple(Prompt(text=validation.text(v, f"prompt[{i}]")) for i, v in enumerate(value))
    return tuple(served.prompt_of(v, f"prompt[{i}]") for i, v in enumerate(value))


def _tool_request(values: dict[str, Any]) -> ToolRequest:
    """Tools, or functions as they were called before."""
    wanted: ToolChoice | None = values["function_call"]
    if not values["functions"] and (wanted is None or wanted.mode != "named"):
        return tool_request.resolve(
            values["tools"], values["tool_choice"], values["parallel_tool_calls"]
        )
    if values["tools"] or values["tool_choice"] is not None:
        reject("functions and tools exclude each other", "functions")
    return tool_request.resolve(values["functions"], wanted, parallel=False)


def _check_end(messages: Messages, add_generation_prompt: bool | None) -> None:
    """Refuse what ``continue_final_message`` cannot go on with."""
    name = "continue_final_message"
    if add_generation_prompt:
        reject(f"{name} and add_generation_prompt exclude each other", name)
    if messages[-1]["role"] != "assistant":
        reject(f"{name} needs an assistant message at the end", name)
    refuse_trailing_calls(messages, name)
