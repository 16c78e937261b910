"""Sampling defaults from the model's generation_config.json.

Precedence: the request, generation_config.json, the route's own default.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from asyncllm.api.common.request_model import (
    Float,
    Positive,
    Probability,
    Range,
    RepetitionPenalty,
    RequestModel,
    TopK,
    TopP,
    parse,
)
from asyncllm.api.common.validation import Body
from asyncllm.errors import RequestError, StartupError


class GenerationConfig(RequestModel):
    do_sample: bool | None = None
    temperature: Annotated[Float, Range(0)] | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Probability | None = None
    repetition_penalty: RepetitionPenalty | None = None
    max_new_tokens: Positive | None = None


def read_defaults(content: Body) -> dict[str, object]:
    """The values of a generation_config.json that count, by name.

    Raises:
        StartupError: one of them cannot be used.
    """
    try:
        return parse(GenerationConfig, content).model_dump(exclude_none=True)
    except RequestError as error:
        raise StartupError(
            f"generation_config.json: {error.message} (--generation_config none leaves it out)"
        ) from None


@dataclass(frozen=True, slots=True)
class Defaults:
    """The values of :func:`read_defaults`, as the routes take them."""

    values: Mapping[str, object] = field(default_factory=dict)

    def sampling(self, body: Body) -> Mapping[str, object]:
        """For routes that sample unless they are asked not to, by field name.

        A model that is meant to be greedy is, but not where the request names a temperature.
        """
        out = {name: value for name, value in self.values.items() if name != "do_sample"}
        if self.values.get("do_sample") is False and body.get("do_sample") is not True:
            out["temperature"] = 0.0
        return out

    def greedy(self) -> Mapping[str, object]:
        """For routes that sample only if ``do_sample`` says so, by field name."""
        return self.values

    def beyond(self, names: Collection[str]) -> dict[str, Any]:
        """Fields of SamplingParams for which a route has none in ``names``."""
        rest = {name: value for name, value in self.values.items() if name not in names}
        unchanged = "min_p", "repetition_penalty"
        out: dict[str, Any] = {name: rest[name] for name in unchanged if name in rest}
        if "top_k" in rest:
            out["top_k"] = rest["top_k"] or -1
        if out.get("repetition_penalty", 1.0) != 1.0:
            out["penalize_prompt"] = True  # as transformers does
        return out
