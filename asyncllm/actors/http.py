"""HTTP routes: hands requests to the frontend and writes its answers.

Knows paths, headers and statuses; what a body means is in :mod:`asyncllm.api`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiohttp import HttpVersion11, web

from asyncllm import __version__
from asyncllm.actors.access import AccessControl
from asyncllm.actors.connection import (
    ConnectionWatcher,
    Handler,
    HttpListeners,
    check_expectation,
)
from asyncllm.actors.exchange import ChunkedWriter, Exchange
from asyncllm.actors.request_body import read_body
from asyncllm.api.anthropic import models as anthropic_models
from asyncllm.api.anthropic import reply as anthropic_reply
from asyncllm.api.anthropic import request as anthropic
from asyncllm.api.anthropic.reply import MessageReply
from asyncllm.api.common import errors, json_body, sse, validation
from asyncllm.api.common.answer import Answer, Reply
from asyncllm.api.common.request import GenerationRequest, Prompt
from asyncllm.api.lightllm import request as lightllm
from asyncllm.api.lightllm.reply import NativeReply
from asyncllm.api.openai import request as openai
from asyncllm.api.openai import tokenize
from asyncllm.api.openai.chat_reply import chat_reply
from asyncllm.api.openai.completion_reply import CompletionReply
from asyncllm.api.openai.models import model, models
from asyncllm.api.openapi import document as openapi
from asyncllm.api.openapi import welcome
from asyncllm.api.responses import request as responses
from asyncllm.api.responses.reply import ResponseReply
from asyncllm.api.responses.store import ResponseStore
from asyncllm.api.tgi import reply as tgi_reply
from asyncllm.api.tgi import request as tgi
from asyncllm.api.tgi.reply import TgiReply
from asyncllm.core.metrics import REFUSED
from asyncllm.errors import RequestError, RequestFault
from asyncllm.plain import JsonObject
from asyncllm.records import Failure

if TYPE_CHECKING:
    from asyncllm.actors.frontend import Frontend

log = logging.getLogger(__name__)

REQUEST_ID: Final = web.RequestKey("request_id", str)
CLIENT: Final = web.RequestKey("client", int)
COUNTED: Final = web.RequestKey("counted", bool)  # already counted by its route
MAX_REQUEST_ID: Final = 128
CLIENT_GONE: Final = 499  # never sent; for the counters
NO_ROUTE: Final = "other"  # for the counters
BIG_BODY: Final = 64 << 10  # bytes; larger bodies are processed over several loop iterations
ANTHROPIC: Final = "/v1/messages"  # errors here have Anthropic's shape
NATIVE: Final = ("/", "/generate", "/generate_stream")
SWAGGER: Final = Path(__file__).parents[1] / "swagger"
DOC_FILES: Final = ("index.html", "start.js", "swagger-ui.css", "swagger-ui-bundle.js")
DOC_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
}
PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "Vary": "Accept",
}
PLAIN_HOST: Final = re.compile(r"[A-Za-z0-9._:\[\]-]+")  # safe in a shell command
STREAM_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}

# the request in a body, and the factory of its reply
Parsed = tuple[GenerationRequest, Callable[[Answer], Reply]]


class HttpRoutes:
    """The routes of one frontend."""

    def __init__(self, front: Frontend) -> None:
        self._front = front
        self._access = AccessControl(front.access)
        self._store = ResponseStore(front.others.owner_of)
        self._max_values = json_body.most_values(front.served.max_len)
        self._lookout = ConnectionWatcher()

    def listeners(self) -> HttpListeners:
        """What serves these routes on sockets."""
        limits = self._front.limits
        return HttpListeners(
            self.app(),
            self._guard,
            self._never_a_request,
            lookout=self._lookout,
            shutdown_s=limits.shutdown_s,
            keepalive_timeout=limits.idle_s,
            max_line_size=limits.max_header,
            max_field_size=limits.max_header,
            max_headers=limits.max_headers,
        )

    def app(self) -> web.Application:
        """Every path with its handler."""
        app = web.Application(middlewares=[self._admit])
        add = app.router
        for path, handler in {
            **dict.fromkeys(NATIVE, self._native),
            "/v1/completions": self._completion,
            "/v1/chat/completions": self._chat,
            "/v1/responses": self._respond,
            "/v1/responses/input_tokens": self._count_input,
            ANTHROPIC: self._messages,
            f"{ANTHROPIC}/count_tokens": self._count_tokens,
            "/invocations": self._invocations,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }.items():
            add.add_post(path, handler)
        for path, handler in {
            "/tokens": self._tokens,
            "/ping": self._health,
            "/get_model_name": self._model_name,
            "/get_server_info": self._server_info,
            "/liveness": self._liveness,
            "/readiness": self._readiness,
        }.items():
            add.add_get(path, handler)
            add.add_post(path, handler)
        for path, handler in {
            "/": self._welcome,
            "/health": self._health,
            "/healthz": self._health,
            "/token_load": self._token_load,
            "/version": self._version,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
            "/docs": self._docs,
            "/docs/{file}": self._docs,
            "/v1/models": self._models,
            "/v1/models/{name:.+}": self._model,
        }.items():
            add.add_get(path, handler)
        if self._front.place.cluster_port:
            add.add_get("/cluster", self._cluster)
            add.add_get("/pd_nodes", self._pd_nodes)
        add.add_post("/abort_request", self._abort_request)
        add.add_get("/v1/responses/{id}", self._response)
        add.add_delete("/v1/responses/{id}", self._delete_response)
        for route in list(add.routes()):  # clients append a slash to their base address
            path = "" if route.resource is None else route.resource.canonical
            if path not in ("/", "/docs", "/docs/{file}", "/v1/models/{name}"):
                add.add_route(route.method, f"{path}/", route.handler)
        return app

    # -- text ----------------------------------------------------------------------------------

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        def parse(body: validation.Body) -> Parsed:
            return openai.completion(body, self._front.served), CompletionReply

        return await self._generate(request, parse, "cmpl-")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        def parse(body: validation.Body) -> Parsed:
            return openai.chat(body, self._front.served), chat_reply

        return await self._generate(request, parse, "chatcmpl-")

    async def _invocations(self, request: web.Request) -> web.StreamResponse:
        """SageMaker's only path: a chat or a completion, depending on the body."""
        served = self._front.served

        def parse(body: validation.Body) -> Parsed:
            if body.get("messages") is not None:
                return openai.chat(body, served), chat_reply
            return openai.completion(body, served), CompletionReply

        return await self._generate(request, parse, "inv-")

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        def parse(body: validation.Body) -> Parsed:
            asked = responses.read(body, self._front.served, self._store)
            return asked.generation, lambda answer: ResponseReply(answer, asked, self._store)

        return await self._generate(request, parse, "resp_")

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        def parse(body: validation.Body) -> Parsed:
            return anthropic.messages(body, self._front.served), MessageReply

        return await self._generate(request, parse, "msg_")

    async def _native(self, request: web.Request) -> web.StreamResponse:
        """/generate, /generate_stream, and /, for which the body decides between them."""
        served, path = self._front.served, _path(request)

        def parse(body: validation.Body) -> Parsed:
            stream = lightllm.stream_flag(body) if path == "/" else path.endswith("_stream")
            if not served.tgi:
                return lightllm.generate(body, served, stream=stream), NativeReply
            asked = tgi.generate(body, served, stream=stream)
            return asked.generation, lambda answer: TgiReply(answer, asked, listed=path == "/")

        return await self._generate(request, parse, "gen-")

    async def _generate(
        self, request: web.Request, parse: Callable[[validation.Body], Parsed], prefix: str
    ) -> web.StreamResponse:
        """Handles all generation requests: admit, wait, answer; cleans up however it ends."""
        front, exchange, status = self._front, None, CLIENT_GONE
        request[COUNTED] = True
        try:
            generation, reply = parse(await self._body(request))
            name = prefix + front.place.mark + secrets.token_hex(12)
            exchange = front.submit(
                generation,
                name,
                reply,
                request[REQUEST_ID],
                request[CLIENT],
                named="X-Request-Id" in request.headers,
            )
            self._lookout.add(request)
            await exchange.accepted
            if exchange.error is None and exchange.streams:
                response = await self._stream(request, exchange)
                status = 200 if exchange.error is None else exchange.error.status
                return response
            await exchange.done
            if exchange.error is not None:
                raise exchange.error
            whole = exchange.reply.whole
            body = await asyncio.to_thread(whole) if exchange.answer.is_long else whole()
            exchange.reply.keep()
            status = 200
            response = _json(body)
            _say_omitted(response, generation)
            return response
        except RequestError as error:
            status = error.status
            raise
        except ConnectionError:  # the client left: CLIENT_GONE
            raise
        except Exception:
            status = 500
            raise
        finally:
            self._lookout.remove(request)
            if exchange is None:
                front.count(_route(request), status, REFUSED)
            else:
                front.close(exchange, _route(request), status)
            _log_end(request, status, exchange)

    async def _stream(self, request: web.Request, exchange: Exchange) -> web.StreamResponse:
        """Send headers, let the frontend write, and wait for the end."""
        exchange.committed = True
        response = web.StreamResponse(headers=STREAM_HEADERS)
        chunked = request.version >= HttpVersion11
        if not chunked:  # only the connection's end tells such a client that the body is over
            response.force_close()
            response.headers["Connection"] = "close"
        _say_omitted(response, exchange.answer.generation)
        self._mark(request, response)
        writer = await response.prepare(request)
        transport = request.transport
        if writer is None or transport is None:
            raise ConnectionResetError("the client left before the headers")
        with suppress(ConnectionError):  # it left; aiohttp sees that too
            writer.send_headers()
            self._front.stream(exchange, ChunkedWriter(transport, chunked))
            await exchange.done
            await response.write_eof()
        return response

    # -- the rest ------------------------------------------------------------------------------

    async def _tokens(self, request: web.Request) -> web.StreamResponse:
        text, add_special_tokens = lightllm.tokens(await self._body(request))
        ids = await self._front.token_ids(
            Prompt(text=text),
            "text",
            add_special_tokens=add_special_tokens,
            client=request[CLIENT],
        )
        return _json(sse.body({"ntokens": len(ids)}))

    async def _tokenize(self, request: web.Request) -> web.StreamResponse:
        served = self._front.served
        asked = tokenize.tokenize(await self._body(request), served)
        ids = await self._front.token_ids(
            asked.prompt,
            "prompt" if asked.prompt.chat is None else "messages",
            add_special_tokens=asked.add_special_tokens,
            client=request[CLIENT],
        )

        def answer() -> bytes:
            texts = self._front.vocab.spell(ids) if asked.with_texts else None
            return sse.body(tokenize.tokenized(ids, texts, served))

        return _json(await asyncio.to_thread(answer))

    async def _detokenize(self, request: web.Request) -> web.StreamResponse:
        ids = tokenize.detokenize(await self._body(request), self._front.served)
        return _json(sse.body({"prompt": await asyncio.to_thread(self._front.vocab.decode, ids)}))

    async def _version(self, request: web.Request) -> web.StreamResponse:
        return _json(sse.body({"version": __version__}))

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        chat = anthropic.count(await self._body(request), self._front.served)
        ids = await self._front.token_ids(Prompt(chat=chat), "messages", client=request[CLIENT])
        return _json(sse.body({"input_tokens": len(ids)}))

    async def _count_input(self, request: web.Request) -> web.StreamResponse:
        chat = responses.count(await self._body(request), self._front.served, self._store)
        ids = await self._front.token_ids(Prompt(chat=chat), "input", client=request[CLIENT])
        return _json(sse.body({"object": "response.input_tokens", "input_tokens": len(ids)}))

    async def _response(self, request: web.Request) -> web.StreamResponse:
        return _json(self._store.body(request.match_info["id"]))

    async def _delete_response(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info["id"]
        self._store.delete(key)
        return _json(sse.body({"id": key, "object": "response", "deleted": True}))

    async def _model_name(self, request: web.Request) -> web.StreamResponse:
        served = self._front.served
        return _json(sse.body({"model_name": served.model_name or served.name}))

    async def _server_info(self, request: web.Request) -> web.StreamResponse:
        return _json(sse.body(self._front.info))

    async def _abort_request(self, request: web.Request) -> web.StreamResponse:
        self._front.cancel(lightllm.abort(await self._body(request)))
        return _json(b'{"success":true}')

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if _is_anthropics(request):
            return _json(sse.body(anthropic_models.models(self._front.served)))
        return _json(models(self._front.served))

    async def _model(self, request: web.Request) -> web.StreamResponse:
        own = anthropic_models.model if _is_anthropics(request) else model
        name = request.match_info["name"]
        return _json(sse.body(own(self._front.served, name.rstrip("/") or name)))

    async def _welcome(self, request: web.Request) -> web.StreamResponse:
        """The start page: HTML for browsers, plain text for terminals, JSON on request."""
        served, secured = self._front.served, bool(self._front.access.keys)
        accepted = request.headers.get("Accept", "")
        if "text/html" not in accepted and "application/json" in accepted:
            return _json(sse.body(welcome.facts(served)))
        host = request.headers.get("Host", "")
        host = host if PLAIN_HOST.fullmatch(host) else "HOST"
        url = f"{'http' if self._front.access.tls is None else 'https'}://{host}"
        if "text/html" in accepted:
            page = welcome.page(served, url, secured=secured)
            return web.Response(text=page, content_type="text/html", headers=PAGE_HEADERS)
        return web.Response(text=welcome.plain(served, url, secured=secured))

    async def _liveness(self, request: web.Request) -> web.StreamResponse:
        return _json(b'{"status":"ok"}')

    async def _readiness(self, request: web.Request) -> web.StreamResponse:
        return self._health_answer("status", "ok", "not ready", self._front.ready)

    async def _health(self, request: web.Request) -> web.StreamResponse:
        front = self._front
        return self._health_answer("message", "Ok", "Error", front.serving and not front.draining)

    def _health_answer(self, name: str, good: str, bad: str, ok: bool) -> web.Response:
        """The health status, with the lost groups, if any."""
        body: JsonObject = {name: good if ok else bad}
        if lost := self._front.lost_groups:
            body["lost_groups"] = [*sorted(lost)]
        return _json(sse.body(body), 200 if ok else 503)

    async def _cluster(self, request: web.Request) -> web.StreamResponse:
        """Where nodes connect. Needs no key: connecting requires the cluster's secret."""
        return _json(sse.body({"port": self._front.place.cluster_port}))

    async def _pd_nodes(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._front.nodes())

    async def _token_load(self, request: web.Request) -> web.StreamResponse:
        """As LightLLM: numbers, or lists with one number per group."""
        loads = (await self._front.scrape()).loads
        used = [load.used / max(load.total, 1) for load in loads]
        expected = [load.expected / max(load.total, 1) for load in loads]
        shares = {
            "current_load": used,
            "logical_max_load": expected,
            "dynamic_max_load": expected,
        }
        if any(load.sliding_total for load in loads):
            shares["sliding_load"] = [
                load.sliding_used / max(load.sliding_total, 1) for load in loads
            ]
            # the fuller space limits further requests
            shares["current_load"] = list(map(max, used, shares["sliding_load"]))
        if len(loads) == 1:
            return _json(sse.body({name: share[0] for name, share in shares.items()}))
        return _json(sse.body(shares))

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        state = await self._front.scrape()
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=state.exposition, headers=headers)

    async def _openapi(self, request: web.Request) -> web.StreamResponse:
        secured = bool(self._front.access.keys)
        return _json(sse.body(openapi.document(self._front.served, secured=secured)))

    async def _docs(self, request: web.Request) -> web.StreamResponse:
        """Swagger UI from the package's own files."""
        file = request.match_info.get("file", "index.html")
        if file not in DOC_FILES:
            raise errors.UnknownPath(f"there is nothing at {request.path}")
        return web.FileResponse(SWAGGER / file, headers=DOC_HEADERS)

    # -- around every request ------------------------------------------------------------------

    async def _guard(self, route: Handler, request: web.Request) -> web.StreamResponse:
        """Every failure becomes an error object."""
        request[REQUEST_ID] = _request_id(request)
        response = await self._front.timed(self._guarded(route, request))
        if not response.prepared:
            self._mark(request, response)
        return response

    async def _guarded(self, route: Handler, request: web.Request) -> web.StreamResponse:
        try:
            check_expectation(request)
        except RequestError as error:
            request[COUNTED] = True
            self._front.count(NO_ROUTE, error.status)
            return self._error(request, error)
        try:
            return await route(request)
        except RequestError as error:
            return self._error(request, error)
        except web.HTTPNotFound:
            return self._error(request, errors.UnknownPath(f"there is nothing at {request.path}"))
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            message = f"{request.path} takes {allowed}, not {request.method}"
            response = self._error(request, errors.WrongMethod(message))
            response.headers["Allow"] = allowed
            return response
        except web.HTTPException as error:
            return self._error(
                request, errors.from_failure(Failure(error.reason, status=error.status))
            )
        except ConnectionError:
            raise  # the client left
        except Exception:
            log.exception(
                "request %s: %s %s failed", request[REQUEST_ID], request.method, request.path
            )
            return self._error(request, RequestFault())

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check keys and origins, once the route is known."""
        if (answer := self._access.preflight(request)) is not None:
            return answer
        self._access.check_origin(request)
        self._access.check(request)
        request[CLIENT] = self._access.client(request)
        return await handler(request)

    def _mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers that every answer has."""
        response.headers["X-Request-Id"] = request[REQUEST_ID]
        if _is_anthropics(request):
            response.headers["request-id"] = request[REQUEST_ID]
        if not request.get(COUNTED):
            self._front.count(_route(request), response.status)
        self._access.mark(request, response)
        if self._front.draining:
            _close_after(response)

    async def _body(self, request: web.Request) -> dict[str, Any]:
        """The JSON object sent. Raises RequestError, ConnectionError."""
        limits = self._front.limits
        raw = await read_body(request, limits.max_body, limits.body_s)
        body = json_body.load(raw, self._max_values)
        if len(raw) > BIG_BODY:
            await asyncio.sleep(0)  # parsing the request gets its own loop iteration
        return body

    def _error(self, request: web.Request, error: RequestError) -> web.Response:
        told = errors.body(error)
        if _is_anthropics(request):
            told = anthropic_reply.error_body(error)
        elif self._front.served.tgi and _path(request) in NATIVE:
            told = tgi_reply.error_body(error)
        response = _json(sse.body(told), error.status)
        if error.status in (429, 503):
            response.headers["Retry-After"] = str(self._front.retry_after_s())
        if error.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if error.status in (408, 413, 415, 417):  # the rest of the body may still arrive
            _close_after(response)
        return response

    def _never_a_request(self, error: RequestError) -> web.Response:
        """The answer to bytes that are not HTTP."""
        self._front.count(NO_ROUTE, error.status)
        response = _json(sse.body(errors.body(error)), error.status)
        response.headers["X-Request-Id"] = secrets.token_hex(16)
        return response


def _route(request: web.Request) -> str:
    """The path as registered: paths invented by clients must not become labels."""
    resource = request.match_info.route.resource
    return NO_ROUTE if resource is None else resource.canonical.rstrip("/") or "/"


def _path(request: web.Request) -> str:
    """The path without a trailing slash."""
    return request.path.rstrip("/") or "/"


def _is_anthropics(request: web.Request) -> bool:
    """Whether the client speaks Anthropic's protocol, which shares a route with OpenAI's."""
    models = request.path.startswith("/v1/models") and "anthropic-version" in request.headers
    return models or request.path.startswith(ANTHROPIC)


def _json(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def _say_omitted(response: web.StreamResponse, generation: GenerationRequest) -> None:
    """Name in a header the tools of the request that the model is not offered."""
    if generation.omitted_tools:
        response.headers["X-Omitted-Tools"] = ", ".join(generation.omitted_tools)


def _close_after(response: web.StreamResponse) -> None:
    """Close the connection after this response."""
    response.force_close()
    response.headers["Connection"] = "close"


def _log_end(request: web.Request, status: int, exchange: Exchange | None) -> None:
    """Log a line for requests with a client's id or an error; others at debug level."""
    level = logging.INFO if "X-Request-Id" in request.headers or status >= 500 else logging.DEBUG
    name = "refused" if exchange is None else exchange.answer.id
    log.log(level, "request %s: %s %d %s", request[REQUEST_ID], request.path, status, name)


def _request_id(request: web.Request) -> str:
    """The client's X-Request-Id if it is short and printable, or a new one."""
    given = request.headers.get("X-Request-Id", "")
    if 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable():
        return given
    return secrets.token_hex(16)
