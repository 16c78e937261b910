"""A frontend over fake actors: bytes as tokens, answers under the test's control, real HTTP.

The tokens are the 256 bytes and one special token, EOS. Every message goes through the codec.
"""

from __future__ import annotations

import asyncio
import json
import socket
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from math import nan
from typing import Any

import aiohttp

from asyncllm.actors.access import Access
from asyncllm.actors.base import Actor
from asyncllm.actors.frontend import Frontend
from asyncllm.actors.frontend_settings import FrontendLimits
from asyncllm.actors.system import ActorSystem
from asyncllm.api.common.answer import Vocab
from asyncllm.api.common.request import ServedModel
from asyncllm.codec import i32, i64
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.messages import (
    Abort,
    Accepted,
    Cancel,
    CountTokens,
    Drained,
    Finished,
    Scrape,
    Scraped,
    Started,
    TextDelta,
    Tokenize,
    TokensCounted,
    TokenTexts,
)
from asyncllm.records import Failure, GroupLoad, Logprobs

EOS = 256
SERVED = ServedModel(
    name="tiny",
    listed=("tiny", "org/tiny"),
    accepted=frozenset({"default", "tiny-folder"}),
    max_len=1000,
    vocab_size=257,
    created=1_700_000_000,
)


def piece(token: int) -> bytes:
    return b"<eos>" if token == EOS else bytes([token])


VOCAB = Vocab(
    piece=piece,
    decode=lambda ids: b"".join(map(piece, ids)).decode("utf-8", "replace"),
    spell=lambda ids: [piece(i).decode("utf-8", "replace") for i in ids],
    special=frozenset({EOS}),
)


def floats(values: list[float]) -> array[float]:
    return array("f", values)


def score(i: int) -> float:
    """Log-probability of the i-th token; exact in float32."""
    return -(i + 1) / 4


class Model(Actor[Any]):
    """Tokenizer, scheduler and detokenizer in one; answers at once unless ``holds``."""

    def __init__(self) -> None:
        super().__init__("tokenizer")
        self.holds = False  # the test answers
        self.refuse: Callable[[Tokenize], Finished | None] = lambda msg: None
        self.counts = True
        self.refusal = ""  # of a text to count
        self.asked: list[Tokenize] = []
        self.aborted: list[int] = []
        self.news = asyncio.Condition()

    def started(self) -> None:
        self.front = self.system.ref("frontend")

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            match msg:
                case Tokenize():
                    self.asked.append(msg)
                    if not self.holds:
                        self.answer(msg)
                case Abort(rid):
                    self.aborted.append(rid)
                case CountTokens(query, text, special, chat):
                    if chat is not None:
                        text = json.loads(chat)["messages"][-1]["content"]
                    if self.refusal:
                        failure = Failure(self.refusal, param="prompt")
                        self.front.tell(TokensCounted(query, failure=failure))
                    elif self.counts:
                        ids = i32([*([EOS] if special else []), *text.encode()])
                        self.front.tell(TokensCounted(query, ids))
        self.spawn(self._notify())

    async def _notify(self) -> None:
        async with self.news:
            self.news.notify_all()

    async def until(self, ready: Callable[[], bool]) -> None:
        """Wait for messages until ``ready``."""
        async with asyncio.timeout(10), self.news:
            await self.news.wait_for(ready)

    # -- answers -----------------------------------------------------------------------------

    def answer(self, msg: Tokenize) -> None:
        """Accept and generate a, b, c, ...: as many tokens as asked for, 3 where it is open."""
        if (refusal := self.refuse(msg)) is not None:
            self.front.tell(refusal)
            return
        ids = self.accept(msg)
        params = msg.params
        count = 3 if params.max_new_tokens is None else params.max_new_tokens
        for rid in msg.rids:
            if count == 0 and params.prompt_logprobs >= 0:
                self.delta(rid, [], params, prompt=ids)
            for i in range(count):
                prompt = ids if i == 0 and params.prompt_logprobs >= 0 else None
                self.delta(rid, [97 + i % 26], params, first=i, prompt=prompt)
            self.finish(rid, len(ids), count)

    def accept(self, msg: Tokenize) -> array[int]:
        if msg.ids is not None:
            ids = msg.ids
        elif msg.text is not None:
            ids = array("i", list(msg.text.encode()))
        else:
            assert msg.chat is not None
            ids = array("i", list(json.loads(msg.chat)["messages"][-1]["content"].encode()))
        self.front.tell(Accepted(msg.rids[0], ids))
        return ids

    def delta(
        self,
        rid: int,
        tokens: list[int],
        params: SamplingParams,
        *,
        text: str | None = None,
        first: int = 0,
        prompt: array[int] | None = None,
    ) -> None:
        """New tokens; alternatives one column wider than asked for, as in a shared step."""
        pieces = tuple(piece(t).decode("utf-8", "ignore") for t in tokens)
        num_top = params.logprobs + 1 if params.logprobs > 0 else 0
        top_ids = [(t + j) % 256 for t in tokens for j in range(num_top)]
        top = [score(first + i) - j for i in range(len(tokens)) for j in range(num_top)]
        scored = params.logprobs >= 0
        chosen = floats([score(first + i) for i in range(len(tokens))])
        columns = None
        if prompt is not None:
            wide = max(params.prompt_logprobs, 0)
            columns = Logprobs(
                wide,
                floats([score(i) for i in range(len(prompt) - 1)]),
                i32([(t + j) % 256 for t in prompt[1:] for j in range(wide)]),
                floats([score(i) - j for i in range(len(prompt) - 1) for j in range(wide)]),
            )
        if len(tokens) == 1 and text is None and not num_top and columns is None:
            logprob = chosen if scored else floats([nan])
            self.front.tell(
                TokenTexts(rids=i64([rid]), tokens=i32(tokens), texts=pieces, logprobs=logprob)
            )
            return
        self.front.tell(
            TextDelta(
                rid,
                "".join(pieces) if text is None else text,
                i32(tokens),
                pieces,
                Logprobs(num_top, chosen, i32(top_ids), floats(top)) if scored else None,
                columns,
            )
        )

    def finish(
        self,
        rid: int,
        prompt_len: int,
        count: int,
        reason: FinishReason = FinishReason.LENGTH,
        stop: str = "",
    ) -> None:
        self.front.tell(Finished(rid, reason, None, prompt_len // 2, count, stop))

    def fail(self, rid: int, detail: str, code: str, status: int) -> None:
        self.front.tell(Finished(rid, FinishReason.ERROR, Failure(detail, code, status)))


class Watchdog(Actor[Any]):
    """Answers Scrape, sends Cancel back to the frontend, writes down the rest."""

    def __init__(self) -> None:
        super().__init__("watchdog")
        self.answers, self.groups = True, 1
        self.load = GroupLoad(used=10, expected=30, total=40)
        self.got: list[Any] = []
        self.drained = asyncio.Event()

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            if isinstance(msg, Cancel):
                self.system.ref("frontend").tell(msg)
            elif isinstance(msg, Scrape):
                if self.answers:
                    loads = (self.load,) * self.groups
                    answer = Scraped(msg.query, b"# TYPE x gauge\nx 1\n", loads)
                    self.system.ref("frontend", msg.endpoint).tell(answer)
            else:
                self.got.append(msg)
                if isinstance(msg, Drained):
                    self.drained.set()


class Server:
    """What a test holds in its hands."""

    def __init__(self, system: ActorSystem, front: Frontend, port: int) -> None:
        self.system, self.front, self.port = system, front, port
        self.model = next(a for a in system.actors if isinstance(a, Model))
        self.watchdog = next(a for a in system.actors if isinstance(a, Watchdog))
        self.url = f"http://127.0.0.1:{port}"
        self.http: aiohttp.ClientSession
        self.opened = asyncio.Event()

    async def post(self, path: str, body: Any, **more: Any) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        async with self.http.post(self.url + path, json=body, **more) as response:
            return response.status, await response.json()

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a GET."""
        async with self.http.get(self.url + path) as response:
            return response.status, await response.json()

    async def stream(self, path: str, body: Any) -> bytes:
        """Everything that a stream says."""
        async with self.http.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            return await response.read()

    async def chunks(self, path: str, body: Any) -> list[Any]:
        """The events of an OpenAI stream before [DONE], decoded."""
        *events, done, rest = (await self.stream(path, body | {"stream": True})).split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        assert all(e.startswith(b"data: ") for e in events)
        return [json.loads(e[6:]) for e in events]


@asynccontextmanager
async def serving(
    *,
    start: bool = True,
    access: Access | None = None,
    tgi: bool = False,
    info: dict[str, Any] | None = None,
    **limits: Any,
) -> AsyncIterator[Server]:
    """A server on a free port; ``start`` False leaves its doors closed."""
    system = ActorSystem(encode_local=True)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    front = Frontend(
        served=replace(SERVED, tgi=tgi),
        vocab=VOCAB,
        sockets=[sock],
        limits=FrontendLimits(**limits),
        access=access,
        info=info,
        on_open=lambda: server.opened.set(),
    )
    ref = system.add(front)
    for actor in (Model(), Watchdog()):
        system.add(actor)
    running = asyncio.create_task(system.run())
    server = Server(system, front, sock.getsockname()[1])
    sock.listen()  # requests before the doors open wait in the backlog
    try:
        if start:
            ref.tell(Started())
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as server.http:
            yield server
    finally:
        system.stop()
        await running
