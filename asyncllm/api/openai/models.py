"""The list of models as OpenAI has it: /v1/models and /v1/models/{name}."""

from __future__ import annotations

from asyncllm.api.common import sse
from asyncllm.api.common.request import ServedModel


def models(served: ServedModel) -> bytes:
    """/v1/models."""
    return sse.body({"object": "list", "data": [model(served, name) for name in served.listed]})


def model(served: ServedModel, name: str) -> dict[str, object]:
    """/v1/models/{name}. Raises ModelNotFound (404)."""
    served.check_name(name)
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": served.owned_by,
        "root": served.name,
        "parent": None,
        "max_model_len": served.max_len,
    }
