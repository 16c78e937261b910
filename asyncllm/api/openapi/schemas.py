"""JSON schemas of the messages of requests and of answers.

Knows shapes as the protocols have them; which field has which is in
:mod:`asyncllm.api.openapi.document`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from asyncllm.api.common import tool_request
from asyncllm.api.common.validation import Field
from asyncllm.api.openai import messages
from asyncllm.api.responses.tools import HOSTED

Schema = dict[str, Any]

STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
MAYBE_STRING: Final[Schema] = {"type": ["string", "null"]}
_LOADS = ("current_load", "logical_max_load", "dynamic_max_load")
_OF_GROUPS: Final[Schema] = {"anyOf": [NUMBER, {"type": "array", "items": NUMBER}]}
TOKEN: Final[Schema] = {"$ref": "#/components/schemas/Token"}  # its end is the model's


def ref(name: str) -> Schema:
    """A schema of the document by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def required(field: Field) -> Field:
    """The same field where it must be there."""
    return replace(field, required=True)


def made(closed: bool = False, **properties: Schema) -> Schema:
    """An object that has all of these properties."""
    schema: Schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }
    return schema | ({"additionalProperties": False} if closed else {})


def _with_groups(schema: Schema) -> Schema:
    """Beside the rest: which groups of --dp the server goes on without."""
    lost = {"type": "array", "items": INTEGER}
    return {**schema, "properties": {**schema["properties"], "lost_groups": lost}}


def some(items: Schema) -> Schema:
    """An array."""
    return {"type": "array", "items": items}


def one_of(*values: Any) -> Schema:
    """One of these."""
    return {"enum": list(values)}


def _any_case(word: str) -> str:
    return "".join(f"[{char}{char.upper()}]" for char in word)


# -- in ----------------------------------------------------------------------------------------

_PART: Final[Schema] = {
    "anyOf": [
        STRING,
        made(type=one_of("text", "input_text", "output_text"), text=STRING),
        made(type=one_of("refusal"), refusal=STRING),
    ]
}
_PARTS: Final[Schema] = some(_PART)


def tool(layout: tool_request.ToolLayout) -> Schema:
    """A tool in a protocol's words."""
    inner: Schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": f"^{tool_request.NAME}$"},
            "description": MAYBE_STRING,
            "strict": {"type": ["boolean", "null"]},
            layout.schema: {
                "type": "object" if layout.needs_schema else ["object", "null"],
                "properties": {"type": one_of("object")},
            },
        },
        "required": ["name", *([layout.schema] if layout.needs_schema else [])],
    }
    kind = one_of(layout.kind, *([None] if layout.untyped else []))
    needed = [] if layout.untyped else ["type"]
    if layout.inner:
        properties = {"type": kind, layout.inner: inner}
        return {"type": "object", "properties": properties, "required": [*properties]}
    inner["properties"]["type"] = kind
    inner["required"] += needed
    return inner


_FUNCTION: Final[Schema] = made(type=one_of("function"), function=made(name=STRING))


def _allowed(function: Schema) -> Schema:
    return made(mode=one_of(*tool_request.ALLOWED_MODES), tools={**some(function), "minItems": 1})


TOOL_CHOICE: Final[Schema] = {
    "anyOf": [
        one_of(*tool_request.MODES),
        _FUNCTION,
        made(type=one_of("allowed_tools"), allowed_tools=_allowed(_FUNCTION)),
    ]
}
_CALLED: Final[Schema] = made(type=one_of("function", "custom"), name=STRING)
FLAT_CHOICE: Final[Schema] = {
    "anyOf": [
        one_of(*tool_request.MODES),
        _CALLED,
        {"allOf": [made(type=one_of("allowed_tools")), _allowed(made(type=STRING))]},
    ]
}
_CUSTOM_TOOL: Final[Schema] = {
    "type": "object",
    "properties": {
        "type": one_of("custom"),
        "name": STRING,
        "description": MAYBE_STRING,
        "format": {
            "anyOf": [
                made(type=one_of("text")),
                made(type=one_of("grammar"), syntax=one_of("lark", "regex"), definition=STRING),
                {"type": "null"},
            ]
        },
    },
    "required": ["type", "name"],
}
_CALLABLE: Final[Schema] = {"anyOf": [tool(tool_request.FLAT), _CUSTOM_TOOL]}
_HOSTED_TOOL: Final[Schema] = made(
    type={"type": "string", "pattern": f"^({'|'.join(HOSTED)})([_-]20.*)?$"}
)
RESPONSES_TOOL: Final[Schema] = {
    "anyOf": [
        tool(tool_request.FLAT),
        _CUSTOM_TOOL,
        made(type=one_of("namespace"), name=STRING, tools=some(_CALLABLE)),
        _HOSTED_TOOL,
    ]
}
_PAST_CALL: Final[Schema] = {
    "type": "object",
    "properties": {
        "function": {
            "type": "object",
            "properties": {
                "name": STRING,
                "arguments": {"type": ["object", "string"], "description": "JSON"},
            },
            "required": ["name"],
        }
    },
    "required": ["function"],
}


def _chat_message(roles: Sequence[str], content: Schema, needed: tuple[str, ...]) -> Schema:
    return {
        "type": "object",
        "properties": {
            "role": {
                "type": "string",
                "description": f"{' or '.join(roles)}, in any case",
                "pattern": f"^({'|'.join(map(_any_case, roles))})$",
            },
            "content": content,
            "name": MAYBE_STRING,
            "tool_call_id": MAYBE_STRING,
            "tool_calls": {"anyOf": [some(_PAST_CALL), {"type": "null"}]},
            "reasoning_content": MAYBE_STRING,
        },
        "required": ["role", *needed],
    }


_SAID: Final[Schema] = {"anyOf": [STRING, _PARTS]}
_MAYBE_SAID: Final[Schema] = {"anyOf": [STRING, _PARTS, {"type": "null"}]}
CHAT_MESSAGE: Final[Schema] = {
    "anyOf": [
        _chat_message([r for r in messages.ROLES if r != "assistant"], _SAID, ("content",)),
        _chat_message(["assistant"], _MAYBE_SAID, ()),  # who may have made calls only
    ]
}


def _input_message(roles: Sequence[str], content: Schema, needed: tuple[str, ...]) -> Schema:
    return {
        "type": "object",
        "properties": {"type": one_of("message"), "role": one_of(*roles), "content": content},
        "required": ["role", *needed],
    }


_THOUGHTS: Final[Schema] = {"anyOf": [some(made(text=STRING)), {"type": "null"}]}
INPUT_ITEM: Final[Schema] = {
    "anyOf": [
        _input_message(("user", "system", "developer"), _SAID, ("content",)),
        _input_message(("assistant",), _MAYBE_SAID, ()),
        made(type=one_of("function_call"), call_id=STRING, name=STRING, arguments=STRING),
        made(type=one_of("custom_tool_call"), call_id=STRING, name=STRING, input=STRING),
        made(type=one_of("compaction", "compaction_summary"), encrypted_content=STRING),
        made(
            type=one_of("function_call_output", "custom_tool_call_output"),
            call_id=STRING,
            output={"anyOf": [STRING, _PARTS]},
        ),
        {
            "type": "object",
            "properties": {
                "type": one_of("reasoning"),
                "content": _THOUGHTS,
                "summary": _THOUGHTS,
            },
            "required": ["type"],
        },
    ]
}
_TEXT_FORMAT: Final[Schema] = {
    "anyOf": [
        made(type=one_of("text", "json_object")),
        made(type=one_of("json_schema"), name=STRING, schema={"type": "object"}),
        {"type": "null"},
    ]
}
TEXT_OPTIONS: Final[Schema] = {
    "type": "object",
    "properties": {"format": _TEXT_FORMAT, "verbosity": one_of("low", "medium", "high", None)},
}

# -- out ---------------------------------------------------------------------------------------

_REASON: Final = one_of("stop", "length", "tool_calls", "function_call", "abort")
_USAGE: Final[Schema] = made(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=made(cached_tokens=INTEGER),
)
_CALL: Final[Schema] = made(
    id=STRING, type=one_of("function"), function=made(name=STRING, arguments=STRING)
)
_CHAT_MESSAGE: Final[Schema] = made(role=one_of("assistant"), content=MAYBE_STRING)
_CHAT_MESSAGE["properties"] |= {
    "tool_calls": some(_CALL),
    "reasoning": MAYBE_STRING,
    "reasoning_content": MAYBE_STRING,
}
_CHAT_CHOICE: Final[Schema] = made(
    index=INTEGER,
    message=_CHAT_MESSAGE,
    logprobs={"type": ["object", "null"]},
    finish_reason=_REASON,
)
_TEXT_CHOICE: Final[Schema] = made(
    index=INTEGER, text=STRING, logprobs={"type": ["object", "null"]}, finish_reason=_REASON
)
_MODEL: Final[Schema] = made(
    id=STRING,
    object=one_of("model"),
    created=INTEGER,
    owned_by=STRING,
    root=STRING,
    parent=MAYBE_STRING,
    max_model_len=INTEGER,
)
_ANSWER: Final[Schema] = made(
    id=STRING,
    object=one_of("response"),
    created_at=INTEGER,
    status=one_of("completed", "incomplete"),
    error={"type": ["object", "null"]},
    incomplete_details={"type": ["object", "null"]},
    model=STRING,
    output=some({"type": "object"}),
    previous_response_id=MAYBE_STRING,
    store={"type": "boolean"},
    usage=made(input_tokens=INTEGER, output_tokens=INTEGER, total_tokens=INTEGER),
)
_MESSAGE: Final[Schema] = made(
    id=STRING,
    type=one_of("message"),
    role=one_of("assistant"),
    model=STRING,
    content=some(made(type=STRING)),
    stop_reason=one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
    stop_sequence=MAYBE_STRING,
    usage=made(
        input_tokens=INTEGER,
        cache_creation_input_tokens=INTEGER,
        cache_read_input_tokens=INTEGER,
        output_tokens=INTEGER,
    ),
)

_TGI: Final[Schema] = made(generated_text=STRING, logprobs=some({"type": "object"}))
_TGI["properties"]["details"] = made(
    finish_reason=one_of("length", "eos_token", "stop_sequence", "abort"),
    generated_tokens=INTEGER,
    seed={"type": ["integer", "null"]},
    prefill=some({"type": "object"}),
    tokens=some({"type": "object"}),
)


def _one_or_more(schema: Schema) -> Schema:
    return {"anyOf": [schema, some(schema)]}


ANSWERS: Final[dict[str, Schema]] = {
    # one event of a stream; what its data may be is in the API's description
    "Event": {
        "type": "object",
        "properties": {"event": STRING, "data": STRING},
        "required": ["data"],
    },
    "Error": made(
        closed=True,
        error=made(message=STRING, type=STRING, param=MAYBE_STRING, code=MAYBE_STRING),
    ),
    "AnthropicError": made(
        closed=True, type=one_of("error"), error=made(closed=True, type=STRING, message=STRING)
    ),
    "ChatCompletion": made(
        id=STRING,
        object=one_of("chat.completion"),
        created=INTEGER,
        model=STRING,
        choices=some(_CHAT_CHOICE),
        usage=_USAGE,
    ),
    "Completion": made(
        id=STRING,
        object=one_of("text_completion"),
        created=INTEGER,
        model=STRING,
        choices=some(_TEXT_CHOICE),
        usage=_USAGE,
    ),
    "Response": _ANSWER,
    "Deleted": made(id=STRING, object=one_of("response"), deleted=one_of(True)),
    "Model": _MODEL,
    "Models": made(object=one_of("list"), data=some(_MODEL)),
    "Message": _MESSAGE,
    "InputTokens": made(input_tokens=INTEGER),
    "Tokenized": made(
        count=INTEGER,
        max_model_len=INTEGER,
        tokens=some(INTEGER),
        token_strs={"anyOf": [some(STRING), {"type": "null"}]},
    ),
    "Detokenized": made(prompt=STRING),
    "Version": made(version=STRING),
    "Native": made(
        generated_text=some(STRING),
        count_output_tokens=_one_or_more(INTEGER),
        finish_reason=_one_or_more(one_of("stop", "length", "abort")),
        prompt_tokens=INTEGER,
        logprobs=some(_one_or_more({"type": "object"})),
        input_usage=made(
            input_text_tokens=INTEGER, input_audio_tokens=INTEGER, input_image_tokens=INTEGER
        ),
    ),
    "Tgi": _TGI,
    "TgiList": some(_TGI),
    "TgiError": made(
        closed=True, error=STRING, error_type=one_of("validation", "overloaded", "generation")
    ),
    "NumTokens": made(ntokens=INTEGER),
    "Success": made(success=one_of(True)),
    "ServerInfo": made(version=STRING),
    "TokenLoad": {
        "type": "object",
        "properties": dict.fromkeys([*_LOADS, "sliding_load"], _OF_GROUPS),
        "required": [*_LOADS],  # the other one where layers with a window have slots of their own
    },
    "ModelName": made(model_name=STRING),
    "Health": _with_groups(made(message=one_of("Ok", "Error"))),
    "Status": _with_groups(made(status=one_of("ok", "not ready"))),
    "Document": made(openapi=STRING, info={"type": "object"}, paths={"type": "object"}),
}
