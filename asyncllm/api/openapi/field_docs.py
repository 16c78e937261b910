"""The field tables as Markdown, for docs/api.md.

Knows the declarations; knows nothing of requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common.model import RequestModel, Unavailable, limits_text
from asyncllm.api.common.validation import Field, UnsupportedField
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.openapi.document import of_models
from asyncllm.api.openapi.schemas import Schema
from asyncllm.api.responses import request as responses
from asyncllm.api.tgi import request as tgi

FIELDS: Final[dict[str, Sequence[Field]]] = {
    "common": openai.COMMON,
    "stream_options": openai.STREAM_OPTIONS,
    "completion": openai.COMPLETION[len(openai.COMMON) :],
    "chat": openai.CHAT[len(openai.COMMON) :],
    "responses": responses.RESPONSES,
    "native": lightllm.BODY,
    "native_parameters": lightllm.PARAMETERS,
    "tgi_parameters": tgi.OWN,
    "abort": lightllm.ABORT,
}
REFUSED: Final[dict[str, Sequence[UnsupportedField]]] = {
    "completion_refused": openai.COMPLETION_UNAVAILABLE,
    "chat_refused": openai.CHAT_UNAVAILABLE,
    "responses_refused": responses.UNAVAILABLE,
    "native_refused": lightllm.UNAVAILABLE,
    "tgi_refused": tgi.UNAVAILABLE[: -len(lightllm.UNAVAILABLE)],
}
_HEAD: Final = "| field | type | default | range | meaning |\n|---|---|---|---|---|\n"
_REFUSED_HEAD: Final = "| field | what is not available | passes all the same |\n|---|---|---|\n"
MODELS: Final = {"messages": anthropic.MessageRequest}
_BLOCK: Final = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(document: str) -> str:
    """``document`` with every ``<!-- table NAME -->`` block rewritten.

    Raises KeyError for an unknown table.
    """
    return _BLOCK.sub(lambda m: m[1] + _markdown(m[2]) + m[3], document)


def _of_model(model: type[RequestModel], refused: bool) -> str:
    schemas = of_models([model])
    schema = schemas[model.__name__]
    head = _REFUSED_HEAD if refused else _HEAD
    rows = []
    for name, field in model.model_fields.items():
        what = next((each for each in field.metadata if isinstance(each, Unavailable)), None)
        if (what is not None) is not refused:
            continue
        if what is not None:
            passing = ", ".join(f"`{json.dumps(value)}`" for value in what.neutral)
            rows.append(f"| `{name}` | {what.what} | {passing} |")
            continue
        told = schema["properties"][name]
        kinds = _kinds(told, schemas) - {"null"}
        kind = kinds.pop() if len(kinds) == 1 else ""
        default = json.dumps(told["default"]) if told.get("default") is not None else ""
        if name in schema["required"]:
            default = "required"
        rows.append(f"| `{name}` | {kind} | {default} | {_range(told)} | {told['description']} |")
    return head + "".join(row + "\n" for row in rows)


def _kinds(told: Schema, schemas: dict[str, Schema]) -> set[str]:
    """The JSON types that a value may have; {""}: any."""
    if "$ref" in told:
        return _kinds(schemas[told["$ref"].rpartition("/")[2]], schemas)
    for key in ("anyOf", "oneOf"):
        if key in told:
            return set().union(*(_kinds(each, schemas) for each in told[key]))
    kind = told.get("type", "")
    return {kind} if isinstance(kind, str) else set(kind)


def _range(told: Schema) -> str:
    above = "exclusiveMinimum" in told
    return limits_text(
        told.get("exclusiveMinimum", told.get("minimum")), told.get("maximum"), above
    )


def _markdown(name: str) -> str:
    if (base := name.removesuffix("_refused")) in MODELS:
        return _of_model(MODELS[base], base != name)
    if name in REFUSED:
        rows = [f"| `{r.name}` | {r.doc} | {_neutral(r)} |" for r in REFUSED[name]]
        head = _REFUSED_HEAD
    else:
        rows = [
            f"| `{f.name}` | {_kind(f)} | {_default(f)} | {f.limits()} | {f.doc} |"
            for f in FIELDS[name]
        ]
        head = _HEAD
    return head + "".join(row + "\n" for row in rows)


def _kind(field: Field) -> str:
    return "" if field.kind == "any" else field.kind


def _default(field: Field) -> str:
    if field.required:
        return "required"
    plain = isinstance(field.default, bool | int | float | str)
    return json.dumps(field.default) if plain else ""


def _neutral(refused: UnsupportedField) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in refused.neutral)
