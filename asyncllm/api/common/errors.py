"""HTTP errors and their JSON: OpenAI's error object, for every route.

Knows statuses, types and codes; knows neither aiohttp nor who raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from asyncllm.errors import RequestError
from asyncllm.records import Failure

NO_FIELDS: Final[Mapping[str, str]] = MappingProxyType({})


class NotAvailable(RequestError):
    """A known field asks for something this server does not do."""

    code = "not_available"


class Unauthorized(RequestError):
    """No valid API key came with the request."""

    status = 401


class ForeignOrigin(RequestError):
    """A page of another site sends this, perhaps unknown to who looks at it."""

    status = 403
    code = "origin_not_allowed"


class UnknownPath(RequestError):
    status = 404
    code = "not_found"


class WrongMethod(RequestError):
    status = 405
    code = "method_not_allowed"


class BodyTooSlow(RequestError):
    status = 408
    code = "request_timeout"


class BodyTooLarge(RequestError):
    status = 413
    code = "request_too_large"


class UnknownEncoding(RequestError):
    status = 415
    code = "unsupported_encoding"


class Unexpected(RequestError):
    """The client waits for something that this server does not do."""

    status = 417
    code = "expectation_failed"


class HeaderTooLarge(RequestError):
    status = 431
    code = "header_too_large"


class Cancelled(RequestError):
    """Somebody asked for this request's end; not a status that clients try again after."""

    status = 499
    code = "aborted"


class ServerFault(RequestError):
    """The server failed this request; the client did nothing wrong."""

    status = 500
    type = "server_error"
    code = "internal_error"


class NotServing(RequestError):
    """The server is going down, or a part of it did not answer in time."""

    status = 503
    type = "server_error"
    code = "service_unavailable"


def from_failure(failure: Failure, fields: Mapping[str, str] = NO_FIELDS) -> RequestError:
    """The error of a request that failed behind the HTTP layer.

    A status outside 400..599 counts as 500; without a code it gets the status's usual one.
    ``fields``: see ``GenerationRequest``.
    """
    message, status = failure.detail, failure.status if failure.valid else 500
    error: RequestError = RequestError(message, code="invalid_value")
    if status == 429:
        error.type, error.code = "rate_limit_error", "rate_limit_exceeded"
    elif status >= 500:
        error = ServerFault(message) if status == 500 else NotServing(message)
    error.status, error.overflow = status, failure.overflow
    error.param = fields.get(failure.param, failure.param) or None
    if failure.code:
        error.code = failure.code
    return error


def body(error: RequestError) -> dict[str, object]:
    """The JSON answer: ``{"error": {message, type, param, code}}``."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }
