"""The frontend's state of one HTTP request: its choices, its futures, and the socket it writes to.

An Exchange belongs to the Frontend alone; the request's handler only awaits its futures. Knows
transports and event bytes; knows no protocol's JSON.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from asyncllm.api.common.answer import REASONS, Answer, Choice, Reply
from asyncllm.errors import RequestError
from asyncllm.records import AnsweredRequest


class ChunkedWriter:
    """A response body written straight to its transport: one HTTP/1.1 chunk per write.

    ``chunked`` is False for HTTP/1.0, where the end of the connection ends the body.
    """

    __slots__ = ("_chunked", "_transport")

    def __init__(self, transport: asyncio.Transport, chunked: bool) -> None:
        self._transport, self._chunked = transport, chunked

    @property
    def gone(self) -> bool:
        """Whether the client has disconnected."""
        return self._transport.is_closing()

    @property
    def unsent(self) -> int:
        """Bytes that the client has not received yet."""
        return self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        """Send a part of the body; not after ``gone``."""
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._transport.write(data)

    def abort(self) -> None:
        """Drop the connection and unsent data."""
        self._transport.abort()


class Exchange:
    """One generation request over HTTP, from admission to its last byte.

    Attributes:
        accepted: resolved when every prompt is accepted or the request has failed.
        done: resolved when the answer is complete (and, streamed, handed to the socket) or failed.
        error: why it failed, if it did.
        live: rids that have not ended.
        pending: event bytes not written yet.
        queued: in the frontend's list of streams to write.
        request_id: X-Request-Id.
        named: whether the client chose it.
        client: the client's number, see ``AccessControl.client``.
        rids: of all choices, in order.
        streams: the answer is streamed.
        cancelled: asked to end early.
        committed: headers of a stream are out or about to be: errors become events.
        ended: nothing more will be rendered.
        written_at: when the stream was last written to.
        watch: the timer that checks whether the stream is silent.
    """

    __slots__ = (
        "accepted",
        "answer",
        "begun_at",
        "cancelled",
        "client",
        "committed",
        "done",
        "ended",
        "error",
        "first_at",
        "last_at",
        "live",
        "named",
        "pending",
        "pipe",
        "queued",
        "reply",
        "request_id",
        "rids",
        "streams",
        "unaccepted",
        "watch",
        "written_at",
    )

    def __init__(
        self,
        answer: Answer,
        reply: Reply,
        request_id: str,
        client: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.answer, self.reply, self.request_id, self.client = answer, reply, request_id, client
        self.accepted: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.error: RequestError | None = None
        self.streams = answer.generation.stream
        self.rids = range(0)
        self.named = False
        self.live: dict[int, Choice] = {}
        self.unaccepted: set[int] = set()  # first rid of each prompt
        self.pending: list[bytes] = []
        self.pipe: ChunkedWriter | None = None
        self.committed = self.ended = self.queued = self.cancelled = False
        self.begun_at = monotonic()
        self.written_at = 0.0
        self.watch: asyncio.TimerHandle | None = None
        self.first_at = self.last_at = 0.0  # of the first and newest token; 0: none yet

    def answered(self, route: str, status: int) -> AnsweredRequest:
        """Statistics of this request, whose prompts were accepted and which has ended."""
        answer, first_at = self.answer, self.first_at
        usage = answer.usage()
        more = max(c.num_tokens for c in answer.choices) - 1
        reason = "abort" if status == 499 else "error"
        if status == 200 and self.error is None and answer.choices[0].reason is not None:
            reason = REASONS[answer.choices[0].reason]
        return AnsweredRequest(
            route=route,
            status=status,
            prompt_len=usage["prompt_tokens"],
            num_tokens=usage["completion_tokens"],
            reason=reason,
            ttft_s=first_at - self.begun_at if first_at else -1.0,
            tpot_s=(self.last_at - first_at) / more if more > 0 else -1.0,
            total_s=monotonic() - self.begun_at,
        )

    def end(self) -> None:
        """Mark the end: nothing more will be rendered; a stream is done once it is written."""
        self.ended = True
        resolve(self.accepted)
        if not self.streams or not self.committed:
            resolve(self.done)


def resolve(future: asyncio.Future[None]) -> None:
    """Complete a future that may be cancelled or completed already."""
    if not future.done():
        future.set_result(None)
