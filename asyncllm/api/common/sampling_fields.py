"""Fields of requests that mean the same on OpenAI's and LightLLM's routes, and their values.

Knows JSON values and SamplingParams; knows no route.
"""

from __future__ import annotations

import re
from typing import Annotated, TypedDict

from annotated_types import MaxLen
from pydantic import AfterValidator, BeforeValidator, Field, Strict, WithJsonSchema
from typing_extensions import TypeAliasType

from asyncllm.api.common.request import ServedModel
from asyncllm.api.common.request_model import (
    Float,
    Integer,
    Items,
    NonNegative,
    Probability,
    Range,
    RepetitionPenalty,
    RequestModel,
    StopString,
    TaggedUnion,
    TopK,
    TopP,
    refuse,
)
from asyncllm.api.common.validation import (
    MAX_ALLOWED,
    MAX_BIAS,
    MAX_DECAY,
    MAX_INT32,
    MAX_STOP,
    preview,
)

# a token id; the vocabulary's end is checked where the vocabulary is known
_IS_TOKEN = "a token id (0 .. vocabulary size - 1)"
_TOKEN = Range(0, MAX_INT32, what=_IS_TOKEN)
Token = TypeAliasType("Token", Annotated[Integer, _TOKEN])
# without leading zeros, with which a token could have two biases
_KEY = re.compile("^(0|[1-9][0-9]{0,9})$")


def _token_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        refuse(f": {preview(key)} is not {_IS_TOKEN}")
    return key


def _pair(value: object) -> object:
    if not isinstance(value, list) or len(value) != 2:
        refuse(f" must be [start, factor], not {preview(value)}")
    return value


TokenKey = Annotated[
    str,
    AfterValidator(_token_key),
    WithJsonSchema({"type": "string", "pattern": _KEY.pattern}),
]
Stop = Annotated[
    StopString | Annotated[Items[StopString], MaxLen(MAX_STOP)], TaggedUnion("a string or an array")
]
LengthPenalty = Annotated[
    tuple[NonNegative, Annotated[Float, Range(1, MAX_DECAY)]],
    Strict(False),  # JSON has no tuples
    BeforeValidator(_pair),
]


class Unchanged(TypedDict):
    """Fields of SamplingParams that are what the request says."""

    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    length_penalty: tuple[int, float] | None
    logit_bias: tuple[tuple[int, float], ...]
    allowed_token_ids: tuple[int, ...]
    ignore_eos: bool
    skip_special_tokens: bool


class SamplingFields(RequestModel):
    top_p: TopP = 1.0
    top_k: TopK = -1
    min_p: Probability = Field(
        0.0,
        description="sample from tokens with at least this share of the most likely one's "
        "probability",
    )
    presence_penalty: Annotated[Float, Range(-2, 2)] = Field(
        0.0, description="subtracted once from the logit of each generated token"
    )
    frequency_penalty: Annotated[Float, Range(-2, 2)] = Field(
        0.0, description="subtracted per occurrence from the logit of each generated token"
    )
    repetition_penalty: RepetitionPenalty = Field(
        1.0,
        description="divides positive logits of generated tokens, multiplies negative ones",
    )
    exponential_decay_length_penalty: LengthPenalty | None = Field(
        None,
        description=f"[start, factor], factor in [1, {MAX_DECAY:g}]: after start tokens the end "
        "tokens' logits grow by abs(logit) * (factor^(generated - start) - 1), as in transformers",
    )
    logit_bias: Annotated[
        dict[TokenKey, Annotated[Float, Range(-100, 100)]], Field(max_length=MAX_BIAS)
    ] = Field(
        default_factory=dict,
        description=f'{{"token id": bias}}, bias in [-100, 100], at most {MAX_BIAS} entries',
    )
    allowed_token_ids: Annotated[Items[Token], Field(max_length=MAX_ALLOWED)] = Field(
        default_factory=list,
        description=f"at most {MAX_ALLOWED} ids; only these are generated, and end tokens unless "
        "ignore_eos is set; cannot be combined with a grammar",
    )
    ignore_eos: bool = Field(False, description="continue after the end-of-sequence token")
    skip_special_tokens: bool = Field(True, description="leave special tokens out of the text")

    def unchanged(self, served: ServedModel, at: str = "") -> Unchanged:
        """What goes to SamplingParams as it is.

        Raises:
            RequestError: a token id outside the vocabulary.
        """
        bias = tuple((int(key), value) for key, value in self.logit_bias.items())
        allowed, penalty = tuple(self.allowed_token_ids), self.exponential_decay_length_penalty
        served.check_ids([token for token, _ in bias], f"{at}logit_bias")
        served.check_ids(allowed, f"{at}allowed_token_ids")
        return {
            "top_p": self.top_p or 1.0,  # 0 is said by the temperature
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "length_penalty": penalty if penalty is not None and penalty[1] > 1 else None,
            "logit_bias": bias,
            "allowed_token_ids": allowed,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
        }
