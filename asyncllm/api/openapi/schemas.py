"""JSON schemas of answers.

Knows shapes as the protocols have them; which route has which is in
:mod:`asyncllm.api.openapi.document`.
"""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]

STRING: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
NUMBER: Final[Schema] = {"type": "number"}
MAYBE_STRING: Final[Schema] = {"type": ["string", "null"]}
OBJECT: Final[Schema] = {"type": "object"}
MAYBE_OBJECT: Final[Schema] = {"type": ["object", "null"]}
_LOADS = ("current_load", "logical_max_load", "dynamic_max_load")
_OF_GROUPS: Final[Schema] = {"anyOf": [NUMBER, {"type": "array", "items": NUMBER}]}


def ref(name: str) -> Schema:
    """A schema of the document by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


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
    return {**schema, "properties": {**schema["properties"], "lost_groups": some(INTEGER)}}


def some(items: Schema) -> Schema:
    """An array."""
    return {"type": "array", "items": items}


def one_of(*values: Any) -> Schema:
    """One of these."""
    return {"enum": list(values)}


_REASON: Final = one_of("stop", "length", "tool_calls", "function_call", "abort")
_USAGE: Final[Schema] = made(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=made(cached_tokens=INTEGER),
)
_CALL: Final[Schema] = {
    "anyOf": [
        made(id=STRING, type=one_of("function"), function=made(name=STRING, arguments=STRING)),
        made(id=STRING, type=one_of("custom"), custom=made(name=STRING, input=STRING)),
    ]
}
_CHAT_MESSAGE: Final[Schema] = made(role=one_of("assistant"), content=MAYBE_STRING)
_CHAT_MESSAGE["properties"] |= {
    "tool_calls": some(_CALL),
    "reasoning": MAYBE_STRING,
    "reasoning_content": MAYBE_STRING,
}
_CHAT_CHOICE: Final[Schema] = made(
    index=INTEGER,
    message=_CHAT_MESSAGE,
    logprobs=MAYBE_OBJECT,
    finish_reason=_REASON,
)
_TEXT_CHOICE: Final[Schema] = made(
    index=INTEGER, text=STRING, logprobs=MAYBE_OBJECT, finish_reason=_REASON
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
    error=MAYBE_OBJECT,
    incomplete_details=MAYBE_OBJECT,
    model=STRING,
    output=some(OBJECT),
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

_TGI: Final[Schema] = made(generated_text=STRING, logprobs=some(OBJECT))
_TGI["properties"]["details"] = made(
    finish_reason=one_of("length", "eos_token", "stop_sequence", "abort"),
    generated_tokens=INTEGER,
    seed={"type": ["integer", "null"]},
    prefill=some(OBJECT),
    tokens=some(OBJECT),
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
    "ResponseTokens": made(object=one_of("response.input_tokens"), input_tokens=INTEGER),
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
        logprobs=some(_one_or_more(OBJECT)),
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
    "Document": made(openapi=STRING, info=OBJECT, paths=OBJECT),
}
