"""The frontend's state of one HTTP request: its choices, its futures, and the socket it writes to.

An Exchange belongs to the Frontend alone; the request's handler only awaits its futures. Knows
transports and event bytes; knows no protocol's JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic

from asyncllm.api.common import sse
from asyncllm.api.common.answer import REASONS, Answer, Choice, Reply
from asyncllm.errors import RequestError
from asyncllm.messages import Accepted, Finished, TextDelta, Tokenize
from asyncllm.records import AnsweredRequest

News = Accepted | TextDelta | Finished


class ChunkedWriter:
    """A response body written straight to its transport: one HTTP/1.1 chunk per write.

    ``chunked`` is False for HTTP/1.0, where the end of the connection ends the body.
    """

    __slots__ = ("_chunked", "_largest", "_transport")

    def __init__(self, transport: asyncio.Transport, chunked: bool) -> None:
        self._transport, self._chunked, self._largest = transport, chunked, 0

    @property
    def gone(self) -> bool:
        """Whether the client has disconnected."""
        return self._transport.is_closing()

    @property
    def unsent(self) -> int:
        """Bytes that the client has not received yet."""
        return self._transport.get_write_buffer_size()

    @property
    def behind(self) -> int:
        """The same beyond the largest write, which itself may take a while on a slow line."""
        return self.unsent - self._largest

    def write(self, data: bytes) -> None:
        """Send a part of the body; not after ``gone``."""
        self._largest = max(self._largest, len(data))
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._transport.write(data)

    def abort(self) -> None:
        """Drop the connection and unsent data."""
        self._transport.abort()


class Exchange:
    """One generation request over HTTP, from admission to its last byte.

    Attributes:
        aside: a thread renders its next events.
        tells_prompt: its stream begins with something of each token of a long prompt.
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
        "aside",
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
        "tells_prompt",
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
        self.aside = self.tells_prompt = False
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

    def tokenize(self, prompt_idx: int) -> Tokenize:
        """The message for one prompt, with the rids of its choices."""
        generation = self.answer.generation
        prompt, n = generation.prompts[prompt_idx], generation.n
        options = generation.output_options
        return Tokenize(
            rids=tuple(self.rids[prompt_idx * n : (prompt_idx + 1) * n]),
            text=prompt.text,
            ids=prompt.ids,
            chat=prompt.chat,
            add_special_tokens=generation.add_special_tokens,
            params=generation.params,
            shown=() if options is None else options.shown,
            reasoning="" if options is None else options.reasoning,
            continued="" if options is None else options.continued,
            truncate=generation.truncate,
            usual_max=generation.usual_max,
            prediction=generation.prediction or "",
            client=self.client,
            request_id=self.request_id if self.named else "",
        )

    def with_held(self, work: Callable[[], bytes]) -> bytes:
        """The events of ``work``, and those of what the reply holds back after it."""
        return work() + self.reply.flush_held()

    def end(self) -> None:
        """Mark the end: nothing more will be rendered; a stream is done once it is written."""
        self.ended = True
        resolve(self.accepted)
        if not self.streams or not self.committed:
            resolve(self.done)


class ExchangesAside:
    """Exchanges of which a thread renders the next events: what arrives for them waits meanwhile.

    Args:
        by_rid: where the frontend looks for requests; those of such an exchange are not in it.
    """

    def __init__(self, by_rid: dict[int, tuple[Exchange, Choice]]) -> None:
        self._by_rid = by_rid
        self._late: dict[int, tuple[Exchange, list[News]]] = {}

    def begin(self, exchange: Exchange) -> None:
        """From now on its messages wait."""
        late: list[News] = []
        exchange.aside = True
        for rid in exchange.live:
            self._late[rid] = exchange, late
            del self._by_rid[rid]

    def keep(self, rid: int, news: News) -> None:
        """News of a request that the frontend does not find: it may have been aborted, too."""
        if rid in self._late:
            self._late[rid][1].append(news)

    def end(self, rid: int) -> tuple[Exchange, list[News]] | None:
        """The exchange of that request, which the frontend finds again, and what has arrived in
        the meantime; None: it has been aborted."""
        if (found := self._late.get(rid)) is None:
            return None
        exchange, _ = found
        exchange.aside = False
        for each, choice in exchange.live.items():
            del self._late[each]
            self._by_rid[each] = exchange, choice
        return found

    def forget(self, rid: int) -> None:
        """A request has been aborted."""
        self._late.pop(rid, None)


def watch_silence(exchange: Exchange, loop: asyncio.AbstractEventLoop, most_s: float) -> None:
    """From now on, write a comment whenever the stream has been silent for that long."""
    pipe = exchange.pipe
    if pipe is None or pipe.gone or exchange.ended:
        return
    rest = exchange.written_at + most_s - monotonic()
    if rest <= 0:
        if not pipe.unsent:  # unsent data keeps the connection busy
            pipe.write(sse.KEEP_ALIVE)
        exchange.written_at = monotonic()
        rest = most_s
    exchange.watch = loop.call_later(rest, watch_silence, exchange, loop, most_s)


def resolve(future: asyncio.Future[None]) -> None:
    """Complete a future that may be cancelled or completed already."""
    if not future.done():
        future.set_result(None)
