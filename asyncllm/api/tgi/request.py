"""Validates text-generation-inference's requests on LightLLM's native routes (--use_tgi_api).

A body has the parameters of /generate, less a few, and those of :data:`OWN`. Knows request bodies;
answers are in :mod:`asyncllm.api.tgi.reply`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from asyncllm.api.common import response_format, validation
from asyncllm.api.common.request import GenerationRequest, ServedModel
from asyncllm.api.common.response_format import Grammar
from asyncllm.api.common.validation import Body, Field, UnsupportedField, preview, reject
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.lightllm.request import AT

F = Field
MAX_SEED: Final = 2**64 - 1


def form(value: Any, name: str) -> Grammar | None:
    """``{"type": "json" | "json_schema" | "regex", "value": ...}``."""
    inner = f"{name}.value"
    match kind := value.get("type"):
        case "json" | "json_schema":
            return response_format.schema(value.get("value"), inner)
        case "regex":
            return response_format.regex(validation.text(value.get("value"), inner), inner)
        case _:
            known = "json, json_schema, regex"
            reject(f"{name}.type: {preview(kind)} is not one of {known}", f"{name}.type")


NUM_BEAM: Final = F(name="num_beam", kind="integer", low=1, high=validation.MAX_N,
                    doc="LightLLM's name of parameters.best_of")  # fmt: skip

OWN: Final = (
    F(name="do_sample", kind="boolean", default=False,
      doc="sample; temperature, top_k, top_p and min_p do so too where they differ from the default"),
    F(name="input_penalty", kind="boolean", default=True, to="penalize_prompt",
      doc="repetition_penalty counts the prompt's tokens too"),
    F(name="skip_special_tokens", kind="boolean", default=True, to="skip_special_tokens",
      doc="leave special tokens out of the text"),
    F(name="best_of", kind="integer", low=1, high=validation.MAX_N,
      doc="generate so many, answer with the one of the best mean log-probability; 1 on streams"),
    F(name="seed", kind="integer", low=0, high=MAX_SEED,
      doc="same seed, same tokens; absent: draw one"),
    F(name="stop", kind="any", default=(), parse=validation.stop_strings,
      doc=f"at most {validation.MAX_STOP} strings; they are cut from the text"),
    F(name="truncate", kind="integer", low=1, high=validation.MAX_INT32,
      doc="use only so many of the prompt's last tokens"),
    F(name="return_full_text", kind="boolean", default=False,
      doc="put the prompt before the generated text"),
    F(name="details", kind="boolean", default=False, doc="details in the answer"),
    F(name="return_details", kind="boolean", default=False, doc="LightLLM's name of details"),
    F(name="decoder_input_details", kind="boolean", default=False,
      doc="the prompt's tokens and log-probabilities too; needs details, not on streams"),
    F(name="top_n_tokens", kind="integer", default=0, low=0, high=validation.MAX_LOGPROBS,
      doc="so many best tokens at each token"),
    F(name="grammar", kind="object", parse=form,
      doc="{type: json, json_schema or regex, value}: a JSON schema, or a regular expression, for "
      "the output"),
)  # fmt: skip

UNAVAILABLE: Final = (
    UnsupportedField(name="typical_p", neutral=(1, 1.0), doc="typical decoding"),
    UnsupportedField(name="watermark", neutral=(False,), doc="a watermark"),
    UnsupportedField(name="adapter_id", neutral=("",), doc="an adapter"),
    UnsupportedField(name="n", neutral=(1,), doc="more than one answer (but best_of)"),
    UnsupportedField(name="token_healing_top_k", neutral=(0,), doc="token healing"),
    UnsupportedField(name="token_healing_unmerge_last_token", neutral=(0, False), doc="token healing"),
    *lightllm.UNAVAILABLE,
)  # fmt: skip

_REPLACED: Final = {field.name for field in OWN} | {"n"}
PARAMETERS: Final = (*(f for f in lightllm.PARAMETERS if f.name not in _REPLACED), *OWN)
_SAMPLING: Final = tuple(
    f for f in PARAMETERS if f.name in {"temperature", "top_k", "top_p", "min_p"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TgiRequest:
    """A checked request.

    Args:
        full_text: the prompt goes before the text.
        prefill: the prompt's tokens are wanted in the details.
        prompt_scores: the prompt's log-probabilities are wanted as LightLLM gives them.
    """

    generation: GenerationRequest
    full_text: bool
    prefill: bool
    prompt_scores: bool


def generate(body: Body, served: ServedModel, *, stream: bool) -> TgiRequest:
    """A /generate or /generate_stream body. Raises RequestError or NotAvailable (400)."""
    values = lightllm.parameters(body, PARAMETERS, UNAVAILABLE, served)
    best_of = values["best_of"] or NUM_BEAM.read(body) or 1
    details = values["details"] or values["return_details"]
    prefill = values["decoder_input_details"]
    if stream and best_of > 1:
        reject(f"{AT}best_of: {best_of} choices cannot be streamed, 1 can", AT + "best_of")
    if prefill and (stream or not details):
        name = AT + "decoder_input_details"
        reject(f"{name}: needs details, and an answer that is not a stream", name)
    if values["stop"] and values["stop_sequences"] is not None:
        reject(f"{AT}stop and {AT}stop_sequences exclude each other", AT + "stop")
    prompt_scores = values["prompt_logprobs"] >= 0
    if prefill:
        values["prompt_logprobs"] = max(values["prompt_logprobs"], 0)
    seed = values["seed"]
    given = lightllm.BODY[1].read(body)
    sampled = any(field.read(given) != field.default for field in _SAMPLING)
    values |= {
        "n": best_of,
        "seed": -1 if seed is None else seed,
        "do_sample": values["do_sample"] or sampled,
        "return_details": details,
        "stop_sequences": list(values["stop"]) or values["stop_sequences"],
    }
    made = lightllm.generation(
        PARAMETERS,
        values,
        body["inputs"],
        served,
        stream=stream,
        grammars=(*lightllm.GRAMMARS, "grammar"),
    )
    params = replace(made.params, logprobs=values["top_n_tokens"])
    return TgiRequest(
        generation=replace(made, params=params, truncate=values["truncate"] or 0),
        full_text=values["return_full_text"],
        prefill=prefill,
        prompt_scores=prompt_scores,
    )
