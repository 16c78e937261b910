"""The list of models as Anthropic has it: /v1/models with the header ``anthropic-version``."""

from __future__ import annotations

from datetime import UTC, datetime

from asyncllm.api.common.request import ServedModel


def models(served: ServedModel) -> dict[str, object]:
    """/v1/models: one page with all of them."""
    listed = [model(served, name) for name in served.listed]
    ends = {"first_id": served.listed[0], "last_id": served.listed[-1]}
    return {"data": listed, "has_more": False, **ends}


def model(served: ServedModel, name: str) -> dict[str, object]:
    """/v1/models/{name}. Raises ModelNotFound (404)."""
    served.check_name(name)
    created = datetime.fromtimestamp(served.created, UTC)
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": served.max_len,
        "max_tokens": served.max_len,
    }
