"""All exceptions that asyncllm raises on purpose, and the HTTP status of client errors.

AsyncllmError
├── RequestError            the client's fault: a 4xx answer to this request only
│   ├── PromptTooLong       400 context_length_exceeded
│   ├── ModelNotFound       404 model_not_found
│   └── ServerBusy          429 rate_limit_exceeded, with Retry-After
├── StartupError            bad flag, missing file, not enough memory: one line, exit code 2
│   └── Mismatch            processes that cannot belong to the same server
└── FatalError              this rank cannot continue: exit code 1
    ├── ActorCrashed        a vital actor raised
    ├── PeerLost            another rank died or stopped reading
    └── PlanOutOfOrder      a step plan went missing on its way to a follower
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncllm.records import Overflow


class AsyncllmError(Exception):
    """Base of all exceptions of asyncllm."""


class RequestError(AsyncllmError):
    """One request cannot be served as asked.

    Args:
        message: what is wrong, with the value, the limit and the flag that changes the limit.
        param: the request's field at fault, or None.
        code: OpenAI's string code, or None.
    """

    status = 400
    type = "invalid_request_error"
    code: str | None = None
    overflow: Overflow | None = None  # sizes, if the prompt is too long
    details: dict[str, object] | None = None  # machine-readable details in Anthropic's error object

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        if code is not None:
            self.code = code


class RequestFault(RequestError):
    """The server failed on one request; the client did nothing wrong."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self) -> None:
        super().__init__("the server failed on this request; see its log")


class PromptTooLong(RequestError):
    code = "context_length_exceeded"

    def __init__(self, message: str, overflow: Overflow, *, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.overflow = overflow


class ModelNotFound(RequestError):
    status = 404
    code = "model_not_found"


class ServerBusy(RequestError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


def reason_of(error: Exception) -> str:
    """Why it was raised, without the number and the file that the system's errors repeat."""
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


class StartupError(AsyncllmError):
    """The server cannot start as configured; the message is the whole explanation."""


class Mismatch(StartupError):
    """Two processes cannot belong to one server; both report it and exit."""


class FatalError(AsyncllmError):
    """This rank cannot continue."""


class ActorCrashed(FatalError):
    """A vital actor raised; the cause is chained."""


class PeerLost(FatalError):
    """Another rank died or stopped reading; continuing would lose a message."""


class PlanOutOfOrder(FatalError):
    """A follower received plan ``got`` after plan ``last``: one went missing."""

    def __init__(self, last: int, got: int) -> None:
        super().__init__(f"step plan {got} arrived after plan {last}")
