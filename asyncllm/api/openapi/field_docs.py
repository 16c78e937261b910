"""The field tables as Markdown, for docs/api.md.

Knows the declarations; knows nothing of requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final

from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common.request_model import RequestModel, Unavailable, limits_text
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.openapi.document import of_models
from asyncllm.api.openapi.schemas import Schema
from asyncllm.api.responses import request as responses
from asyncllm.api.tgi import request as tgi

_HEAD: Final = "| field | type | default | range | meaning |\n|---|---|---|---|---|\n"
_REFUSED_HEAD: Final = "| fields | not available | accepted values |\n|---|---|---|\n"
_IGNORED_HEAD: Final = "| fields | why they make no difference |\n|---|---|\n"
MODELS: Final[dict[str, type[RequestModel]]] = {
    "common": openai.CommonRequest,
    "stream_options": openai.StreamOptions,
    "completion": openai.CompletionRequest,
    "chat": openai.ChatRequest,
    "responses": responses.ResponseRequest,
    "messages": anthropic.MessageRequest,
    "native": lightllm.NativeRequest,
    "native_parameters": lightllm.NativeParameters,
    "tgi_parameters": tgi.TgiParameters,
    "abort": lightllm.AbortRequest,
}
OWN: Final = {"completion", "chat", "tgi_parameters"}  # without inherited fields
REFUSED: Final[dict[str, type[RequestModel]]] = {
    "common_refused": openai.CommonRequest,
    "completion_refused": openai.CompletionRequest,
    "chat_refused": openai.ChatRequest,
    "responses_refused": responses.ResponseRequest,
    "messages_refused": anthropic.MessageRequest,
    "native_refused": lightllm.NativeParameters,
    "tgi_refused": tgi.TgiParameters,
}
IGNORED: Final[dict[str, type[RequestModel]]] = {
    "common_ignored": openai.CommonRequest,
    "chat_ignored": openai.ChatRequest,
    "responses_ignored": responses.ResponseRequest,
    "messages_ignored": anthropic.MessageRequest,
    "native_ignored": lightllm.NativeParameters,
}
# tables that leave out what is in those of a parent
_BESIDES: Final[dict[str, type[RequestModel]]] = dict.fromkeys(
    ("completion_refused", "chat_refused", "chat_ignored"), openai.CommonRequest
)
_BLOCK: Final = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(document: str) -> str:
    """``document`` with every ``<!-- table NAME -->`` block rewritten.

    Raises KeyError for an unknown table.
    """
    return _BLOCK.sub(lambda m: m[1] + _markdown(m[2]) + m[3], document)


def _markdown(name: str) -> str:
    if name in REFUSED:
        refused = REFUSED[name].refused.items()
        return _REFUSED_HEAD + _grouped(
            name, {field: f"{each.what} | {_neutral(each)}" for field, each in refused}
        )
    if name in IGNORED:
        return _IGNORED_HEAD + _grouped(name, IGNORED[name].ignored)
    model = MODELS[name]
    schemas = of_models([model])
    schema = schemas[model.__name__]
    names = model.__annotations__ if name in OWN else model.model_fields
    return _HEAD + "".join(
        _row(field, schema, schemas) for field in names if field in model.model_fields
    )


def _grouped(name: str, cells: Mapping[str, str]) -> str:
    """A row for all fields with the same cells."""
    parent, rows = _BESIDES.get(name, RequestModel), dict[str, list[str]]()
    for field, cell in cells.items():
        if field not in parent.refused and field not in parent.ignored:
            rows.setdefault(cell, []).append(f"`{field}`")
    return "".join(f"| {', '.join(fields)} | {cell} |\n" for cell, fields in rows.items())


def _row(name: str, schema: Schema, schemas: dict[str, Schema]) -> str:
    told = schema["properties"][name]
    found = kinds(told, schemas) - {"null"}
    kind = found.pop() if len(found) == 1 else ""
    default = json.dumps(told["default"]) if told.get("default") not in (None, "") else ""
    if name in schema.get("required", ()):
        default = "required"
    return f"| `{name}` | {kind} | {default} | {_range(told)} | {told['description']} |\n"


def _neutral(field: Unavailable) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in field.neutral)


def kinds(told: Schema, schemas: dict[str, Schema]) -> set[str]:
    """The JSON types that a value may have; {""}: any."""
    if "$ref" in told:
        return kinds(schemas[told["$ref"].rpartition("/")[2]], schemas)
    for key in ("anyOf", "oneOf"):
        if key in told:
            return set().union(*(kinds(each, schemas) for each in told[key]))
    kind = told.get("type", "")
    return {kind} if isinstance(kind, str) else set(kind)


def _range(told: Schema) -> str:
    above = "exclusiveMinimum" in told
    return limits_text(
        told.get("exclusiveMinimum", told.get("minimum")), told.get("maximum"), above
    )
