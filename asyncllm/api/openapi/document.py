"""The OpenAPI document of this server, made from the tables that check its requests.

A body that the document calls wrong is refused by the server; what both know about a value stands
in one place, the :class:`~asyncllm.api.common.validation.Field`. Knows routes and shapes; serves
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from asyncllm import __version__
from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common import conversation, prepare, tool_request, validation
from asyncllm.api.common.model import RequestModel
from asyncllm.api.common.request import ServedModel
from asyncllm.api.common.validation import Field, UnsupportedField
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import messages, tokenize
from asyncllm.api.openai import request as openai
from asyncllm.api.openapi import schemas
from asyncllm.api.openapi.schemas import Schema
from asyncllm.api.responses import items as response_items
from asyncllm.api.responses import request as responses
from asyncllm.api.responses.tools import responses_tools
from asyncllm.api.tgi import request as tgi

# -- values of fields that no type and range can describe, by the function that checks them --------

_STOP: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": validation.MAX_STOP_CHARS}
_IDS: Final[Schema] = {"type": "array", "items": schemas.TOKEN, "minItems": 1}
_PROMPT: Final[Schema] = {"type": "string", "minLength": 1}
_PROMPTS: Final[Schema] = {"type": "array", "items": _PROMPT, "minItems": 1}
_SEQUENCE: Final[Schema] = {**_IDS, "maxItems": lightllm.MAX_SEQUENCE}
_NATIVE_STOP: Final[Schema] = {"anyOf": [_STOP, _SEQUENCE]}

_JSON_SCHEMA: Final[Schema] = {"type": ["object", "string"]}


def _list(items: Schema, most: int, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


PARSED: Final[dict[Any, Schema]] = {
    validation.stop_strings: {"anyOf": [_STOP, _list(_STOP, validation.MAX_STOP)]},
    validation.stop_ids: _list(schemas.TOKEN, validation.MAX_STOP_IDS),
    validation.logit_bias: {
        "type": "object",
        "maxProperties": validation.MAX_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
    tgi.form: {
        "anyOf": [
            schemas.made(type=schemas.one_of("json", "json_schema"), value=_JSON_SCHEMA),
            schemas.made(type=schemas.one_of("regex"), value={"type": "string"}),
        ]
    },
    messages.messages: _list(schemas.CHAT_MESSAGE, conversation.MAX_MESSAGES, 1),
    tool_request.tools: _list(schemas.tool(tool_request.CHAT), tool_request.MAX_TOOLS),
    tool_request.functions: _list(schemas.tool(tool_request.OLD), tool_request.MAX_TOOLS),
    tool_request.function_call: {
        "anyOf": [schemas.one_of("none", "auto"), schemas.made(name=schemas.STRING)]
    },
    responses_tools: _list(schemas.RESPONSES_TOOL, tool_request.MAX_TOOLS),
    tool_request.choice: schemas.TOOL_CHOICE,
    messages.template_kwargs: {
        "type": "object",
        "propertyNames": schemas.ref("Variable"),
    },
    response_items.input_messages: {
        "anyOf": [{"type": "string"}, _list(schemas.INPUT_ITEM, conversation.MAX_MESSAGES, 1)]
    },
    responses.text_options: schemas.TEXT_OPTIONS,
    responses.effort: {"type": "object", "properties": {"effort": schemas.MAYBE_STRING}},
    responses.include: {"type": "array", "items": schemas.STRING},
    responses.metadata: {
        "type": "object",
        "maxProperties": responses.MAX_METADATA,
        "additionalProperties": {"type": "string", "maxLength": responses.MAX_METADATA_CHARS},
    },
}
# and of those that are taken apart elsewhere, by name
NAMED: Final[dict[str, Schema]] = {
    "prompt": {
        "anyOf": [
            _PROMPT,
            {**_PROMPTS, "maxItems": validation.MAX_PROMPTS},
            _IDS,
            {"type": "array", "items": _IDS, "minItems": 1, "maxItems": validation.MAX_PROMPTS},
        ]
    },
    "tool_choice": schemas.FLAT_CHOICE,
    "inputs": {"anyOf": [_PROMPT, _IDS]},
    "stop_sequences": {"anyOf": [_STOP, _list(_NATIVE_STOP, validation.MAX_STOP)]},
}


MODELS: Final = (
    anthropic.MessageRequest,
    anthropic.CountRequest,
    tokenize.TokenizeRequest,
    tokenize.DetokenizeRequest,
)


def of_field(field: Field) -> Schema:
    """What a field may be; null is absence wherever absence is allowed."""
    schema: Schema = {"description": field.doc}
    shape = PARSED.get(field.parse) if field.parse else None
    if shape is None and field.kind == "any":
        shape = NAMED.get(field.name)
    if field.name == "stream_options":
        shape = of_table(openai.STREAM_OPTIONS)
    if shape is not None:
        schema |= shape if field.required else {"anyOf": [shape, {"type": "null"}]}
    elif field.choices:
        schema["enum"] = [*field.choices, *([] if field.required else [None])]
    elif field.kind != "any":
        schema["type"] = field.kind if field.required else [field.kind, "null"]
    if field.low is not None:
        schema["exclusiveMinimum" if field.above else "minimum"] = field.low
    if field.high is not None:
        schema["maximum"] = field.high
    if isinstance(field.default, bool | int | float | str):
        schema["default"] = field.default
    return schema


def of_refused(refused: UnsupportedField) -> Schema:
    """The values of a refused field that pass all the same."""
    return {
        "description": f"{refused.doc}: not available on this server",
        "enum": [None, *refused.neutral],
    }


def of_table(
    table: Sequence[Field], refused: Sequence[UnsupportedField] = (), required: Sequence[str] = ()
) -> Schema:
    """A whole body."""
    needed = [f.name for f in table if f.required or f.name in required]
    properties = {r.name: of_refused(r) for r in refused}
    for field in table:
        must = field.required or field.name in required
        properties[field.name] = of_field(schemas.required(field) if must else field)
    schema: Schema = {
        "type": "object",
        "description": "Fields that are not listed are accepted and ignored.",
        "properties": properties,
        "additionalProperties": True,
    }
    return schema | ({"required": needed} if needed else {})


def _native(*more: Field, tgi_mode: bool) -> Schema:
    body = of_table((*lightllm.BODY, *more), required=("inputs",))
    parameters = of_table(lightllm.PARAMETERS, lightllm.UNAVAILABLE)
    if tgi_mode:
        body = of_table((*lightllm.BODY, tgi.NUM_BEAM, *more), required=("inputs",))
        parameters = of_table(tgi.PARAMETERS, tgi.UNAVAILABLE)
    body["properties"]["parameters"] |= {"anyOf": [parameters, {"type": "null"}]}
    del body["properties"]["parameters"]["type"]
    return body


def _tokens() -> Schema:
    parameters = of_table(lightllm.TOKENS_PARAMETERS)
    body = of_table((lightllm.TEXT,))
    body["properties"]["parameters"] = {"anyOf": [parameters, {"type": "null"}]}
    return body


def _bodies(tgi_mode: bool) -> dict[str, Schema]:
    return {
        "ChatRequest": of_table(openai.CHAT, openai.CHAT_UNAVAILABLE, ("messages",)),
        "CompletionRequest": of_table(
            openai.COMPLETION, openai.COMPLETION_UNAVAILABLE, ("prompt",)
        ),
        "ResponseRequest": of_table(responses.RESPONSES, responses.UNAVAILABLE),
        "NativeRequest": _native(tgi_mode=tgi_mode),
        "NativeAnyRequest": _native(lightllm.STREAM, tgi_mode=tgi_mode),
        "TokensRequest": _tokens(),
        "AbortRequest": of_table(lightllm.ABORT),
        **of_models(MODELS),
    }


class _Untitled(GenerateJsonSchema):
    """Fields have names and descriptions, and need no titles made of their names."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def of_models(models: Sequence[type[RequestModel]]) -> dict[str, Schema]:
    """The schemas of models, and of what they consist of, by name."""
    _, whole = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Untitled,
    )
    made: dict[str, Schema] = whole["$defs"]
    return made


# -- routes ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One operation.

    Args:
        body: schema of the request's body, "" for none.
        answer: schema of the JSON answer, "" where it is other text of type ``media``.
        streams: the answer may be, or (without ``answer``) is, a stream of events.
        fails: statuses of errors besides 401 and 500.
        open: no key is asked for.
    """

    path: str
    tag: str
    summary: str
    methods: tuple[str, ...] = ("get",)
    body: str = ""
    answer: str = ""
    media: str = ""
    streams: bool = False
    fails: tuple[int, ...] = ()
    error: str = "Error"
    open: bool = False


_TEXT_FAILS: Final = (400, 404, 408, 413, 429, 499, 503)
_POST: Final = ("post",)
_BOTH: Final = ("get", "post")

ROUTES: Final = (
    Route(path="/v1/chat/completions", tag="OpenAI", summary="Answer a conversation", methods=_POST,
          body="ChatRequest", answer="ChatCompletion", streams=True, fails=_TEXT_FAILS),
    Route(path="/v1/completions", tag="OpenAI", summary="Continue texts", methods=_POST,
          body="CompletionRequest", answer="Completion", streams=True, fails=_TEXT_FAILS),
    Route(path="/v1/responses", tag="OpenAI", summary="Answer a conversation, and remember it",
          methods=_POST, body="ResponseRequest", answer="Response", streams=True,
          fails=_TEXT_FAILS),
    Route(path="/v1/responses/{id}", tag="OpenAI", summary="A stored response", answer="Response",
          fails=(404,)),
    Route(path="/v1/responses/{id}", tag="OpenAI", summary="Forget a stored response",
          methods=("delete",), answer="Deleted", fails=(404,)),
    Route(path="/v1/models", tag="OpenAI", summary="The model and its names", answer="Models"),
    Route(path="/v1/models/{id}", tag="OpenAI", summary="One of them", answer="Model", fails=(404,)),
    Route(path="/v1/messages", tag="Anthropic", summary="Answer a conversation", methods=_POST,
          body="MessageRequest", answer="Message", streams=True, fails=_TEXT_FAILS,
          error="AnthropicError"),
    Route(path="/v1/messages/count_tokens", tag="Anthropic", summary="Length of its prompt",
          methods=_POST, body="CountRequest", answer="InputTokens", fails=_TEXT_FAILS,
          error="AnthropicError"),
    Route(path="/generate", tag="LightLLM", summary="Continue a text", methods=_POST,
          body="NativeRequest", answer="Native", fails=_TEXT_FAILS),
    Route(path="/generate_stream", tag="LightLLM", summary="Continue a text, token by token",
          methods=_POST, body="NativeRequest", streams=True, fails=_TEXT_FAILS),
    Route(path="/", tag="LightLLM", summary="One of the two, as stream says", methods=_POST,
          body="NativeAnyRequest", answer="Native", streams=True, fails=_TEXT_FAILS),
    Route(path="/tokens", tag="LightLLM", summary="Length of a text", methods=_POST,
          body="TokensRequest", answer="NumTokens", fails=(400, 408, 413, 429, 503)),
    Route(path="/tokenize", tag="OpenAI", summary="Token ids of a text or of a chat", methods=_POST,
          body="TokenizeRequest", answer="Tokenized", fails=_TEXT_FAILS),
    Route(path="/detokenize", tag="OpenAI", summary="The text of token ids", methods=_POST,
          body="DetokenizeRequest", answer="Detokenized", fails=(400, 404, 408, 413)),
    Route(path="/version", tag="Operation", summary="This server's version", answer="Version"),
    Route(path="/ping", tag="Operation", summary="As /health", methods=_BOTH, answer="Health",
          fails=(503,), error="Health", open=True),
    Route(path="/abort_request", tag="LightLLM", summary="End requests early", methods=_POST,
          body="AbortRequest", answer="Success", fails=(400, 408, 413)),
    Route(path="/get_server_info", tag="LightLLM", summary="The server's options", methods=_BOTH,
          answer="ServerInfo"),
    Route(path="/token_load", tag="LightLLM", summary="How full the server is", answer="TokenLoad",
          fails=(503,)),
    Route(path="/get_model_name", tag="LightLLM", summary="The model's name", methods=_BOTH,
          answer="ModelName"),
    Route(path="/health", tag="Operation", summary="Serving and not draining", answer="Health",
          fails=(503,), error="Health", open=True),
    Route(path="/healthz", tag="Operation", summary="The same", answer="Health", fails=(503,),
          error="Health", open=True),
    Route(path="/readiness", tag="Operation", summary="The same", methods=_BOTH, answer="Status",
          fails=(503,), error="Status", open=True),
    Route(path="/liveness", tag="Operation", summary="The process answers", methods=_BOTH,
          answer="Status", open=True),
    Route(path="/metrics", tag="Operation", summary="Prometheus metrics", media="text/plain",
          fails=(503,)),
    Route(path="/openapi.json", tag="Operation", summary="This document", answer="Document"),
    Route(path="/docs", tag="Operation", summary="Swagger UI", media="text/html"),
)  # fmt: skip

REASONS: Final = {
    200: "OK",
    400: "A field or the body is wrong, or asks for what is not available",
    401: "No valid API key",
    404: "No such model, response or path",
    408: "The body did not come in time",
    413: "The body is too large",
    429: "Too many requests at once; Retry-After says when to come back",
    499: "Ended by /abort_request before it began",
    500: "The server failed",
    503: "The server is going down, or a part of it does not answer",
}


def document(served: ServedModel, *, secured: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    Args:
        secured: API keys are asked for.
    """
    paths: dict[str, dict[str, Any]] = {}
    for route in (_in_tgi(r) if served.tgi else r for r in ROUTES):
        for method in route.methods:
            paths.setdefault(route.path, {})[method] = _operation(route, method, secured)
    token = {"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1}
    variable = {"enum": prepare.settable(served.dialect.variables)}
    components: dict[str, Any] = {
        "schemas": {"Token": token, "Variable": variable} | _bodies(served.tgi) | schemas.ANSWERS
    }
    whole: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "asyncllm",
            "version": __version__,
            "description": f"Serves {served.name}, {served.max_len} tokens per request. null means "
            "absent; unknown fields are ignored.",
        },
        "paths": paths,
        "components": components,
    }
    if secured:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        whole["security"] = [{"bearer": []}, {"key": []}]
    return whole


def _in_tgi(route: Route) -> Route:
    """A route as --use_tgi_api has it."""
    if not route.body.startswith("Native"):
        return route
    answer = "TgiList" if route.path == "/" else route.answer and "Tgi"
    return replace(route, answer=answer, error="TgiError")


def _operation(route: Route, method: str, secured: bool) -> dict[str, Any]:
    name = "".join(c if c.isalnum() else "_" for c in route.path).strip("_") or "root"
    operation: dict[str, Any] = {
        "operationId": f"{method}_{name}",
        "tags": [route.tag],
        "summary": route.summary,
    }
    if "{id}" in route.path:
        operation["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if route.body:
        content = {"application/json": {"schema": schemas.ref(route.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    answers: dict[str, Any] = {}
    if route.answer:
        answers["application/json"] = {"schema": schemas.ref(route.answer)}
    if route.streams:
        answers["text/event-stream"] = {"schema": schemas.ref("Event")}
    if route.media:
        answers[route.media] = {"schema": {"type": "string"}}
    good = {"description": REASONS[200], "content": answers}
    operation["responses"] = {"200": good}
    if route.answer == "Response" and route.body:
        good["links"] = {
            other: {
                "operationId": f"{other}_v1_responses__id",
                "parameters": {"id": "$response.body#/id"},
            }
            for other in ("get", "delete")
        }
    guarded = secured and not route.open
    for status in sorted({*route.fails, 500, *((401,) if guarded else ())}):
        error = "Error" if status == 500 and route.error in {"Health", "Status"} else route.error
        content = {"application/json": {"schema": schemas.ref(error)}}
        operation["responses"][str(status)] = {"description": REASONS[status], "content": content}
    if secured and route.open:
        operation["security"] = []
    return operation
