"""Every exception that asyncllm raises on purpose, and the HTTP status of those a client causes.

AsyncllmError
├── RequestError            the client's fault: one 4xx answer, nobody else notices
│   ├── PromptTooLong       400 context_length_exceeded
│   ├── ModelNotFound       404 model_not_found
│   └── ServerBusy          429 rate_limit_exceeded, with Retry-After
├── StartupError            bad flag, missing file, memory that does not fit: one line, exit 2
│   └── Mismatch            processes that cannot belong to one server
└── FatalError              this rank cannot go on: exit 1
    ├── ActorCrashed        a vital actor raised
    ├── PeerLost            another rank stopped reading or died
    └── PlanOutOfOrder      a step plan went missing on its way to a follower
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncllm.records import Overflow


class AsyncllmError(Exception):
    """Root of the tree."""


class RequestError(AsyncllmError):
    """One request cannot be served as asked.

    Args:
        message: what is wrong, with the value, the limit and the flag that changes the limit.
        param: the request field at fault, or None.
        code: OpenAI's string code, or None.
    """

    status = 400
    type = "invalid_request_error"
    code: str | None = None
    overflow: Overflow | None = None  # of a prompt that is too long
    details: dict[str, object] | None = None  # for programs, of Anthropic's error object

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param
        if code is not None:
            self.code = code


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


class StartupError(AsyncllmError):
    """The server cannot start as configured; the message is the whole explanation."""


class Mismatch(StartupError):
    """Two processes cannot belong to one server; each of them says so and ends."""


class FatalError(AsyncllmError):
    """This rank cannot go on."""


class ActorCrashed(FatalError):
    """A vital actor raised; the cause is chained."""


class PeerLost(FatalError):
    """Another rank stopped reading or died; continuing would lose a message."""


class PlanOutOfOrder(FatalError):
    """A follower received plan ``got`` after plan ``last``: one went missing."""

    def __init__(self, last: int, got: int) -> None:
        super().__init__(f"step plan {got} arrived after plan {last}")
