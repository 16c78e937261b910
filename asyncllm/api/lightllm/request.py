"""LightLLM's native requests: /generate, /generate_stream,
/ and /tokens bodies to checked requests.

Knows request bodies; answers are in :mod:`asyncllm.api.lightllm.reply`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final, TypedDict

from annotated_types import Len, MaxLen
from pydantic import Field, ValidationInfo

from asyncllm.api.common import response_format
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.request import (
    GenerationRequest,
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
    NumChoices,
    Positive,
    Range,
    RequestModel,
    Seed,
    StopString,
    TaggedUnion,
    Unavailable,
    UnicodeStr,
    WithSpecialTokens,
    parse,
)
from asyncllm.api.common.response_format import MAX_CHARS, Grammar, GrammarText, SchemaOrText
from asyncllm.api.common.sampling_fields import SamplingFields, Token
from asyncllm.api.common.validation import (
    MAX_LOGPROBS,
    MAX_STOP,
    Body,
    preview,
    reject,
    valid_text,
)
from asyncllm.core.request import SamplingParams

AT: Final = "parameters."
FORMS: Final = ("regular_constraint", "guided_json", "guided_grammar")
MAX_SEQUENCE: Final = 256  # token ids in one stop sequence
_FIELDS: Final = {"prompt": "inputs", "max_tokens": f"{AT}max_new_tokens"}

_StopItem = Annotated[
    StopString | Annotated[Items[Token], Len(1, MAX_SEQUENCE)],
    TaggedUnion("a string or an array of token ids"),
]
StopSequences = Annotated[
    StopString | Annotated[Items[_StopItem], MaxLen(MAX_STOP)], TaggedUnion("a string or an array")
]


def _inputs(value: object, info: ValidationInfo) -> Prompt:
    if isinstance(value, str):
        return Prompt(text=valid_text(value, "inputs"))
    if not isinstance(value, list):
        reject(f"inputs must be a string or an array of token ids, not {preview(value)}", "inputs")
    return served_by(info).prompt_of(value, "inputs")


class CommonParameters(SamplingFields):
    """What parameters LightLLM's protocol and text-generation-inference's have in common."""

    refused: ClassVar = {
        **SamplingFields.refused,
        **response_format.other_names(", ".join(FORMS), *FORMS),
        "return_routed_experts": Unavailable("returning routed experts", False),
        "image_max_patch_num": Unavailable("images", -1),
    }
    ignored: ClassVar = dict.fromkeys(
        ("group_request_id", "suggested_dp_index", "pd_master_node_id", "pd_kv_trans_params"),
        "LightLLM sets it internally; clients only send it by accident",
    )
    do_sample: bool = Field(
        False, description="false: greedy, whatever temperature, top_p and top_k say"
    )
    temperature: Annotated[Float, Range(0)] = Field(1.0, description="below 1e-5: greedy")
    input_penalty: bool = Field(
        False, description="repetition_penalty counts the prompt's tokens too"
    )
    max_new_tokens: Positive | None = Field(
        None, description="default: as many as fit into the context"
    )
    min_new_tokens: NonNegative = Field(1, description="end and stop tokens are banned until then")
    stop_sequences: StopSequences | None = Field(
        None,
        description=f"a string, or an array of at most {MAX_STOP} strings and arrays of token ids, at "
        f"most {MAX_SEQUENCE} each; what stopped the text is removed from it",
    )
    skip_special_tokens: bool = Field(False, description="leave special tokens out of the text")
    add_special_tokens: WithSpecialTokens = True
    add_spaces_between_special_tokens: bool = Field(
        True,
        description="no effect: no supported tokenizer puts spaces between special tokens",
    )
    print_eos_token: bool = Field(
        False, description="show the text of the token that ended the request"
    )
    regular_constraint: GrammarText = Field(
        "",
        description=f"a regular expression that the whole output matches, at most {MAX_CHARS} "
        "characters",
    )
    guided_grammar: GrammarText = Field(
        "", description="EBNF rules; the output is a `root`; json: any JSON object"
    )
    guided_json: SchemaOrText = Field(
        None, description="a JSON schema, as an object or a string: the output is valid against it"
    )
    prompt_logprobs: Annotated[Integer, Range(-1, MAX_LOGPROBS)] = Field(
        -1,
        description="log-probabilities of the prompt's tokens and of this many most likely ones at each position",
    )
    disable_prompt_cache: bool = Field(False, description="neither use nor fill the cache")

    def check(self) -> None:
        """Raises RequestError where the least number of tokens is more than the greatest."""
        most, least = self.max_new_tokens, self.min_new_tokens
        if most is not None and least > most:
            name = f"{AT}min_new_tokens"
            reject(f"{name}: {least} is more than max_new_tokens {most}", name)

    def forms(self) -> dict[str, Grammar | None]:
        """The output's forms by the names of their fields."""
        return {
            "regular_constraint": response_format.regex(self.regular_constraint),
            "guided_grammar": response_format.ebnf(self.guided_grammar),
            "guided_json": self.guided_json,
        }


class NativeParameters(CommonParameters):
    n: NumChoices = Field(1, description="number of choices; 1 on /generate_stream")
    best_of: NumChoices | None = Field(None, description="must equal n")
    seed: Seed = Field(
        -1, description="same seed, same tokens, except for rounding; -1: a random seed"
    )
    return_details: bool = Field(
        False, description="return details of each token (streams always do)"
    )


class Media(RequestModel):
    refused: ClassVar = {
        "images": Unavailable("image input", []),
        "audios": Unavailable("audio input", []),
    }


class InputsRequest(RequestModel):
    """A body around parameters."""

    refused: ClassVar = {"sampling_params": Unavailable("SGLang's name for parameters", {})}
    inputs: Annotated[Prompt, Checked(_inputs, str | Annotated[list[Token], Len(1)])] = Field(
        description="the prompt: a string or an array of token ids"
    )
    multimodal_params: Media | None = Field(
        None, description="must be empty: there is no image or audio input"
    )


class NativeRequest(InputsRequest):
    parameters: NativeParameters = Field(
        default_factory=NativeParameters, description="see the next table"
    )


class NativeAnyRequest(NativeRequest):
    stream: bool = Field(False, description="as /generate_stream")


class TokensParameters(RequestModel):
    add_special_tokens: WithSpecialTokens = True


class TokensRequest(RequestModel):
    text: UnicodeStr = Field(description="what to count")
    parameters: TokensParameters = Field(
        default_factory=TokensParameters, description="add_special_tokens, as in /generate"
    )
    multimodal_params: Media | None = Field(
        None, description="must be empty: there is no image or audio input"
    )


class AbortRequest(RequestModel):
    request_id: UnicodeStr = Field(
        "", description="the X-Request-Id that the request came with, or the id of its answer"
    )
    abort_all: bool = Field(False, description="abort every request of the server")


class _StreamFlag(RequestModel):
    stream: bool = False


class _StopFields(TypedDict):
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    stop_sequences: tuple[tuple[int, ...], ...]


def generate(body: Body, served: ServedModel, *, stream: bool) -> GenerationRequest:
    """A /generate or /generate_stream body. Raises RequestError or NotAvailable (400)."""
    request = parse(NativeRequest, body, served)
    parameters = request.parameters.filled(served.defaults.greedy())
    parameters.check()
    n, best_of = parameters.n, parameters.best_of
    if best_of not in (None, n):
        message = f"{AT}best_of: {best_of} with n {n}; only best_of equal to n is available"
        raise NotAvailable(message, param=f"{AT}best_of")
    if stream and n != 1:
        reject(f"{AT}n: {n} choices cannot be streamed on this route, 1 can", f"{AT}n")
    return generation(
        parameters,
        request.inputs,
        served,
        stream=stream,
        n=n,
        seed=parameters.seed,
        details=parameters.return_details,
        sampled=parameters.do_sample,
        stops=parameters.stop_sequences,
        forms=parameters.forms(),
    )


def generation(
    parameters: CommonParameters,
    prompt: Prompt,
    served: ServedModel,
    *,
    stream: bool,
    n: int,
    seed: int,
    details: bool,
    sampled: bool,
    stops: str | list[str | list[int]] | None,
    forms: Mapping[str, Grammar | None],
    logprobs: int = 0,
    prompt_logprobs: int | None = None,
    truncate: int = 0,
) -> GenerationRequest:
    """What is asked for.

    Args:
        seed: -1: draw one.
        sampled: the request is not greedy.
        forms: of which one may be a grammar.
        prompt_logprobs: None: as ``parameters`` have it.

    Raises:
        RequestError: 400.
    """
    unchanged = parameters.unchanged(served, AT)
    form = response_format.only(forms, AT)
    response_format.without_tokens(form, parameters.allowed_token_ids, f"{AT}allowed_token_ids")
    if not sampled:
        unchanged |= {"top_p": 1.0, "min_p": 0.0}
    scored = parameters.prompt_logprobs if prompt_logprobs is None else prompt_logprobs
    params = SamplingParams(
        **unchanged,
        **_stops(stops, served),
        max_new_tokens=parameters.max_new_tokens,
        min_new_tokens=parameters.min_new_tokens,
        temperature=temperature(parameters.temperature, parameters.top_p) if sampled else 0.0,
        top_k=(parameters.top_k or -1) if sampled else -1,
        penalize_prompt=parameters.input_penalty,
        print_eos=parameters.print_eos_token,
        seed=max(seed, 0),
        logprobs=logprobs,
        prompt_logprobs=scored,
        grammar=form,
        use_cache=not parameters.disable_prompt_cache,
    )
    return GenerationRequest(
        prompts=(prompt,),
        params=params,
        seeded=seed >= 0,
        n=n,
        stream=stream,
        add_special_tokens=parameters.add_special_tokens,
        truncate=truncate,
        details=details,
        native=True,
        fields=_FIELDS | {"grammar": f"{AT}{response_format.field_of(form, forms)}"},
    )


def stream_flag(body: Body) -> bool:
    """``stream`` of a body for POST /. Raises RequestError unless it is a boolean."""
    return parse(_StreamFlag, body).stream


def abort(body: Body) -> str:
    """The id in an /abort_request body; "": all requests. Raises RequestError if there is none."""
    request = parse(AbortRequest, body)
    if request.abort_all:
        return ""
    if not request.request_id:
        reject("request_id is missing, and abort_all is not true", "request_id")
    return request.request_id


def tokens(body: Body) -> tuple[str, bool]:
    """A /tokens body: the text, and whether special tokens count."""
    request = parse(TokensRequest, body)
    return request.text, request.parameters.add_special_tokens


def _stops(given: str | list[str | list[int]] | None, served: ServedModel) -> _StopFields:
    """``stop_sequences`` as fields of SamplingParams: strings, single ids and sequences of ids."""
    items = [given] if isinstance(given, str) else given or ()
    sequences = [tuple(item) for item in items if isinstance(item, list)]
    for sequence in sequences:
        served.check_ids(sequence, f"{AT}stop_sequences")
    return {
        "stop": tuple(item for item in items if isinstance(item, str)),
        "stop_token_ids": tuple(s[0] for s in sequences if len(s) == 1),
        "stop_sequences": tuple(s for s in sequences if len(s) > 1),
    }
