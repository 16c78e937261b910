"""The OpenAPI document of this server, made from the models that check its requests.

A body that the document calls wrong is refused by the server. Knows routes and the schemas of
answers; serves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core.core_schema import StringSchema

from asyncllm import __version__
from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.common import prepare
from asyncllm.api.common.request import ServedModel
from asyncllm.api.common.request_model import RequestModel
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.openai import messages, tokenize
from asyncllm.api.openai import request as openai
from asyncllm.api.openapi import schemas
from asyncllm.api.openapi.schemas import Schema
from asyncllm.api.responses import request as responses
from asyncllm.api.tgi import request as tgi

# -- bodies ------------------------------------------------------------------------------------

BODIES: Final = (
    openai.ChatRequest, openai.CompletionRequest, responses.ResponseRequest, responses.PromptRequest,
    anthropic.MessageRequest, anthropic.CountRequest, lightllm.TokensRequest, lightllm.AbortRequest,
    tokenize.TokenizeRequest, tokenize.DetokenizeRequest,
)  # fmt: skip
NATIVE: Final = (lightllm.NativeRequest, lightllm.NativeAnyRequest)
TGI: Final = (tgi.TgiNativeRequest, tgi.TgiNativeAnyRequest)


class _Plain(GenerateJsonSchema):
    """Without titles made of names, and without limits that are none."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False

    def str_schema(self, schema: StringSchema) -> JsonSchemaValue:
        return {key: value for key, value in super().str_schema(schema).items() if value != 0}


def of_models(models: Sequence[type[RequestModel]]) -> dict[str, Schema]:
    """The schemas of models, and of what they consist of, by name."""
    _, whole = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Plain,
    )
    made: dict[str, Schema] = whole["$defs"]
    return made


def _bodies(served: ServedModel) -> dict[str, Schema]:
    """Those of this server, with what is known of its model."""
    made = of_models([*BODIES, *(TGI if served.tgi else NATIVE)])
    made["Token"]["maximum"] = served.vocab_size - 1
    variables = made["ChatRequest"]["properties"]["chat_template_kwargs"]
    variables["propertyNames"] = {"enum": prepare.settable(served.dialect.variables)}
    more = sorted(served.dialect.roles.difference(messages.ROLES))
    made["OtherMessage"]["properties"]["role"] = messages.in_any_case(more) if more else {"not": {}}
    return made


# -- routes ------------------------------------------------------------------------------------


_TEXT_FAILS: Final = (400, 404, 408, 413, 429, 499, 503)
_BOTH: Final = ("get", "post")


@dataclass(frozen=True, slots=True)
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
    body: str = ""
    _: KW_ONLY
    answer: str = ""
    media: str = ""
    streams: bool = False
    methods: tuple[str, ...] = ("get",)
    fails: tuple[int, ...] = ()
    error: str = "Error"
    open: bool = False


_post: Final = partial(Route, methods=("post",), fails=_TEXT_FAILS)

ROUTES: Final = (
    _post("/v1/chat/completions", "OpenAI", "Answer a conversation", "ChatRequest",
          answer="ChatCompletion", streams=True),
    _post("/v1/completions", "OpenAI", "Continue texts", "CompletionRequest",
          answer="Completion", streams=True),
    _post("/v1/responses", "OpenAI", "Answer a conversation, and remember it",
          "ResponseRequest", answer="Response", streams=True),
    _post("/v1/responses/input_tokens", "OpenAI", "Length of its prompt", "PromptRequest",
          answer="ResponseTokens"),
    Route("/v1/responses/{id}", "OpenAI", "A stored response", answer="Response", fails=(404,)),
    Route("/v1/responses/{id}", "OpenAI", "Forget a stored response", answer="Deleted",
          methods=("delete",), fails=(404,)),
    Route("/v1/models", "OpenAI", "The model and its names", answer="Models"),
    Route("/v1/models/{id}", "OpenAI", "One of them", answer="Model", fails=(404,)),
    _post("/v1/messages", "Anthropic", "Answer a conversation", "MessageRequest",
          answer="Message", streams=True, error="AnthropicError"),
    _post("/v1/messages/count_tokens", "Anthropic", "Length of its prompt", "CountRequest",
          answer="InputTokens", error="AnthropicError"),
    _post("/generate", "LightLLM", "Continue a text", "NativeRequest", answer="Native"),
    _post("/generate_stream", "LightLLM", "Continue a text, token by token", "NativeRequest",
          streams=True),
    _post("/", "LightLLM", "One of the two, as stream says", "NativeAnyRequest",
          answer="Native", streams=True),
    _post("/tokens", "LightLLM", "Length of a text", "TokensRequest", answer="NumTokens",
          fails=(400, 408, 413, 429, 503)),
    _post("/tokenize", "OpenAI", "Token ids of a text or of a chat", "TokenizeRequest",
          answer="Tokenized"),
    _post("/detokenize", "OpenAI", "The text of token ids", "DetokenizeRequest",
          answer="Detokenized", fails=(400, 404, 408, 413)),
    Route("/version", "Operation", "This server's version", answer="Version"),
    Route("/ping", "Operation", "As /health", answer="Health", methods=_BOTH, fails=(503,),
          error="Health", open=True),
    _post("/abort_request", "LightLLM", "End requests early", "AbortRequest", answer="Success",
          fails=(400, 408, 413)),
    Route("/get_server_info", "LightLLM", "The server's options", answer="ServerInfo",
          methods=_BOTH),
    Route("/token_load", "LightLLM", "How full the server is", answer="TokenLoad", fails=(503,)),
    Route("/get_model_name", "LightLLM", "The model's name", answer="ModelName", methods=_BOTH),
    Route("/health", "Operation", "Serving and not draining", answer="Health", fails=(503,),
          error="Health", open=True),
    Route("/healthz", "Operation", "The same", answer="Health", fails=(503,), error="Health",
          open=True),
    Route("/readiness", "Operation", "The same", answer="Status", methods=_BOTH, fails=(503,),
          error="Status", open=True),
    Route("/liveness", "Operation", "The process answers", answer="Status", methods=_BOTH,
          open=True),
    Route("/metrics", "Operation", "Prometheus metrics", media="text/plain", fails=(503,)),
    Route("/openapi.json", "Operation", "This document", answer="Document"),
    Route("/docs", "Operation", "Swagger UI", media="text/html"),
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


def document(served: ServedModel, *, secured: bool) -> dict[str, object]:
    """The OpenAPI 3.1 document.

    Args:
        secured: API keys are asked for.
    """
    paths: dict[str, dict[str, object]] = {}
    for route in (_in_tgi(r) if served.tgi else r for r in ROUTES):
        for method in route.methods:
            paths.setdefault(route.path, {})[method] = _operation(route, method, secured)
    components: dict[str, object] = {"schemas": _bodies(served) | schemas.ANSWERS}
    whole: dict[str, object] = {
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
    return replace(route, body=f"Tgi{route.body}", answer=answer, error="TgiError")


def _operation(route: Route, method: str, secured: bool) -> dict[str, object]:
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
        operation["requestBody"] = {"required": True, "content": _json(route.body)}
    answers = _json(route.answer) if route.answer else {}
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
        told = {"description": REASONS[status], "content": _json(error)}
        operation["responses"][str(status)] = told
    if secured and route.open:
        operation["security"] = []
    return operation


def _json(schema: str) -> dict[str, Schema]:
    return {"application/json": {"schema": schemas.ref(schema)}}
