"""LightLLM's native requests: /generate, /generate_stream,
/ and /tokens bodies to checked requests.

Knows request bodies; answers are in :mod:`asyncllm.api.lightllm.reply`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from asyncllm.api.common import response_format, validation
from asyncllm.api.common.errors import NotAvailable
from asyncllm.api.common.request import GenerationRequest, Prompt, ServedModel, temperature
from asyncllm.api.common.validation import Body, Field, UnsupportedField, expect, reject
from asyncllm.core.request import SamplingParams

F = Field
AT: Final = "parameters."
MAX_SEQUENCE: Final = 256  # token ids in one stop sequence

BODY: Final = (
    F(name="inputs", kind="any", doc="the prompt: a string or an array of token ids"),
    F(name="parameters", kind="object", default={}, doc="see the next table"),
)  # fmt: skip

PARAMETERS: Final = (
    F(name="do_sample", kind="boolean", default=False,
      doc="false: greedy, whatever temperature, top_p and top_k say"),
    F(name="temperature", kind="number", default=1.0, low=0, doc="below 1e-5: greedy"),
    F(name="top_p", kind="number", default=1.0, low=0, high=1, above=True, to="top_p",
      doc="smallest set of tokens with this probability"),
    F(name="top_k", kind="integer", default=-1, low=-1, high=validation.MAX_INT32,
      doc="this many best tokens; -1 or 0: all"),
    F(name="min_p", kind="number", default=0.0, low=0, high=1, to="min_p",
      doc="tokens at least this share of the best one's probability"),
    F(name="presence_penalty", kind="number", default=0.0, low=-2, high=2, to="presence_penalty",
      doc="subtracted once from the logit of each generated token"),
    F(name="frequency_penalty", kind="number", default=0.0, low=-2, high=2, to="frequency_penalty",
      doc="subtracted per occurrence from the logit of each generated token"),
    F(name="repetition_penalty", kind="number", default=1.0, low=0, high=10, above=True,
      to="repetition_penalty", doc="divides positive, multiplies negative logits of generated tokens"),
    F(name="input_penalty", kind="boolean", default=False, to="penalize_prompt",
      doc="repetition_penalty counts the prompt's tokens too"),
    F(name="exponential_decay_length_penalty", kind="any", parse=validation.length_penalty,
      to="length_penalty",
      doc="[start, factor], factor in "
      f"[1, {validation.MAX_DECAY:g}]: after start tokens the end tokens' logits grow by "
      "abs(logit) * (factor^(generated - start) - 1), as in transformers"),
    F(name="logit_bias", kind="object", default=(), parse=validation.logit_bias, to="logit_bias",
      doc=f"{{\"token id\": bias}}, bias in [-100, 100], at most {validation.MAX_BIAS} entries"),
    F(name="allowed_token_ids", kind="any", default=(), parse=validation.allowed_ids,
      to="allowed_token_ids",
      doc=f"at most {validation.MAX_ALLOWED} ids: no others come, but end tokens unless ignore_eos; not "
      "with a grammar"),
    F(name="max_new_tokens", kind="integer", low=1, high=validation.MAX_INT32, to="max_new_tokens",
      doc="absent: what fits into the context"),
    F(name="min_new_tokens", kind="integer", default=1, low=0, high=validation.MAX_INT32,
      to="min_new_tokens", doc="eos and stop tokens are banned before"),
    F(name="ignore_eos", kind="boolean", default=False, to="ignore_eos",
      doc="go on after the end-of-sequence token"),
    F(name="stop_sequences", kind="any",
      doc=f"a string, or an array of at most {validation.MAX_STOP} strings and arrays of token ids, at "
      f"most {MAX_SEQUENCE} each; what stopped the text is cut from it"),
    F(name="n", kind="integer", default=1, low=1, high=validation.MAX_N,
      doc="choices; 1 on /generate_stream"),
    F(name="best_of", kind="integer", low=1, high=validation.MAX_N, doc="only equal to n"),
    F(name="seed", kind="integer", default=-1, low=-1, high=validation.MAX_SEED,
      doc="same seed, same tokens; -1: draw one"),
    F(name="skip_special_tokens", kind="boolean", default=False, to="skip_special_tokens",
      doc="leave special tokens out of the text"),
    F(name="add_special_tokens", kind="boolean", default=True,
      doc="the tokenizer may put a bos token before a text prompt"),
    F(name="add_spaces_between_special_tokens", kind="boolean", default=True,
      doc="false: no spaces between special tokens; no tokenizer here puts any, so true is the same"),
    F(name="print_eos_token", kind="boolean", default=False, to="print_eos",
      doc="show the text of the token that ended the request"),
    F(name="regular_constraint", kind="string", parse=response_format.regex,
      doc=f"a regular expression that the whole output matches, at most {response_format.MAX_CHARS} characters"),
    F(name="guided_grammar", kind="string", parse=response_format.ebnf,
      doc="rules in EBNF; the output is a `root`; json: any JSON object"),
    F(name="guided_json", kind="any", parse=response_format.schema,
      doc="a JSON schema, as an object or a string: the output is valid against it"),
    F(name="prompt_logprobs", kind="integer", default=-1, low=-1, high=validation.MAX_LOGPROBS,
      to="prompt_logprobs", doc="log-probabilities of the prompt's tokens and of this many best ones"),
    F(name="disable_prompt_cache", kind="boolean", default=False, doc="neither use nor fill the cache"),
    F(name="return_details", kind="boolean", default=False, doc="each token in the answer, as streams have them anyway"),
)  # fmt: skip

STREAM: Final = F(name="stream", kind="boolean", default=False, doc="as /generate_stream")
TEXT: Final = F(name="text", kind="string", required=True, doc="what to count")

ABORT: Final = (
    F(name="request_id", kind="string",
      doc="the X-Request-Id that the request came with, or the id of its answer"),
    F(name="abort_all", kind="boolean", default=False, doc="every request of the server instead"),
)  # fmt: skip

TOKENS_PARAMETERS: Final = tuple(f for f in PARAMETERS if f.name == "add_special_tokens")

GRAMMARS: Final = ("regular_constraint", "guided_grammar", "guided_json")

UNAVAILABLE: Final = (
    UnsupportedField(name="return_routed_experts", neutral=(False,), doc="returning routed experts"),
    UnsupportedField(name="image_max_patch_num", neutral=(-1,), doc="images"),
)  # fmt: skip


def generate(body: Body, served: ServedModel, *, stream: bool) -> GenerationRequest:
    """A /generate or /generate_stream body. Raises RequestError or NotAvailable (400)."""
    values = parameters(body, PARAMETERS, UNAVAILABLE, served)
    n, best_of = values["n"], values["best_of"]
    if best_of not in (None, n):
        message = f"{AT}best_of: {best_of} with n {n}; only best_of equal to n is available"
        raise NotAvailable(message, param=AT + "best_of")
    if stream and n != 1:
        reject(f"{AT}n: {n} choices cannot be streamed on this route, 1 can", AT + "n")
    return generation(PARAMETERS, values, body["inputs"], served, stream=stream)


def parameters(
    body: Body, table: Sequence[Field], unavailable: Sequence[UnsupportedField], served: ServedModel
) -> dict[str, Any]:
    """The values of ``parameters``, by name, in a body that has ``inputs``."""
    if body.get("inputs") is None:
        reject("inputs is missing", "inputs")
    _no_media(body)
    given = BODY[1].read(body)
    validation.refuse(unavailable, given, AT)
    values = validation.read(table, given, AT, served.defaults.greedy())
    most, least = values["max_new_tokens"], values["min_new_tokens"]
    if most is not None and least > most:
        name = AT + "min_new_tokens"
        reject(f"{name}: {least} is more than max_new_tokens {most}", name)
    return values


def generation(
    table: Sequence[Field],
    values: dict[str, Any],
    inputs: Any,
    served: ServedModel,
    *,
    stream: bool,
    grammars: Sequence[str] = GRAMMARS,
) -> GenerationRequest:
    """What is asked for.

    Args:
        table: that the values were read by; each of ``PARAMETERS`` must have a value.
        grammars: fields of which one may be a grammar.

    Raises:
        RequestError: 400.
    """
    direct = validation.sampling(table, values)
    served.check_ids(tuple(t for t, _ in direct["logit_bias"]), AT + "logit_bias")
    served.check_ids(direct["allowed_token_ids"], AT + "allowed_token_ids")
    form = response_format.only(values, grammars, AT)
    response_format.without_tokens(form, direct["allowed_token_ids"], AT + "allowed_token_ids")
    if not values["do_sample"]:
        direct |= {"top_p": 1.0, "min_p": 0.0}
    params = SamplingParams(
        **direct,
        temperature=temperature(values["temperature"]) if values["do_sample"] else 0.0,
        top_k=(values["top_k"] or -1) if values["do_sample"] else -1,
        **_stops(values["stop_sequences"], served),
        seed=max(values["seed"], 0),
        logprobs=0,
        grammar=form,
        use_cache=not values["disable_prompt_cache"],
    )
    return GenerationRequest(
        prompts=(_prompt(inputs, served),),
        params=params,
        seeded=values["seed"] >= 0,
        n=values["n"],
        stream=stream,
        add_special_tokens=values["add_special_tokens"],
        details=values["return_details"],
        native=True,
    )


def stream_flag(body: Body) -> bool:
    """``stream`` of a body for POST /. Raises RequestError unless it is a boolean."""
    return bool(STREAM.read(body))


def abort(body: Body) -> str:
    """The id in an /abort_request body; "": all requests. Raises RequestError if there is none."""
    values = validation.read(ABORT, body)
    if values["abort_all"]:
        return ""
    if not values["request_id"]:
        reject("request_id is missing, and abort_all is not true", "request_id")
    return str(values["request_id"])


def tokens(body: Body) -> tuple[str, bool]:
    """A /tokens body: the text, and whether special tokens count."""
    _no_media(body)
    values = validation.read(TOKENS_PARAMETERS, BODY[1].read(body), AT)
    return TEXT.read(body), values["add_special_tokens"]


def _no_media(body: Body) -> None:
    media = body.get("multimodal_params")
    if media is None:
        return
    expect(media, dict, "multimodal_params", "an object")
    for kind in ("images", "audios"):
        if media.get(kind):
            name = f"multimodal_params.{kind}"
            raise NotAvailable(f"{name}: {kind} are not available on this server", param=name)


def _prompt(value: Any, served: ServedModel) -> Prompt:
    if isinstance(value, str):
        return Prompt(text=validation.text(value, "inputs"))
    expect(value, list, "inputs", "a string or an array of token ids")
    return served.prompt_of(value, "inputs")


def _stops(value: Any, served: ServedModel) -> dict[str, Any]:
    """``stop_sequences`` as fields of SamplingParams: strings, single ids and sequences of ids."""
    name = AT + "stop_sequences"
    if value is None:
        return {}
    items = [value] if isinstance(value, str) else expect(value, list, name, "a string or an array")
    if len(items) > validation.MAX_STOP:
        reject(f"{name}: {len(items)} stop sequences, at most {validation.MAX_STOP}", name)
    sequences = []
    for item in items:
        if not isinstance(item, list):
            continue
        if not item:
            reject(f"{name}: an empty sequence cannot stop anything", name)
        if len(item) > MAX_SEQUENCE:
            reject(f"{name}: a sequence of {len(item)} ids, at most {MAX_SEQUENCE}", name)
        sequences.append(tuple(validation.token_id(token, name) for token in item))
        served.check_ids(sequences[-1], name)
    return {
        "stop": validation.stop_strings([i for i in items if not isinstance(i, list)], name),
        "stop_token_ids": tuple(s[0] for s in sequences if len(s) == 1),
        "stop_sequences": tuple(s for s in sequences if len(s) > 1),
    }
