"""huggingface_hub's InferenceClient against ROOT_URL (--use_tgi_api); exits 1 if a check fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from checks import agree, run_all
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

client = InferenceClient(base_url=os.environ["ROOT_URL"], timeout=120)
native = InferenceClient(model=os.environ["ROOT_URL"], timeout=120)
PROMPT = "The capital of France is"
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FUNCTION = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]


def generated() -> str:
    text = native.text_generation(PROMPT, max_new_tokens=5)
    details = native.text_generation(PROMPT, max_new_tokens=5, details=True)
    agree((details.generated_text, len(details.details.tokens)), (text, 5))
    agree("".join(native.text_generation(PROMPT, max_new_tokens=5, stream=True)), text)
    events = list(native.text_generation(PROMPT, max_new_tokens=5, stream=True, details=True))
    agree((events[-1].generated_text, events[-1].details.generated_tokens), (text, 5))
    return repr(text)


def grammars() -> str:
    form = {"type": "json", "value": SCHEMA}
    made = native.text_generation("Is it good?", max_new_tokens=40, grammar=form)
    agree(set(json.loads(made)), {"ok"})
    return made


def chats() -> str:
    asked = {"max_tokens": 4, "temperature": 0.01, "seed": 1}
    whole = client.chat_completion(HI, **asked)
    pieces = client.chat_completion(
        HI, stream=True, stream_options={"include_usage": True}, **asked
    )
    chunks = list(pieces)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    agree(text, whole.choices[0].message.content)
    agree(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
    agree(whole.system_fingerprint.startswith("asyncllm"), True)
    return repr(text)


def forms() -> str:
    """It may send a schema as a json_object with a value, which must not be lost."""
    made = []
    for form in (
        {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
        {"type": "json_object"},
    ):
        answer = client.chat_completion(HI, response_format=form, max_tokens=120, temperature=0.01)
        made.append(json.loads(answer.choices[0].message.content))
    agree(set(made[0]), {"ok"})
    return f"{made}"[:120]


def tools() -> str:
    calls = []
    for choice in ("required", {"function": {"name": "get_weather"}}):
        answer = client.chat_completion(
            HI, tools=TOOLS, tool_choice=choice, max_tokens=60, temperature=0.01
        )
        calls.append(answer.choices[0].message.tool_calls[0].function)
    agree([call.name for call in calls], ["get_weather"] * 2)
    return f"{[call.arguments for call in calls]}"[:100]


def refusals() -> str:
    try:
        client.chat_completion(HI, max_tokens=10**6)
    except HfHubHTTPError as error:
        agree(error.response.status_code, 400)
        return str(error)[-90:]
    raise ValueError("max_tokens that do not fit were taken")


CHECKS: dict[str, Callable[[], Any]] = {
    "text generation": generated,
    "grammars": grammars,
    "chats": chats,
    "forms": forms,
    "tools": tools,
    "refusals": refusals,
}

run_all(CHECKS)
