"""Grammar keeper: each question answered once; threads, line and turns; the tokenizer waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from asyncllm.actors.base import Actor
from asyncllm.actors.grammar import GrammarCompiler
from asyncllm.actors.system import ActorSystem
from asyncllm.actors.tokenizer import Tokenizer
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.errors import RequestError
from asyncllm.messages import (
    Abort,
    Accepted,
    CompileGrammar,
    Finished,
    GrammarReady,
    GroupRemoved,
    Submit,
    Tokenize,
)
from asyncllm.records import Failure
from asyncllm.text import ModelTokenizer
from asyncllm.topology import Topology
from tests.actors.fake_renderer import FakeRenderer
from tests.actors.test_tokenizer import Sink, make_text


class FakeBuilder:
    """Builds at once, but for texts in ``gates``, which wait for theirs; "bad" is refused."""

    def __init__(self, *slow: str) -> None:
        self.gates = {text: threading.Event() for text in slow}
        self.begun = {text: threading.Event() for text in slow}
        self.built: list[str] = []
        self.kept: set[tuple[str, str]] = set()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.kept

    def build(self, kind: str, text: str) -> str:
        self.built.append(text)
        if text in self.gates:
            self.begun[text].set()
            assert self.gates[text].wait(20)
        if text == "bad":
            raise RequestError("it is bad")
        if text == "fault":
            raise ZeroDivisionError
        return text

    def keep(self, kind: str, text: str, compiled: str) -> None:
        assert compiled == text
        self.kept.add((kind, text))


class Asker(Actor[Any]):
    """In the tokenizer's place: sends what is next when an answer comes."""

    def __init__(self, script: Callable[[Asker, GrammarReady | None], None]) -> None:
        super().__init__("tokenizer")
        self.script = script
        self.answers: dict[int, tuple[str, int]] = {}

    def started(self) -> None:
        self.keeper = self.system.ref("grammar")
        self.system.loop.call_soon(self.script, self, None)

    def ask(self, job: int, text: str, client: int = 0) -> None:
        self.keeper.tell(CompileGrammar(0, job, "regex", text, client))

    def receive(self, batch: list[Any]) -> None:
        for msg in batch:
            assert msg.job not in self.answers, "answered twice"
            failure = msg.failure
            self.answers[msg.job] = (failure.detail, failure.status) if failure else ("", 0)
            self.script(self, msg)


def play(
    builder: FakeBuilder | None,
    script: Callable[[Asker, GrammarReady | None], None],
    **options: Any,
) -> dict[int, tuple[str, int]]:
    asker = Asker(script)

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem(encode_local=True)
            system.add(GrammarCompiler(builder, **options))
            system.add(asker)
            await system.run()

    uvloop.run(main())
    return asker.answers


def until(num: int, *texts: str) -> Callable[[Asker, GrammarReady | None], None]:
    """Asks for the texts at once; stops after so many answers."""

    def script(asker: Asker, msg: GrammarReady | None) -> None:
        if msg is None:
            for job, text in enumerate(texts):
                asker.ask(job, text)
        elif len(asker.answers) == num:
            asker.system.stop()

    return script


def test_good_bad_and_equal_ones() -> None:
    builder = FakeBuilder()
    answers = play(builder, until(4, "a", "a", "bad", "b"))
    assert answers == {0: ("", 0), 1: ("", 0), 2: ("it is bad", 400), 3: ("", 0)}
    assert sorted(builder.built) == ["a", "b", "bad"], "equal ones are built once"


def test_a_fault_of_the_builder_is_one_answer() -> None:
    answers = play(FakeBuilder(), until(2, "fault", "a"))
    assert answers == {0: ("the server failed on this request; see its log", 500), 1: ("", 0)}


def test_a_kept_one_is_not_built() -> None:
    builder = FakeBuilder()
    builder.kept.add(("regex", "a"))
    assert play(builder, until(1, "a")) == {0: ("", 0)}
    assert builder.built == []


def test_off_is_said() -> None:
    ((detail, status),) = play(None, until(1, "a")).values()
    assert (status, "--output_constraint_mode" in detail) == (400, True)


def test_clients_that_wait_are_served_in_turn_and_leave_places_for_others() -> None:
    builder = FakeBuilder("slow")

    def script(asker: Asker, msg: GrammarReady | None) -> None:
        if msg is None:
            for job, text in enumerate(("slow", "b", "c", "d", "e", "f")):
                asker.ask(job, text, client=1)
            asker.ask(6, "x", client=2)
            asker.ask(7, "y", client=2)
            asker.ask(8, "z", client=2)
        elif len(asker.answers) == 2:  # no place for the last one of either
            builder.gates["slow"].set()
        elif len(asker.answers) == 9:
            asker.system.stop()

    answers = play(builder, script, workers=1, max_queue=4)
    assert {job for job, (_, status) in answers.items() if status == 429} == {5, 8}
    assert "at most 4" in answers[8][0]
    assert builder.built == ["slow", "b", "x", "c", "y", "d", "e"]


def test_a_full_line_is_429() -> None:
    builder = FakeBuilder("slow")

    def script(asker: Asker, msg: GrammarReady | None) -> None:
        if msg is None:
            for job, text in enumerate(("slow", "b", "c")):
                asker.ask(job, text)
        elif msg.job == 2:
            builder.gates["slow"].set()
        elif len(asker.answers) == 3:
            asker.system.stop()

    answers = play(builder, script, workers=1, max_queue=1)
    assert [answers[job][1] for job in range(3)] == [0, 0, 429]


# -- the tokenizer -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return make_text(tmp_path_factory.mktemp("model"))


def tokenize(
    text: ModelTokenizer, builder: FakeBuilder, script: list[Any], answers: int
) -> list[Any]:
    """Everything that the scheduler and the frontend got, in order."""
    log: list[tuple[str, Any]] = []

    def enough() -> bool:
        return sum(name == "frontend" for name, _ in log) >= answers

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem(encode_local=True)
            system.add(GrammarCompiler(builder))
            for name in ("detokenizer", "scheduler", "frontend"):
                system.add(Sink(name, log, enough if name == "frontend" else lambda: False))
            actor = Tokenizer(text, FakeRenderer(text), limit=20, vocab_size=text.vocab_size)
            ref = system.add(actor)
            for msg in script:
                ref.tell(msg)
            await system.run()
            assert actor.waiting == 0

    uvloop.run(main())
    return [msg for name, msg in log if name != "detokenizer"]


def asked(rids: tuple[int, ...], source: str, **params: Any) -> Tokenize:
    packed = SamplingParams(grammar=("regex", source), **params)
    return Tokenize(rids, None, i32([1, 2, 3]), None, True, packed)


def test_a_request_is_accepted_once_its_grammar_is_ready(text: ModelTokenizer) -> None:
    builder = FakeBuilder()
    first, second, accepted = tokenize(text, builder, [asked((1, 2), "a")], 1)
    assert isinstance(first, Submit)
    assert isinstance(second, Submit)
    assert second.params.grammar == ("regex", "a")
    assert accepted == Accepted(1, i32([1, 2, 3]))
    assert builder.kept == {("regex", "a")}


def test_a_bad_grammar_is_refused_before_anything_is_submitted(text: ModelTokenizer) -> None:
    (end,) = tokenize(text, FakeBuilder(), [asked((1, 2), "bad")], 1)
    assert isinstance(end, Finished)
    assert (end.rid, end.reason, end.failure.detail, end.failure.status) == (
        1,
        FinishReason.ERROR,
        "it is bad",
        400,
    )


def test_a_prompt_too_long_is_refused_before_its_grammar_is_compiled(text: ModelTokenizer) -> None:
    builder = FakeBuilder()
    (end,) = tokenize(text, builder, [asked((1,), "a", max_new_tokens=1000)], 1)
    assert end.failure.code == "context_length_exceeded"
    assert builder.built == []


def test_an_abort_while_the_grammar_is_compiled_ends_the_request(text: ModelTokenizer) -> None:
    builder = FakeBuilder("slow")

    class Opener(Actor[Any]):
        def started(self) -> None:
            self.system.loop.call_soon(self.look)

        def look(self) -> None:
            if not builder.begun["slow"].is_set():
                self.system.loop.call_later(0.002, self.look)
                return
            self.system.ref("tokenizer").tell(Abort(1))
            self.system.loop.call_later(0.002, builder.gates["slow"].set)

    log: list[tuple[str, Any]] = []

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem()
            system.add(GrammarCompiler(builder))
            for name in ("detokenizer", "scheduler", "frontend"):
                answers = (lambda: len(log) >= 4) if name == "frontend" else (lambda: False)
                system.add(Sink(name, log, answers))
            system.add(Tokenizer(text, FakeRenderer(text), limit=20, vocab_size=text.vocab_size))
            system.add(Opener("opener"))
            system.ref("tokenizer").tell(asked((1, 2), "slow"))
            await system.run()

    uvloop.run(main())
    assert [(name, type(msg).__name__, getattr(msg, "rid", 0)) for name, msg in log] == [
        ("frontend", "Finished", 1),
        ("detokenizer", "OpenTextStream", 2),
        ("scheduler", "Submit", 2),
        ("frontend", "Accepted", 1),
    ]


@pytest.mark.parametrize("fails", [-1, 0, 1, "lost"])
def test_with_several_groups_a_grammar_must_be_ready_in_all_of_them(
    text: ModelTokenizer, fails: int | str
) -> None:
    """Both leaders answer the one question, which the balancer would pass on to them; nobody waits
    for one that is lost."""
    log: list[tuple[str, Any]] = []

    class Leaders(Sink):
        def receive(self, batch: list[Any]) -> None:
            super().receive(batch)
            for msg in batch:
                if isinstance(msg, CompileGrammar):
                    assert not any(name == "frontend" for name, _ in log)
                    for group in (0, 1):
                        bad = Failure("no such thing") if group == fails else None
                        answer = GrammarReady(msg.job, bad, endpoint=group)
                        if fails == "lost" and group == 1:
                            self.system.ref("tokenizer").tell(GroupRemoved(1, 1, ""))
                        self.system.ref("tokenizer").tell(answer)

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem(topology=Topology.on_one_node(tp=2, dp=2))
            system.add(Leaders("balancer", log, lambda: False))
            for name in ("detokenizer", "frontend"):
                system.add(Sink(name, log, lambda: log[-1][0] == "frontend"))
            system.add(Tokenizer(text, FakeRenderer(text), limit=20, vocab_size=text.vocab_size))
            system.ref("tokenizer").tell(asked((1, 2), "a"))
            await system.run()

    uvloop.run(main())
    told = [(name, type(msg).__name__) for name, msg in log]
    if fails in (-1, "lost"):
        follows, submits = [("detokenizer", "OpenTextStream")] * 2, [("balancer", "Submit")] * 2
        assert sorted(told) == sorted(
            [("balancer", "CompileGrammar"), *follows, *submits, ("frontend", "Accepted")]
        )
    else:
        assert told == [("balancer", "CompileGrammar"), ("frontend", "Finished")]
        assert log[-1][1].failure == Failure("no such thing")
