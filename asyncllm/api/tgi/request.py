"""Validates text-generation-inference's requests on LightLLM's native routes (--use_tgi_api).

A body has the parameters of /generate, less a few, and those of :class:`TgiParameters`. Knows
request bodies; answers are in :mod:`asyncllm.api.tgi.reply`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from asyncllm.api.common import response_format
from asyncllm.api.common.request import GenerationRequest, ServedModel
from asyncllm.api.common.request_model import (
    Integer,
    NumBest,
    NumChoices,
    Positive,
    Range,
    RequestModel,
    TaggedUnion,
    Unavailable,
    parse,
)
from asyncllm.api.common.response_format import Grammar, GrammarText, SchemaOrText
from asyncllm.api.common.sampling_fields import Stop
from asyncllm.api.common.validation import (
    MAX_STOP,
    Body,
    reject,
)
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.lightllm.request import AT, FORMS, CommonParameters, InputsRequest

MAX_SEED: Final = 2**64 - 1
_FORMS: Final = (*FORMS, "grammar")
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p")


class JsonForm(RequestModel):
    type: Literal["json", "json_schema"]
    value: SchemaOrText

    @property
    def form(self) -> Grammar | None:
        return self.value


class RegexForm(RequestModel):
    type: Literal["regex"]
    value: GrammarText

    @property
    def form(self) -> Grammar | None:
        return response_format.regex(self.value)


class TgiParameters(CommonParameters):
    refused: ClassVar = {
        **{name: why for name, why in CommonParameters.refused.items() if name != "grammar"},
        **response_format.other_names(", ".join(_FORMS), *_FORMS),
        "typical_p": Unavailable("typical decoding", 1, 1.0),
        "watermark": Unavailable("a watermark", False),
        "adapter_id": Unavailable("a LoRA adapter", ""),
        "n": Unavailable("n above 1 (use best_of)", 1),
        "token_healing_top_k": Unavailable("token healing", 0),
        "token_healing_unmerge_last_token": Unavailable("token healing", 0, False),
    }
    do_sample: bool = Field(
        False,
        description="sample; also implied by a temperature, top_k, top_p or min_p other than the "
        "default",
    )
    input_penalty: bool = Field(
        True, description="repetition_penalty counts the prompt's tokens too"
    )
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the text")
    best_of: NumChoices | None = Field(
        None,
        description="generate this many and return the one with the best mean log-probability; 1 on "
        "streams",
    )
    seed: Annotated[Integer, Range(0, MAX_SEED)] | None = Field(
        None, description="same seed, same tokens, except for rounding; default: a random seed"
    )
    stop: Stop = Field(
        default_factory=list,
        description=f"at most {MAX_STOP} strings; removed from the text",
    )
    truncate: Positive | None = Field(
        None, description="use only this many of the prompt's last tokens"
    )
    return_full_text: bool = Field(False, description="put the prompt before the generated text")
    details: bool = Field(False, description="return details")
    return_details: bool = Field(False, description="LightLLM's name for details")
    decoder_input_details: bool = Field(
        False,
        description="return the prompt's tokens and log-probabilities too; needs details; not on streams",
    )
    top_n_tokens: NumBest = Field(
        0, description="return this many most likely tokens at each position"
    )
    grammar: Annotated[JsonForm | RegexForm, TaggedUnion()] | None = Field(
        None,
        description="{type: json, json_schema or regex, value}: a JSON schema, or a regular "
        "expression, for the output",
    )

    def forms(self) -> dict[str, Grammar | None]:
        """The output's forms by the names of their fields."""
        return super().forms() | {"grammar": None if self.grammar is None else self.grammar.form}


class TgiNativeRequest(InputsRequest):
    num_beam: NumChoices | None = Field(None, description="LightLLM's name for parameters.best_of")
    parameters: TgiParameters = Field(
        default_factory=TgiParameters, description="see the next table"
    )


class TgiNativeAnyRequest(TgiNativeRequest):
    stream: bool = Field(False, description="as /generate_stream")


@dataclass(frozen=True, slots=True, kw_only=True)
class TgiRequest:
    """A checked request.

    Args:
        prefill: the prompt's tokens are wanted in the details.
        prompt_scores: the prompt's log-probabilities are wanted as LightLLM gives them.
    """

    generation: GenerationRequest
    prefill: bool
    prompt_scores: bool


def generate(body: Body, served: ServedModel, *, stream: bool) -> TgiRequest:
    """A /generate or /generate_stream body. Raises RequestError or NotAvailable (400)."""
    request = parse(TgiNativeRequest, body, served)
    given = request.parameters
    sampled = any(getattr(given, n) != TgiParameters.model_fields[n].default for n in _SAMPLING)
    parameters = given.filled(served.defaults.greedy())
    parameters.check()
    best_of = parameters.best_of or request.num_beam or 1
    details = parameters.details or parameters.return_details
    prefill, stop = parameters.decoder_input_details, parameters.stop
    if stream and best_of > 1:
        reject(f"{AT}best_of: {best_of} choices cannot be streamed, 1 can", f"{AT}best_of")
    if prefill and (stream or not details):
        name = f"{AT}decoder_input_details"
        reject(f"{name}: needs details, and an answer that is not a stream", name)
    if stop and parameters.stop_sequences is not None:
        reject(f"{AT}stop and {AT}stop_sequences exclude each other", f"{AT}stop")
    scored = parameters.prompt_logprobs
    generation = lightllm.generation(
        parameters,
        request.inputs,
        served,
        stream=stream,
        n=best_of,
        seed=-1 if parameters.seed is None else parameters.seed,
        details=details,
        sampled=parameters.do_sample or sampled,
        stops=parameters.stop_sequences if not stop else stop if isinstance(stop, str) else [*stop],
        forms=parameters.forms(),
        logprobs=parameters.top_n_tokens,
        prompt_logprobs=max(scored, 0) if prefill else scored,
        truncate=parameters.truncate or 0,
    )
    return TgiRequest(
        generation=replace(generation, echo=parameters.return_full_text),
        prefill=prefill,
        prompt_scores=scored >= 0,
    )
