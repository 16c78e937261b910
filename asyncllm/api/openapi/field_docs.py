"""The field tables as Markdown, for docs/api.md.

Knows the declarations; knows nothing of requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common.validation import Field, UnsupportedField
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import request as openai
from asyncllm.api.responses import request as responses
from asyncllm.api.tgi import request as tgi

FIELDS: Final[dict[str, Sequence[Field]]] = {
    "common": openai.COMMON,
    "stream_options": openai.STREAM_OPTIONS,
    "completion": openai.COMPLETION[len(openai.COMMON) :],
    "chat": openai.CHAT[len(openai.COMMON) :],
    "responses": responses.RESPONSES,
    "messages": anthropic.MESSAGES,
    "native": lightllm.BODY,
    "native_parameters": lightllm.PARAMETERS,
    "tgi_parameters": tgi.OWN,
    "abort": lightllm.ABORT,
}
REFUSED: Final[dict[str, Sequence[UnsupportedField]]] = {
    "completion_refused": openai.COMPLETION_UNAVAILABLE,
    "chat_refused": openai.CHAT_UNAVAILABLE,
    "responses_refused": responses.UNAVAILABLE,
    "messages_refused": anthropic.UNAVAILABLE,
    "native_refused": lightllm.UNAVAILABLE,
    "tgi_refused": tgi.UNAVAILABLE[: -len(lightllm.UNAVAILABLE)],
}
_BLOCK: Final = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(document: str) -> str:
    """``document`` with every ``<!-- table NAME -->`` block made anew.

    Raises KeyError for a name that is no table.
    """
    return _BLOCK.sub(lambda m: m[1] + _markdown(m[2]) + m[3], document)


def _markdown(name: str) -> str:
    if name in REFUSED:
        rows = [f"| `{r.name}` | {r.doc} | {_neutral(r)} |" for r in REFUSED[name]]
        head = "| field | what is not available | passes all the same |\n|---|---|---|\n"
    else:
        rows = [
            f"| `{f.name}` | {_kind(f)} | {_default(f)} | {f.limits()} | {f.doc} |"
            for f in FIELDS[name]
        ]
        head = "| field | type | default | range | meaning |\n|---|---|---|---|---|\n"
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
