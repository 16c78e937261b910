"""Frontend: owns every HTTP request from admission to the last byte.

Knows rids, admission, deltas and sockets; routes are in :mod:`asyncllm.actors.http`, protocols in
:mod:`asyncllm.api`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from socket import socket
from time import monotonic, perf_counter, time
from typing import assert_never

from asyncllm import __version__
from asyncllm.actors.access import Access
from asyncllm.actors.base import Actor, MailboxFull
from asyncllm.actors.connection import HttpListeners
from asyncllm.actors.exchange import (
    ChunkedWriter,
    Exchange,
    ExchangesAside,
    resolve,
    watch_silence,
)
from asyncllm.actors.frontend_settings import ClusterSettings, FrontendLimits, KnownMasters
from asyncllm.actors.http import HttpRoutes
from asyncllm.actors.queries import Queries
from asyncllm.api.common.answer import Answer, Choice, Reply, Vocab
from asyncllm.api.common.errors import Cancelled, NotServing, from_failure
from asyncllm.api.common.request import GenerationRequest, Prompt, ServedModel
from asyncllm.api.common.validation import MAX_SEED
from asyncllm.core.admission import Admission
from asyncllm.core.metrics import REFUSED
from asyncllm.core.request import FinishReason
from asyncllm.errors import RequestError, RequestFault, ServerBusy
from asyncllm.messages import (
    FRONTEND_SHIFT,
    Abort,
    Accepted,
    AskMasters,
    AskNodes,
    AskServing,
    Cancel,
    CountTokens,
    Drain,
    Drained,
    EventsRendered,
    Finished,
    GroupRemoved,
    MasterList,
    NodesAnswer,
    RequestServed,
    Scrape,
    Scraped,
    Serving,
    Started,
    TextDelta,
    TokensCounted,
    TokenTexts,
)
from asyncllm.records import AnsweredRequest

log = logging.getLogger(__name__)

Reported = TokensCounted | Scraped | NodesAnswer  # answers to this actor's queries
Changes = EventsRendered | Started | Drain | Cancel | Serving | MasterList | GroupRemoved
Inbox = Accepted | TextDelta | TokenTexts | Finished | Reported | Changes

LOOK_EVERY = 4  # streams written between two checks of the clock


class Frontend(Actor[Inbox]):
    """HTTP in and out of one endpoint.

    Args:
        served: model names and limits.
        vocab: texts of token ids.
        sockets: bound sockets; listening starts when ``Started`` arrives.
        limits: see :class:`FrontendLimits`.
        access: see :class:`Access`.
        info: the server's options, for /get_server_info.
        place: see :class:`ClusterSettings`.
        on_open: called once the sockets are served, so that a ready line is true when it is read.
    """

    # a step may bring two messages for each live request, and several steps may wait
    capacity = 65536
    orders = frozenset(
        {MasterList, Started, Drain, Scraped, Cancel, Serving, NodesAnswer, GroupRemoved}
    )

    def __init__(
        self,
        *,
        served: ServedModel,
        vocab: Vocab,
        sockets: Sequence[socket],
        limits: FrontendLimits | None = None,
        access: Access | None = None,
        info: Mapping[str, object] | None = None,
        place: ClusterSettings | None = None,
        on_open: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("frontend")
        self.served, self.limits = served, limits or FrontendLimits()
        self.access = access or Access()
        self.info, self.place = info or {}, place or ClusterSettings()
        self.serving = self.draining = False
        self.lacks = "it has just started" if self.place.asks else ""  # why nothing can be served
        self.lost_groups: list[int] = []
        self.others = KnownMasters(self.place)
        self.vocab, self._sockets, self._on_open = vocab, sockets, on_open
        self._counter = 0
        self._exchanges: set[Exchange] = set()
        self._by_rid: dict[int, tuple[Exchange, Choice]] = {}
        self._aside = ExchangesAside(self._by_rid)
        self._dirty: deque[Exchange] = deque()  # with something to write
        self._flush_waits = False
        self._queries: Queries[Reported] = Queries(self.limits.query_s)
        self._admission = Admission(
            max_running=self.limits.max_running, max_waiting=self.limits.max_waiting
        )
        self._to_tell: list[AnsweredRequest] = []  # not reported yet
        self._listeners: HttpListeners | None = None

    def started(self) -> None:
        """Refs of the actors that this one sends to."""
        self._tokenizer = self.system.ref("tokenizer")
        self._watchdog = self.system.at_coordinator("watchdog")
        self._place = self.system.at_coordinator(self.place.asks)
        self._config_client = self.system.at_coordinator("config_client")
        for group in self.system.topology.lost:
            self._lose(group)

    def receive(self, batch: list[Inbox]) -> None:
        """Render everything first, then write once per stream."""
        for msg in batch:
            match msg:
                case TokenTexts():
                    self._take_tokens(msg)
                case TextDelta() | Finished() | Accepted():
                    self._of_request(msg)
                case EventsRendered():
                    self._rendered(msg)
                case TokensCounted() | Scraped() | NodesAnswer():
                    self._queries.answered(msg.query, msg)
                case MasterList(masters, away):
                    self.others.masters, self.others.away = masters, away
                case Serving(lacks):
                    self.lacks = lacks
                case Started():
                    if self.place.asks:
                        self._place.tell(AskServing(self.system.endpoint))
                    if self.place.has_config_server:
                        self._config_client.tell(AskMasters(self.system.endpoint))
                    self.spawn(self._serve())
                case Cancel():
                    self._cancel(msg.request_id)
                case GroupRemoved(group):
                    self._lose(group)
                case Drain():
                    self.draining = True
                    self._say_drained()
                case _:
                    assert_never(msg)
        if not self._flush_waits:
            self._flush()

    async def closing(self) -> None:
        """Fail what is left, then let aiohttp close the connections."""
        await self._end(NotServing("the server is shutting down", code="shutting_down"))

    async def failing(self) -> None:
        """The same after a failure, so that streams end with an error."""
        await self._end(NotServing("the server has failed and ends", code="server_failed"))

    async def _end(self, error: RequestError) -> None:
        self.draining = True
        for exchange in list(self._exchanges):
            self._fail(exchange, error)
        while self._dirty:
            self._write(self._dirty.popleft())
        self._queries.cancel()
        if self._listeners is not None:
            await self._listeners.close()

    def stopped(self) -> None:
        """Close the listening sockets; connections are closed with the loop."""
        for sock in self._sockets:
            sock.close()

    def holds(self) -> str:
        text = f"{len(self._exchanges)} requests, {len(self._by_rid)} choices"
        return text + ", drains" * self.draining

    # -- called by the routes ----------------------------------------------------------------

    def submit(
        self,
        generation: GenerationRequest,
        name: str,
        reply: Callable[[Answer], Reply],
        request_id: str,
        client: int = 0,
        *,
        named: bool = False,
    ) -> Exchange:
        """Admit a request and send its prompts to the tokenizer.

        Args:
            name: the answer's id.
            request_id: the client's X-Request-Id, or a generated one.
            client: the client's number, for fairness among waiting requests.
            named: whether the client chose ``request_id``.

        Raises:
            RequestError: 400, more choices than can ever wait. ServerBusy: 429, too much is going
                on. NotServing: 503, the server drains.
        """
        if self.draining:
            raise NotServing("the server is shutting down", code="shutting_down")
        if self.place.elsewhere:
            raise RequestError(self.others.who_serves(), code="wrong_server")
        if self.lacks:
            raise NotServing(f"no request can be served: {self.lacks}", code="no_nodes")
        self._admission.enter(client, generation.n * len(generation.prompts))
        if not generation.seeded:
            params = replace(generation.params, seed=secrets.randbelow(MAX_SEED + 1))
            generation = replace(generation, params=params)
        n, num_prompts = generation.n, len(generation.prompts)
        wants = generation.params.logprobs, generation.params.prompt_logprobs
        choices = [
            Choice(index=i, prompt_idx=i // n, wants=wants, keeps_ids=generation.token_ids)
            for i in range(n * num_prompts)
        ]
        answer = Answer(
            generation=generation,
            id=name,
            created=int(time()),
            model=self.served.name,
            fingerprint=f"asyncllm-{__version__}" if self.served.tgi else "",
            vocab=self.vocab,
            choices=choices,
            prompts=[array("i") for _ in generation.prompts],
        )
        exchange = Exchange(answer, reply(answer), request_id, client, self.system.loop)
        exchange.named = named
        self._exchanges.add(exchange)
        self._give_rids(exchange)
        try:
            for i in range(num_prompts):
                self._tokenizer.tell(exchange.tokenize(i))
        except MailboxFull:
            self._forget(exchange)
            raise ServerBusy("the tokenizer is behind; try again later") from None
        return exchange

    def stream(self, exchange: Exchange, pipe: ChunkedWriter) -> None:
        """The headers have been sent: write pending events, and all later ones."""
        exchange.pipe = pipe
        exchange.written_at = monotonic()
        self._write(exchange)
        speaks = not exchange.answer.generation.native or self.limits.native_keep_alive
        if self.limits.keep_alive_s and speaks:
            watch_silence(exchange, self.system.loop, self.limits.keep_alive_s)

    def close(self, exchange: Exchange, route: str, status: int) -> None:
        """The handler has ended, for whatever reason: abort unfinished choices, and count."""
        self._forget(exchange)
        if exchange.unaccepted:
            self.count(route, status, REFUSED)
        else:
            self._tell_answered(exchange.answered(route, status))
        self._say_drained()

    def count(self, route: str, status: int, reason: str = "") -> None:
        """Report an answer without generation; ``reason``: see ``AnsweredRequest``."""
        self._tell_answered(AnsweredRequest(route, status, 0, 0, reason, -1.0, -1.0, 0.0))

    def _tell_answered(self, answered: AnsweredRequest) -> None:
        """Batched with other answers of this loop iteration, so that no flood fills the mailbox."""
        if not self._to_tell:
            self.system.loop.call_soon(self._flush_answered)
        self._to_tell.append(answered)

    def _flush_answered(self) -> None:
        answers, self._to_tell = self._to_tell, []
        if not self.system.over:
            self._watchdog.tell(RequestServed(tuple(answers)))

    def retry_after_s(self) -> int:
        """When a refused client may retry: once the currently waiting requests have been served."""
        return self._admission.retry_after_s()

    async def token_ids(
        self, prompt: Prompt, field: str, *, add_special_tokens: bool = False, client: int = 0
    ) -> array[int]:
        """Tokens of a text, or of a chat's prompt, which ``field`` of the body holds.

        Raises:
            RequestError: 400, it is too long, or the template refuses the chat. ServerBusy: 429.
            NotServing: 503.
        """
        query = self._queries.new()
        try:
            text, chat = prompt.text or "", prompt.chat
            self._tokenizer.tell(
                CountTokens(query, text, add_special_tokens, chat=chat, client=client)
            )
        except MailboxFull:
            self._queries.forget(query)
            raise ServerBusy("the tokenizer is behind; try again later") from None
        counted = await self._queries.answer_to(query, "the tokenizer")
        assert isinstance(counted, TokensCounted), counted
        if counted.failure is not None:
            raise from_failure(counted.failure, {"prompt": field, "messages": field})
        return counted.ids

    def cancel(self, request_id: str) -> None:
        """Abort requests by the client's id or the answer's; "": all of them. On every frontend,
        and on all masters if there are several. Raises NotServing (503): these are unreachable."""
        self._watchdog.tell(Cancel(request_id))
        if self.place.mark:
            self._config_client.tell(Cancel(request_id))
            self.others.check_told()

    async def scrape(self) -> Scraped:
        """State of the whole server. Raises NotServing (503) on timeout."""
        query = self._queries.new()
        self._watchdog.tell(Scrape(query, self.system.endpoint))
        answer = await self._queries.answer_to(query, "the watchdog")
        assert isinstance(answer, Scraped), answer
        return answer

    async def nodes(self) -> bytes:
        """A master's nodes, as JSON. Raises NotServing (503) on timeout."""
        query = self._queries.new()
        self._place.tell(AskNodes(query, self.system.endpoint))
        answer = await self._queries.answer_to(query, "the director")
        assert isinstance(answer, NodesAnswer), answer
        return answer.body

    @property
    def ready(self) -> bool:
        """Whether a request arriving now would be served."""
        return self.serving and not self.draining and not self.lacks

    # -- inside ------------------------------------------------------------------------------

    def _lose(self, group: int) -> None:
        """Reduce the number of running requests after a group is lost."""
        if group not in self.lost_groups:
            self.lost_groups.append(group)
        topology = self.system.topology
        every = len({*topology.groups, *topology.lost})
        left = every - len(self.lost_groups)
        self._admission.max_running = self.limits.max_running * left // every

    def _give_rids(self, exchange: Exchange) -> None:
        """Parameters of each choice, in order."""
        choices = exchange.answer.choices
        first = (self.system.endpoint << FRONTEND_SHIFT) + self._counter
        self._counter += len(choices)
        exchange.rids = range(first, first + len(choices))
        exchange.live = dict(zip(exchange.rids, choices, strict=True))
        exchange.unaccepted = set(exchange.rids[:: exchange.answer.generation.n])
        for rid, choice in exchange.live.items():
            self._by_rid[rid] = (exchange, choice)

    def _of_request(self, msg: Accepted | TextDelta | Finished) -> None:
        """Take in what concerns one request; a fault in its answer costs no other one."""
        if (found := self._by_rid.get(msg.rid)) is None:
            self._aside.keep(msg.rid, msg)  # or aborted, and who sent it did not know yet
            return
        try:
            match msg:
                case Accepted():
                    self._accepted(*found, msg)
                case TextDelta():
                    self._delta(*found, msg)
                case Finished():
                    self._finished(*found, msg)
        except Exception:
            self._broken(found[0])

    def _broken(self, exchange: Exchange) -> None:
        """End a request whose answer could not be rendered; call where that is caught."""
        log.exception("request %s: rendering its answer failed", exchange.answer.id)
        self._fail(exchange, RequestFault(), broken=True)

    def _accepted(self, exchange: Exchange, choice: Choice, msg: Accepted) -> None:
        exchange.answer.accept(choice.prompt_idx, msg.prompt, msg.thoughts, msg.cut)
        exchange.unaccepted.discard(msg.rid)
        if not exchange.unaccepted:
            if exchange.streams:
                exchange.tells_prompt = exchange.answer.is_long
                self._render_first(msg.rid, exchange, exchange.reply.opening)
            resolve(exchange.accepted)

    def _take_tokens(self, msg: TokenTexts) -> None:
        by_rid, now = self._by_rid, monotonic()
        rows = zip(msg.rids, msg.tokens, msg.texts, msg.logprobs, strict=True)
        for rid, token, text, logprob in rows:
            if (found := by_rid.get(rid)) is None:
                self._aside.keep(rid, TextDelta.of_token(rid, token, text, logprob))
                continue  # or aborted, and the detokenizer did not know yet
            exchange, choice = found
            if not choice.num_tokens:
                self._admission.begin(exchange.client)
                exchange.first_at = exchange.first_at or now
            exchange.last_at = now
            try:
                choice.take_token(token, text, logprob)
                if exchange.tells_prompt and choice.num_tokens == 1:
                    piece = partial(exchange.reply.piece, choice, text, 1)
                    self._render_first(rid, exchange, piece)
                elif exchange.streams:
                    self._render(exchange, exchange.reply.piece(choice, text, 1))
            except Exception:
                self._broken(exchange)

    def _delta(self, exchange: Exchange, choice: Choice, msg: TextDelta) -> None:
        if msg.ids and not choice.num_tokens:
            self._admission.begin(exchange.client)
        choice.take(msg)
        if msg.ids:
            exchange.last_at = monotonic()
            exchange.first_at = exchange.first_at or exchange.last_at
        if exchange.streams:
            piece = partial(exchange.reply.piece, choice, msg.text, len(msg.ids))
            if choice.num_tokens == len(msg.ids):
                self._render_first(msg.rid, exchange, piece)
            else:
                self._render(exchange, piece())

    def _finished(self, exchange: Exchange, choice: Choice, msg: Finished) -> None:
        reason, failure = msg.reason, msg.failure
        if failure is not None:
            self._fail(exchange, from_failure(failure, exchange.answer.generation.fields))
            return
        if reason is FinishReason.ABORT and (exchange.unaccepted or not exchange.cancelled):
            error: RequestError = NotServing("the server ended this request", code="aborted")
            if exchange.cancelled:
                error = Cancelled("the request was aborted before it began")
            self._fail(exchange, error)
            return
        del self._by_rid[msg.rid], exchange.live[msg.rid]
        self._admission.leave(exchange.client, begun=choice.num_tokens > 0, served=True)
        choice.end(reason, msg.cached_len, msg.stop, (msg.drafted, msg.accepted))
        if exchange.streams:
            self._render(exchange, exchange.reply.end(choice))
        if not exchange.live:
            if exchange.streams:
                self._render(exchange, exchange.reply.closing())
            exchange.end()

    def _cancel(self, request_id: str) -> None:
        """Abort these choices; they end as usual, with the reason ABORT."""
        for exchange in self._exchanges:
            if request_id in ("", exchange.request_id, exchange.answer.id):
                exchange.cancelled = True
                self._tell_abort(exchange)

    def _fail(self, exchange: Exchange, error: RequestError, *, broken: bool = False) -> None:
        """End a request with an error: plain before the headers, the last event after them.

        Args:
            broken: what its reply holds back cannot be rendered either.
        """
        if exchange.committed and not (exchange.ended or broken):
            self._render_held(exchange)
        if exchange.ended:
            return
        exchange.error = error
        self._abort(exchange)
        if exchange.committed:
            self._render(exchange, exchange.reply.error(error))
        exchange.end()

    def _render_held(self, exchange: Exchange) -> None:
        """Render what its reply holds back, unless a thread does; a fault costs no other one."""
        try:
            if not exchange.aside and (held := exchange.reply.flush_held()):
                exchange.pending.append(held)
        except Exception:
            self._broken(exchange)

    def _abort(self, exchange: Exchange) -> None:
        """End every unfinished choice."""
        for rid, choice in exchange.live.items():
            self._by_rid.pop(rid, None)
            self._aside.forget(rid)
            self._admission.leave(exchange.client, begun=choice.num_tokens > 0, served=False)
        if not self.system.over:
            self._tell_abort(exchange)
        exchange.live.clear()

    def _tell_abort(self, exchange: Exchange) -> None:
        for rid in exchange.live:
            self._tokenizer.tell(Abort(rid))

    def _forget(self, exchange: Exchange) -> None:
        self._abort(exchange)
        self._exchanges.discard(exchange)
        exchange.pipe = None
        if exchange.watch is not None:
            exchange.watch.cancel()

    def _render_first(self, rid: int, exchange: Exchange, work: Callable[[], bytes]) -> None:
        """Render what may tell of the prompt; the request ``rid`` of the exchange has not ended."""
        if exchange.tells_prompt:
            self._aside.begin(exchange)
            self.spawn(self._render_aside(rid, exchange, work))
        else:
            self._render(exchange, work())

    async def _render_aside(
        self, rid: int, exchange: Exchange, work: Callable[[], bytes]
    ) -> EventsRendered | None:
        """In a thread, with the text that the reply holds back after it."""
        try:
            return EventsRendered(rid, await asyncio.to_thread(exchange.with_held, work))
        except Exception:
            self._broken(exchange)
            self._flush()
            return None

    def _rendered(self, msg: EventsRendered) -> None:
        if (found := self._aside.end(msg.rid)) is not None:
            exchange, late = found
            self._render(exchange, msg.events)
            self.receive([*late])

    def _render(self, exchange: Exchange, data: bytes) -> None:
        if data:
            exchange.pending.append(data)
        if not exchange.queued:
            exchange.queued = True
            self._dirty.append(exchange)

    def _flush(self) -> None:
        """Write stream by stream; when the budget is spent, yield, then continue with the rest.

        Text that arrives meanwhile for a waiting stream goes out with the same write.
        """
        self._flush_waits = False
        if self.system.over:
            return
        until = perf_counter() + self.limits.flush_s
        written = 0
        while self._dirty:
            self._write(self._dirty.popleft())
            written += 1
            if written % LOOK_EVERY == 0 and perf_counter() > until and self._dirty:
                self._flush_waits = True
                self.system.loop.call_soon(self._flush)
                return

    def _write(self, exchange: Exchange) -> None:
        """Write all pending events at once; drop a client that does not read."""
        exchange.queued = False
        pipe = exchange.pipe
        if pipe is None or pipe.gone:
            return  # before the headers: stream() comes back; gone: the handler is being cancelled
        if exchange.error is None:
            self._render_held(exchange)
        if pending := exchange.pending:
            data = pending[0] if len(pending) == 1 else b"".join(pending)
            pending.clear()
            if pipe.behind > self.limits.max_unsent:
                log.warning("request %s: client does not read, dropped", exchange.answer.id)
                self._abort(exchange)
                exchange.ended = True
                pipe.abort()  # this cancels the handler, which closes the exchange
                return
            pipe.write(data)
            exchange.written_at = monotonic()
        if exchange.ended:
            resolve(exchange.done)

    async def _serve(self) -> None:
        """Start serving HTTP."""
        self._listeners = HttpRoutes(self).listeners()
        await self._listeners.open(self._sockets, self.access.tls)
        self.serving = True
        self._on_open()

    def _say_drained(self) -> None:
        """Report, once, that the server drains and no request is left."""
        if self.draining and not self._exchanges and not self.system.over:
            self._watchdog.tell(Drained("frontend", self.system.endpoint))
