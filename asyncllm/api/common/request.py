"""A validated generation request of any protocol, and the served model it is checked against.

Knows prompts, parameters and flags; knows neither JSON names nor answers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from asyncllm.api.common.defaults import Defaults
from asyncllm.api.common.request_model import UnicodeStr
from asyncllm.api.common.validation import GREEDY_BELOW, preview, reject, token_ids
from asyncllm.api.parsing.output_parser import Dialect, OutputOptions
from asyncllm.core.request import SamplingParams
from asyncllm.errors import ModelNotFound
from asyncllm.messages.checks import are_below


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt; exactly one field is set."""

    text: str | None = None
    ids: array[int] | None = None
    chat: bytes | None = None  # JSON for the chat template: messages, tools, kwargs


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One HTTP request for text: ``n`` choices of each prompt.

    Choice ``i`` of prompt ``p`` has the index ``p * n + i``.
    """

    prompts: tuple[Prompt, ...]
    params: SamplingParams  # seed: of choice 0; choice i gets seed + i
    seeded: bool  # False: params.seed is to be drawn
    n: int = 1
    stream: bool = False
    echo: bool = False
    add_special_tokens: bool = True
    truncate: int = 0  # keep only that many of a prompt's last tokens; 0: all
    usual_max: int = 0  # tokens to generate at most where params leave it open, if more fit; 0: all
    native: bool = False  # of a route of LightLLM's own
    omitted_tools: tuple[str, ...] = ()  # types of tools that the model is not told of
    include_usage: bool = False  # a usage chunk ends the stream
    continuous_usage: bool = False  # every chunk says it too
    functions: bool = False  # OpenAI's chat: a call is sent as function_call
    custom_tools: frozenset[str] = frozenset()  # OpenAI's chat: names of tools that take free text
    details: bool = False  # native: each token in the answer
    token_ids: bool = False  # OpenAI: ids of the prompt and of the tokens are in the answer
    tokens_as_ids: bool = False  # OpenAI: log-probabilities name tokens "token_id:ID"
    output_options: OutputOptions | None = None  # None: all text is content
    prediction: str | None = None  # what the answer may repeat; None: usage says nothing of it
    # names of the body's fields, by those that ``Failure.param`` has for all routes
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What this server serves, for the model name check and /v1/models.

    Args:
        name: the name in answers.
        listed: names in /v1/models; the first is ``name``.
        accepted: further names that mean the same model ("default", the folder's name).
        max_len: prompt plus generated tokens of one request.
        vocab_size: token ids are below it.
        created: unix seconds.
        dialect: how the model writes calls and reasoning.
        defaults: what counts where a request is silent.
        tgi: LightLLM's native routes speak text-generation-inference's protocol.
        completion_tokens: to generate at most where /v1/completions is not told; 0: what fits.
    """

    name: str
    listed: tuple[str, ...]
    accepted: frozenset[str]
    max_len: int
    vocab_size: int
    created: int
    owned_by: str = "asyncllm"
    model_name: str = ""  # what /get_model_name answers; "": ``name``
    dialect: Dialect = field(default_factory=Dialect)
    defaults: Defaults = field(default_factory=Defaults)
    tgi: bool = False
    completion_tokens: int = 16

    def check_name(self, name: str | None) -> None:
        """Raises ModelNotFound (404) unless ``name`` is missing, empty or one of ours."""
        if not name or name in self.listed or name in self.accepted:
            return
        raise ModelNotFound(
            f"the model {preview(name)} does not exist; this server has {', '.join(self.listed)}",
            param="model",
        )

    def prompt_of(self, value: object, name: str) -> Prompt:
        """A prompt of token ids. Raises RequestError."""
        if not isinstance(value, list):
            reject(f"{name} must be an array of token ids, not {preview(value)}", name)
        if not value:
            reject(f"{name} must not be empty", name)
        return Prompt(ids=self.ids_of(value, name))

    def ids_of(self, value: list[object], name: str) -> array[int]:
        """Any number of token ids as a column of int32. Raises RequestError."""
        column = token_ids(value, name)
        if not are_below(self.vocab_size, column):
            self.check_ids(column, name)
        return column

    def check_ids(self, ids: Iterable[int], name: str) -> None:
        """Raises RequestError for a token id outside the vocabulary."""
        for token in ids:
            if token >= self.vocab_size:
                reject(f"{name}: {token} is not below the vocabulary size {self.vocab_size}", name)


def served_by(info: ValidationInfo) -> ServedModel:
    """For validators: what was given to :func:`parse`."""
    assert isinstance(info.context, ServedModel)
    return info.context


def _known(name: str | None, info: ValidationInfo) -> str | None:
    served_by(info).check_name(name)
    return name


ModelName = Annotated[
    UnicodeStr | None,
    AfterValidator(_known),
    Field(description='a name in /v1/models; missing or "default": the one served'),
]


def temperature(value: float, top_p: float = 1.0) -> float:
    """Nearly 0 is greedy, so that no division can overflow; and so is a ``top_p`` of 0."""
    return 0.0 if value < GREEDY_BELOW or not top_p else value
