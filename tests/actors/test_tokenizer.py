"""Tokenizer: every prompt is accepted or refused once, with the numbers; aborts race with nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from asyncllm.actors import tokenizer as module
from asyncllm.actors.base import Actor
from asyncllm.actors.system import ActorSystem
from asyncllm.codec import i32
from asyncllm.core.request import FinishReason, SamplingParams
from asyncllm.messages import (
    Abort,
    Accepted,
    CountTokens,
    Finished,
    OpenTextStream,
    PromptEncoded,
    Submit,
    Tokenize,
    TokensCounted,
)
from asyncllm.records import Overflow
from asyncllm.text import ModelTokenizer, load_tokenizer
from tests.actors.fake_renderer import FakeRenderer

TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"
LIMIT = 20


def make_text(folder: Path, template: str | None = TEMPLATE) -> ModelTokenizer:
    """Byte-level, one id per byte, but none for "q"; <eos> last."""
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"q"})
    vocab = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return make_text(tmp_path_factory.mktemp("model"))


class Sink(Actor[Any]):
    def __init__(self, name: str, log: list[tuple[str, Any]], until: Callable[[], bool]) -> None:
        super().__init__(name)
        self.log, self.until = log, until
        self.capacity = 0  # what admission has let in is not refused further on

    def receive(self, batch: list[Any]) -> None:
        self.log.extend((self.name, msg) for msg in batch)
        if self.until():
            self.system.loop.call_soon(self.system.stop)  # after what is on its way to the others


def play(
    text: ModelTokenizer,
    script: list[Any],
    *,
    answers: int,
    on_answer: Callable[[Any], None] = lambda msg: None,
    waiting: int = 0,
    **options: Any,
) -> list[tuple[str, Any]]:
    """(receiver, message) in order, up to the frontend's answer number ``answers``.

    Messages of a ``list`` in the script arrive as one batch.
    """
    log: list[tuple[str, Any]] = []
    given = {"limit": LIMIT, "vocab_size": text.vocab_size, "workers": 1, **options}

    def until() -> bool:
        got = [msg for name, msg in log if name == "frontend"]
        if got:
            on_answer(got[-1])
        return len(got) >= answers

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem(encode_local=True)
            for name in ("detokenizer", "scheduler", "frontend"):
                system.add(Sink(name, log, until if name == "frontend" else lambda: False))
            actor = module.Tokenizer(text, FakeRenderer(text), **given)
            ref = system.add(actor)
            for msg in script:
                ref.tell(msg)
            await system.run()
            assert actor.waiting == waiting

    uvloop.run(main())
    return log


def prompt(
    rid: int = 1,
    text: str | None = None,
    *,
    ids: list[int] | None = None,
    chat: Any = None,
    more: tuple[int, ...] = (),
    **params: Any,
) -> Tokenize:
    packed = SamplingParams(**params)
    column = None if ids is None else i32(ids)
    body = None if chat is None else json.dumps(chat).encode()
    return Tokenize((rid, *more), text, column, body, True, packed)


def only(log: list[tuple[str, Any]]) -> Finished:
    """The one message there is: a refusal."""
    ((name, msg),) = log
    assert name == "frontend"
    assert isinstance(msg, Finished)
    assert msg.reason == FinishReason.ERROR
    return msg


def test_group_is_followed_submitted_and_accepted_in_this_order(text: ModelTokenizer) -> None:
    asked = prompt(5, "hello", more=(6,), seed=40, stop=("x",), print_eos=True, max_new_tokens=None)
    log = play(text, [asked], answers=1)
    ids = text.encode("hello", False)
    assert [name for name, _ in log] == ["detokenizer"] * 2 + ["scheduler"] * 2 + ["frontend"]
    assert [msg for _, msg in log[:2]] == [
        OpenTextStream(r, ids, ("x",), True, True) for r in (5, 6)
    ]
    submits = [msg for _, msg in log[2:4]]
    assert [(m.rid, m.prompt) for m in submits] == [(5, ids), (6, ids)]
    own = [m.params for m in submits]
    assert [(p.seed, p.max_new_tokens, p.stop) for p in own] == [(40, 15, ("x",)), (41, 15, ("x",))]
    assert log[-1][1] == Accepted(5, ids)


@pytest.mark.parametrize(
    ("params", "room"),
    [
        ({"max_new_tokens": None}, 4),
        ({"max_new_tokens": None, "min_new_tokens": 6}, 6),
        ({"max_new_tokens": 9}, 9),
        ({"max_new_tokens": 0}, 0),
    ],
)
def test_the_models_own_limit_counts_where_a_request_has_none(
    text: ModelTokenizer, params: dict[str, Any], room: int
) -> None:
    log = play(text, [prompt(text="hello", **params)], answers=1, most_new=4)
    assert log[1][1].params.max_new_tokens == room
    log = play(text, [prompt(text="hello", max_new_tokens=None)], answers=1, most_new=1000)
    assert log[1][1].params.max_new_tokens == LIMIT - 5


def test_ids_pass_as_they_are_and_only_their_tail_is_followed(text: ModelTokenizer) -> None:
    log = play(text, [prompt(ids=list(range(15)), max_new_tokens=5)], answers=1)
    assert log[0][1].prompt_tail.tolist() == list(range(7, 15))
    assert log[1][1].prompt.tolist() == list(range(15))
    assert log[1][1].params.max_new_tokens == 5


@pytest.mark.parametrize("asked", [prompt(text=""), prompt(ids=[]), prompt(text="qq")])
def test_empty_prompt_is_refused_also_when_text_gives_no_ids(
    text: ModelTokenizer, asked: Tokenize
) -> None:
    refusal = only(play(text, [asked], answers=1))
    assert (refusal.failure.detail, refusal.failure.status) == ("prompt is empty", 400)


@pytest.mark.parametrize("bad", [-1, 256, 2**31 - 1])
def test_id_outside_the_vocabulary_is_named(text: ModelTokenizer, bad: int) -> None:
    refusal = only(play(text, [prompt(ids=[1, bad, 2])], answers=1))
    assert f"token id {bad} is not in the vocabulary (0 to 255)" in refusal.failure.detail
    assert refusal.failure.status == 400


@pytest.mark.parametrize("options", [{}, {"truncation": "head"}])
def test_a_prediction_is_encoded_and_may_be_as_long_as_the_context(
    text: ModelTokenizer, options: dict[str, Any]
) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "tools": None, "kwargs": {}}
    asked = replace(prompt(chat=chat, max_new_tokens=2, more=(2,)), prediction="b" * 20)
    log = play(text, [asked], answers=1, **options)
    given = [msg.prediction for _, msg in log if isinstance(msg, Submit)]
    assert given == [text.encode("b" * 20, False)] * 2
    for num in (21, 1000):
        refusal = only(play(text, [replace(asked, prediction="b" * num)], answers=1, **options))
        assert "tokens, limit 20 (--max_req_total_len)" in refusal.failure.detail
        assert refusal.failure.detail.startswith("prediction: ")
        assert refusal.failure.status == 400


def test_prompt_over_the_limit_gives_the_numbers(text: ModelTokenizer) -> None:
    refusal = only(play(text, [prompt(text="a" * 21)], answers=1))
    assert refusal.failure.detail == (
        "This model's maximum context length is 20 tokens. This prompt exceeds the context window:"
        " 21 prompt tokens, limit 20 (--max_req_total_len)"
    )
    assert refusal.failure.overflow == Overflow(21, 0, 20, "--max_req_total_len")
    assert (refusal.failure.code, refusal.failure.status) == ("context_length_exceeded", 400)


def test_prompt_that_leaves_no_room_is_refused_unless_it_wants_none(text: ModelTokenizer) -> None:
    full = "a" * 20
    assert (
        "exceeds the context window"
        in only(play(text, [prompt(text=full)], answers=1)).failure.detail
    )
    log = play(text, [prompt(text=full, max_new_tokens=0)], answers=1)
    assert isinstance(log[-1][1], Accepted)


def test_prompt_and_max_tokens_over_the_limit_give_the_sum(text: ModelTokenizer) -> None:
    refusal = only(play(text, [prompt(text="a" * 12, max_new_tokens=9)], answers=1))
    assert refusal.failure.detail == (
        "This model's maximum context length is 20 tokens. This request exceeds the context window:"
        " 12 prompt tokens + 9 max_tokens = 21, limit 20 (--max_req_total_len)"
    )
    assert refusal.failure.overflow == Overflow(12, 9, 20, "--max_req_total_len")
    assert refusal.failure.code == "context_length_exceeded"


def test_the_least_number_of_tokens_has_to_fit_too(text: ModelTokenizer) -> None:
    asked = prompt(text="a" * 12, max_new_tokens=None, min_new_tokens=9)
    refusal = only(play(text, [asked], answers=1))
    assert "12 prompt tokens + 9 min_tokens = 21, limit 20 (--max_req_total_len)" in (
        refusal.failure.detail
    )
    accepted = play(text, [asked], answers=1, truncation="head")[-1][1]
    assert text.decode(accepted.prompt) == "a" * 11


def test_hopelessly_long_text_is_refused_without_encoding(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    monkeypatch.setattr(ModelTokenizer, "encode", lambda self, some, special: encoded.append(some))
    refusal = only(play(text, [prompt(text="a" * 321)], answers=1))
    assert "exceeds the context window: 321 characters" in refusal.failure.detail
    assert refusal.failure.code == "context_length_exceeded"
    assert encoded == []


@pytest.mark.parametrize("options", [{}, {"input_limit": 19}])
def test_what_is_too_long_is_refused_without_a_thread(
    text: ModelTokenizer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts and chats, to be answered or counted: 16 characters a token, as no token is longer."""
    monkeypatch.setattr(module.Tokenizer, "_start_some", lambda self: None)
    long = "a" * 100_000
    chat = {"messages": [{"role": "user", "content": long}], "tools": None, "kwargs": {}}
    packed = json.dumps(chat).encode()
    flag = "--max_req_input_len" if options else "--max_req_total_len"
    for asked in (prompt(text=long), prompt(chat=chat)):
        refusal = only(play(text, [asked], answers=1, **options))
        assert (refusal.failure.code, refusal.failure.status) == ("context_length_exceeded", 400)
        assert f"({flag})" in refusal.failure.detail
    most = 16 * options.get("input_limit", LIMIT)
    for count, number in (
        (CountTokens(3, long, True), 100_000),
        (CountTokens(3, "", False, packed), 50_038),
    ):
        counted = play(text, [count], answers=1, **options)[0][1]
        assert counted.failure.status == 400
        assert counted.failure.code == "context_length_exceeded"
        assert f"at least {number} characters are too many to be counted: at most {most}" in (
            counted.failure.detail
        )
        assert f"({flag})" in counted.failure.detail


def test_a_chat_that_its_template_makes_too_long_is_refused(text: ModelTokenizer) -> None:
    messages = [{"role": "u" * 100, "content": "a"}]
    grows = "{% for m in messages %}{{ m.role * 10 }}{% endfor %}"
    wide = replace(text, templates={"default": grows})
    chat = {"messages": messages, "tools": None, "kwargs": {}}
    assert "1000 characters" in only(play(wide, [prompt(chat=chat)], answers=1)).failure.detail
    counted = play(wide, [CountTokens(3, "", False, json.dumps(chat).encode())], answers=1)[0][1]
    assert "at least 1000 characters are too many to be counted" in counted.failure.detail


@pytest.mark.parametrize(
    ("asked", "options", "expected"),
    [
        ({"truncate": 4}, {}, "wxyz"),
        ({}, {"truncation": "head", "input_limit": 5}, "vwxyz"),
        ({}, {"truncation": "center", "input_limit": 5}, "abxyz"),
        ({"truncate": 4}, {"truncation": "center", "input_limit": 2}, "wz"),
    ],
)
def test_of_long_texts_only_the_ends_are_encoded(
    text: ModelTokenizer,
    asked: dict[str, Any],
    options: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded, original = [0], ModelTokenizer.encode

    def encode(self: ModelTokenizer, some: str, special: bool) -> Any:
        encoded[0] += len(some)
        return original(self, some, special)

    monkeypatch.setattr(ModelTokenizer, "encode", encode)
    long = ABC + "-" * 1_000_000 + ABC
    chat = {"messages": [{"role": "", "content": long}], "tools": None, "kwargs": {}}
    plain = replace(text, templates={"default": "{{ messages[0].content }}"})
    for msg in (prompt(text=long, max_new_tokens=3), prompt(chat=chat, max_new_tokens=3)):
        accepted = play(plain, [replace(msg, **asked)], answers=1, **options)[-1][1]
        assert (text.decode(accepted.prompt), accepted.cut) == (expected, True)
    assert encoded[0] < 10_000


def test_a_shorter_prompt_that_is_too_long_is_refused_unseen(text: ModelTokenizer) -> None:
    asked = replace(prompt(text="a" * 400, max_new_tokens=3), truncate=30)
    assert (
        "400 characters are at least 25 prompt tokens"
        in only(play(text, [asked], answers=1)).failure.detail
    )


def test_prompts_have_a_limit_of_their_own(text: ModelTokenizer) -> None:
    refusal = only(play(text, [prompt(text="a" * 9)], answers=1, input_limit=8))
    assert refusal.failure.detail == (
        "This model's maximum context length is 20 tokens. This prompt exceeds the context window:"
        " 9 prompt tokens, limit 8 (--max_req_input_len)"
    )
    assert (refusal.failure.code, refusal.failure.status) == ("context_length_exceeded", 400)
    hopeless = only(play(text, [prompt(text="a" * 129)], answers=1, input_limit=8))
    assert "129 characters are at least 9 prompt tokens, limit 8" in hopeless.failure.detail
    assert isinstance(play(text, [prompt(text="a" * 8)], answers=1, input_limit=8)[-1][1], Accepted)


ABC = "abcdefghijklmnopqrstuvwxyz".replace("q", "")  # 25 tokens of one character


@pytest.mark.parametrize(
    ("mode", "input_limit", "most", "expected"),
    [
        ("head", 8, 3, "stuvwxyz"),
        ("center", 8, 3, "abcdwxyz"),
        ("center", 7, None, "abcwxyz"),
        ("head", None, 15, "vwxyz"),
        ("center", None, 15, "abxyz"),
        ("head", 8, 15, "vwxyz"),
        ("head", None, None, "ghijklmnoprstuvwxyz"),
        ("head", None, 19, "z"),
    ],
)
def test_long_prompts_are_truncated(
    text: ModelTokenizer, mode: str, input_limit: int | None, most: int | None, expected: str
) -> None:
    options = {"truncation": mode, "input_limit": input_limit}
    for asked in (
        prompt(text=ABC, max_new_tokens=most),
        prompt(ids=text.encode(ABC, False).tolist(), max_new_tokens=most),
    ):
        log = play(text, [asked], answers=1, **options)
        accepted, submit = log[-1][1], log[1][1]
        assert text.decode(accepted.prompt) == expected
        assert accepted.cut
        assert submit.prompt == accepted.prompt
        assert log[0][1].prompt_tail == accepted.prompt[-8:]
        room = submit.params.max_new_tokens
        assert room == (LIMIT - len(expected) if most is None else most)


def test_short_prompts_are_not_truncated(text: ModelTokenizer) -> None:
    log = play(text, [prompt(text="abc", max_new_tokens=3)], answers=1, truncation="center")
    assert (text.decode(log[-1][1].prompt), log[-1][1].cut) == ("abc", False)


def test_truncation_cannot_make_room_for_too_many_tokens(text: ModelTokenizer) -> None:
    for most in (20, 30):
        asked = prompt(text="abc", max_new_tokens=most)
        refusal = only(play(text, [asked], answers=1, truncation="head"))
        assert (
            f"3 prompt tokens + {most} max_tokens = {3 + most}, limit 20" in refusal.failure.detail
        )


def test_a_request_may_ask_for_a_shorter_prompt(text: ModelTokenizer) -> None:
    asked = replace(prompt(text="a" * 330 + "bcd", max_new_tokens=3), truncate=4)
    accepted = play(text, [asked], answers=1)[-1][1]
    assert (text.decode(accepted.prompt), accepted.cut) == ("abcd", True)


@pytest.mark.parametrize(
    ("said", "taken", "params"),
    [("hello", b"lo", {}), ("hi", b"i", {}), ("h", b"", {}), ("oé", "é".encode(), {}),
     ("abé", "é".encode(), {}), ("aéb", b"b", {}), ("ab<eos>", b"", {}), ("a<eos>b", b"b", {}),
     ("hello", b"", {"allowed_token_ids": (3,)}), ("hello", b"", {"prompt_logprobs": 0})],
)  # fmt: skip
def test_the_end_of_a_text_is_left_to_the_model(
    text: ModelTokenizer, said: str, taken: bytes, params: dict[str, Any]
) -> None:
    asked = prompt(text=said, max_new_tokens=3, **params)
    log = play(text, [asked], answers=1, heals=True)
    (follow,) = [msg for _, msg in log if isinstance(msg, OpenTextStream)]
    (submit,) = [msg for _, msg in log if isinstance(msg, Submit)]
    (accepted,) = [msg for _, msg in log if isinstance(msg, Accepted)]
    whole = text.encode(said, True)
    assert accepted.prompt == whole
    assert (b"".join(submit.healed), follow.healed) == (taken, taken)
    assert len(submit.healed) == len(taken)
    assert submit.prompt == whole[: len(whole) - len(taken)]
    assert submit.params.max_new_tokens == 3


def test_ids_and_chats_are_not_healed(text: ModelTokenizer) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": None, "kwargs": {}}
    for asked in (prompt(ids=[1, 2, 3]), prompt(chat=chat)):
        log = play(text, [asked], answers=1, heals=True)
        (submit,) = [msg for _, msg in log if isinstance(msg, Submit)]
        assert submit.healed == ()


def test_chat_is_rendered_with_the_models_template(text: ModelTokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    chat = {"messages": messages, "tools": None, "kwargs": {}}
    log = play(text, [prompt(chat=chat)], answers=1)
    assert text.decode(log[-1][1].prompt) == "uhiayo"


def test_a_continued_message_ends_the_prompt(text: ModelTokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    kwargs = {"add_generation_prompt": False, "continue_final_message": True}
    chat = {"messages": messages, "tools": None, "kwargs": kwargs}
    log = play(text, [prompt(chat=chat)], answers=1)
    assert text.decode(log[-1][1].prompt) == "uhiayo"


@pytest.mark.parametrize(
    ("said", "continued", "want"),
    [
        ("<think>", "", "open"),
        ("</think>", "", "closed"),
        ("x", "", "none"),
        ("x", "<think>x", "open"),
    ],
)
def test_the_scheduler_is_told_where_an_answer_begins(
    text: ModelTokenizer, said: str, continued: str, want: str
) -> None:
    kwargs = {"add_generation_prompt": False, "continue_final_message": bool(continued)}
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": continued}]
    chat = {"messages": messages if continued else messages[:1], "tools": None, "kwargs": kwargs}
    asked = replace(prompt(chat=chat), reasoning="think", continued=continued)
    log = play(text, [asked], answers=1, limit=100)
    (submit,) = [msg for _, msg in log if isinstance(msg, Submit)]
    assert submit.thoughts == want


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    bare = make_text(tmp_path, None)
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": None, "kwargs": {}}
    refusal = only(play(bare, [prompt(chat=chat)], answers=1))
    assert "no chat template" in refusal.failure.detail
    assert refusal.failure.status == 400


def test_template_refusal_is_the_clients_answer(tmp_path: Path) -> None:
    strict = make_text(tmp_path, "{{ raise_exception('roles must alternate') }}")
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": None, "kwargs": {}}
    assert (
        "roles must alternate" in only(play(strict, [prompt(chat=chat)], answers=1)).failure.detail
    )


def test_text_is_counted(text: ModelTokenizer) -> None:
    log = play(text, [CountTokens(3, "hello", True), CountTokens(4, "", True)], answers=2)
    told = {msg.query: text.decode(msg.ids) for _, msg in log}
    assert told == {3: "hello", 4: ""}


def test_an_empty_text_is_a_prompt_where_the_tokenizer_begins_with_a_token(tmp_path: Path) -> None:
    text = make_text(tmp_path)
    assert "empty" in only(play(text, [prompt(text="")], answers=1)).failure.detail
    begun = replace(text, _encode=lambda some, special: [7] * special + list(some.encode()))
    accepted = play(begun, [replace(prompt(text=""), add_special_tokens=True)], answers=1)[-1][1]
    assert list(accepted.prompt) == [7]


class Gate:
    """Holds encoding back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.calls: list[str] = []
        original = ModelTokenizer.encode

        def encode(text: ModelTokenizer, some: str, add_special_tokens: bool) -> Any:
            self.calls.append(some)
            self.reached.set()
            assert self.opened.wait(20)
            return original(text, some, add_special_tokens)

        monkeypatch.setattr(ModelTokenizer, "encode", encode)


def test_abort_of_a_pending_prompt_ends_it_without_a_submit(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    async def main() -> list[tuple[str, Any]]:
        log: list[tuple[str, Any]] = []

        def until() -> bool:
            if sum(isinstance(m, Finished) for _, m in log) == 3:
                gate.opened.set()
            return any(isinstance(m, Accepted) and m.rid == 9 for _, m in log)

        async with asyncio.timeout(20):
            system = ActorSystem(encode_local=True)
            system.add(Sink("detokenizer", log, lambda: False))
            system.add(Sink("scheduler", log, lambda: False))
            system.add(Sink("frontend", log, until))
            ref = system.add(
                module.Tokenizer(
                    text, FakeRenderer(text), limit=LIMIT, vocab_size=text.vocab_size, workers=1
                )
            )
            # 1 is in the thread, 2 and 9 wait for it; of the group 3, 4 only 4 goes on
            for msg in (prompt(1, "a"), prompt(2, "b"), prompt(3, "c", more=(4,)), prompt(9, "d")):
                ref.tell(msg)
            running = asyncio.ensure_future(system.run())
            await asyncio.to_thread(gate.reached.wait, 20)
            for rid in (1, 2, 3, 77):
                ref.tell(Abort(rid))
            await running
        return log

    log = uvloop.run(main())
    ended = [m for _, m in log if isinstance(m, Finished)]
    assert [(m.rid, m.reason) for m in ended] == [(r, FinishReason.ABORT) for r in (1, 2, 3)]
    assert [m.rid for _, m in log if isinstance(m, Submit)] == [4, 9]
    assert [m.rid for _, m in log if isinstance(m, OpenTextStream)] == [4, 9]
    assert gate.calls == ["a", "c", "d"]  # 2 never got a thread


@pytest.mark.parametrize("asked", [prompt(1, "a"), prompt(1, "b" * 9), prompt(1, "")])
def test_abort_in_the_batch_of_its_prompt_ends_it(text: ModelTokenizer, asked: Tokenize) -> None:
    log = play(text, [asked, prompt(2, ids=[1]), Abort(1)], answers=2)
    (ended,) = [m for _, m in log if isinstance(m, Finished)]
    assert (ended.rid, ended.reason) == (1, FinishReason.ABORT)
    assert [(type(m), m.rid) for name, m in log if name == "scheduler"] == [(Submit, 2)]


def test_abort_of_what_has_been_submitted_follows_it_to_the_scheduler(text: ModelTokenizer) -> None:
    script = [prompt(1, ids=[1], more=(2,)), Abort(2), prompt(3, ids=[1]), Abort(3), Abort(3)]
    log = play(text, script, answers=2)
    at_scheduler = [(type(m), m.rid) for name, m in log if name == "scheduler"]
    sent = [(Submit, 1), (Submit, 2), (Abort, 2), (Submit, 3), (Abort, 3), (Abort, 3)]
    assert at_scheduler == sent
    assert not [m for _, m in log if isinstance(m, Finished)]  # that is the scheduler's to say


@pytest.mark.parametrize("abort_first", [False, True])
def test_abort_beside_ids_that_are_ready(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch, abort_first: bool
) -> None:
    """Both wait in the mailbox: whichever came first, no Abort comes before its Submit."""
    log: list[tuple[str, Any]] = []

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem()
            for name in ("detokenizer", "scheduler", "frontend"):
                system.add(Sink(name, log, lambda: True))
            actor = module.Tokenizer(text, FakeRenderer(text), limit=LIMIT, vocab_size=256)
            system.add(actor)
            monkeypatch.setattr(actor, "spawn", lambda work: work.close())
            actor.started()
            actor.receive([prompt(1, "a")])
            batch = [PromptEncoded(1, i32([1])), Abort(1)]
            actor.receive(batch[::-1] if abort_first else batch)
            await system.run()

    uvloop.run(main())
    sent = [(name, type(m)) for name, m in log if name != "detokenizer"]
    if abort_first:
        assert sent == [("frontend", Finished)]
    else:
        assert sorted(sent, key=str) == sorted(
            [("scheduler", Submit), ("scheduler", Abort), ("frontend", Accepted)], key=str
        )
        assert sent.index(("scheduler", Submit)) < sent.index(("scheduler", Abort))


def test_late_encoding_is_answered_at_the_limit_and_keeps_its_thread(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    calls_at_refusal: list[list[str]] = []

    def on_answer(msg: Any) -> None:
        if isinstance(msg, Finished):
            calls_at_refusal.append(list(gate.calls))
            gate.opened.set()

    log = play(
        text,
        [prompt(1, "slow"), prompt(2, "next")],
        answers=2,
        on_answer=on_answer,
        time_limit_s=0.3,
    )
    refusal = log[0][1]
    assert "could not be prepared in 0.3 s" in refusal.failure.detail
    assert (refusal.rid, refusal.failure.status) == (1, 400)
    assert calls_at_refusal[0] == ["slow"]  # one thread, still taken
    assert [m.rid for _, m in log if isinstance(m, Accepted)] == [2]


def test_a_fault_in_encoding_costs_one_prompt(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(own: ModelTokenizer, said: str, special: bool) -> array[int]:
        if said == "fault":
            raise ZeroDivisionError
        return real(own, said, special)

    real = ModelTokenizer.encode
    monkeypatch.setattr(ModelTokenizer, "encode", encode)
    log = play(text, [prompt(1, "fault"), prompt(2, "x")], answers=2)
    ended = log[0][1]
    assert (ended.rid, ended.failure.status) == (1, 500)
    assert [m.rid for _, m in log if isinstance(m, Accepted)] == [2]


def test_full_queue_is_429(text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    log = play(
        text,
        [prompt(1, "a"), prompt(2, "b"), prompt(3, "c"), CountTokens(5, "d", True)],
        answers=4,
        on_answer=lambda msg: gate.opened.set(),
        max_queue=1,
    )
    refused = [m for _, m in log if isinstance(m, Finished)]
    assert [(m.rid, m.failure.status, m.failure.code) for m in refused] == [
        (3, 429, "rate_limit_exceeded")
    ]
    (counted,) = [m for _, m in log if isinstance(m, TokensCounted)]
    assert counted.failure.status == 429
    assert "wait to be tokenized, at most 1 may" in counted.failure.detail
    assert [m.rid for _, m in log if isinstance(m, Accepted)] == [1, 2]


def test_lone_surrogate_is_refused(text: ModelTokenizer) -> None:
    """The codec cannot carry one, so this one is told without it."""
    log: list[tuple[str, Any]] = []

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem()
            system.add(Sink("frontend", log, lambda: True))
            ref = system.add(
                module.Tokenizer(text, FakeRenderer(text), limit=LIMIT, vocab_size=256)
            )
            ref.tell(prompt(1, "a\ud800"))
            await system.run()

    uvloop.run(main())
    assert "not valid Unicode" in only(log).failure.detail


def test_seed_of_a_group_wraps_at_64_bits(text: ModelTokenizer) -> None:
    log = play(text, [prompt(1, "a", more=(2,), seed=2**63 - 1)], answers=1)
    seeds = [m.params.seed for _, m in log if isinstance(m, Submit)]
    assert seeds == [2**63 - 1, -(2**63)]


def test_prompts_of_clients_wait_for_a_thread_in_turns(text: ModelTokenizer) -> None:
    """One client's line of texts does not hold up another's single one."""
    mine = [replace(prompt(rid, "hello"), client=1) for rid in range(1, 41)]
    log = play(text, [*mine, replace(prompt(50, "x"), client=2)], answers=41, workers=1)
    accepted = [msg.rid for name, msg in log if name == "frontend"]
    assert accepted == [1, 2, 50, *range(3, 41)], "the first found a free thread, and no line"
    assert {msg.client for name, msg in log if name == "scheduler"} == {1, 2}


def test_texts_to_count_wait_in_turns_too(text: ModelTokenizer) -> None:
    counts = [CountTokens(i, "hello", False, None, 1) for i in range(40)]
    log = play(text, [*counts, CountTokens(50, "x", False, None, 2)], answers=41, workers=1)
    assert [msg.query for _, msg in log][:4] == [0, 1, 50, 2]


def test_a_clients_share_of_the_line_is_half_while_others_wait(text: ModelTokenizer) -> None:
    def asked(rid: int, client: int) -> Tokenize:
        return replace(prompt(rid, "hello"), client=client)

    batch = [asked(1, 1), asked(2, 2), *(asked(rid, 1) for rid in range(3, 9)), asked(9, 3)]
    log = play(text, batch, answers=9, workers=1, max_queue=4)
    refused = {msg.rid: msg for _, msg in log if isinstance(msg, Finished)}
    assert set(refused) == {5, 6, 7, 8}
    assert refused[5].failure.status == 429
    assert "half of them of one client while others wait" in refused[5].failure.detail


def test_a_long_text_takes_several_places(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of short texts stay free for them."""
    monkeypatch.setattr(module, "PLACE_CHARS", 100)
    batch = [prompt(1, "a" * 100), prompt(2, "b" * 250), prompt(3, "c" * 150), prompt(4, "d" * 100)]
    batch += [prompt(5, "e"), prompt(6, "f" * 100)]
    log = play(text, batch, answers=6, workers=1, max_queue=4, limit=1000)
    refused = [msg.rid for _, msg in log if isinstance(msg, Finished)]
    assert refused == [4, 6]  # 1 is in the thread, 2 has three places, 3 the last one and one more
    assert [msg.rid for _, msg in log if isinstance(msg, Accepted)] == [1, 2, 3, 5]


def test_what_has_been_given_up_keeps_nobody_out(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COUNT_S", -1.0)
    monkeypatch.setattr(module.Tokenizer, "_start_some", lambda self: None)
    batch = [CountTokens(1, "a", False), CountTokens(2, "b", False), CountTokens(3, "c", False)]
    log = play(text, batch, answers=2, workers=1, max_queue=2, waiting=1)
    assert [(m.query, m.failure.status) for _, m in log if isinstance(m, TokensCounted)] == [
        (1, 503),
        (2, 503),
    ]


def test_short_texts_do_not_wait_for_long_ones(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two threads one takes no long texts, though nothing else waits."""
    monkeypatch.setattr(module, "PLACE_CHARS", 10)
    gate, encode = threading.Event(), ModelTokenizer.encode

    def held(self: ModelTokenizer, some: str, special: bool) -> Any:
        assert len(some) < 10 or gate.wait(20)
        return encode(self, some, special)

    monkeypatch.setattr(ModelTokenizer, "encode", held)
    batch = [CountTokens(i, "b" * 15, False) for i in range(4)]
    batch += [CountTokens(i, "a", False) for i in range(4, 8)]

    def on_answer(msg: TokensCounted) -> None:
        if msg.query == 7:
            gate.set()

    log = play(text, batch, answers=8, workers=2, on_answer=on_answer)
    assert [msg.query for _, msg in log] == [4, 5, 6, 7, 0, 1, 2, 3]


def test_long_texts_come_to_their_turn_among_short_ones(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PLACE_CHARS", 10)
    texts = ["a", "a", "b" * 15, "a", "a", "b" * 15]
    log = play(text, [CountTokens(i, t, False) for i, t in enumerate(texts)], answers=6, workers=1)
    assert [msg.query for _, msg in log] == [0, 1, 2, 3, 4, 5]


def test_what_has_been_given_up_is_not_counted(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = ModelTokenizer.encode

    def slow(self: ModelTokenizer, some: str, special: bool) -> Any:
        monkeypatch.setattr(module, "COUNT_S", -1.0)  # those that wait have waited too long
        return encode(self, some, special)

    monkeypatch.setattr(ModelTokenizer, "encode", slow)
    batch = [CountTokens(1, "a", False), CountTokens(2, "b", False), prompt(3, "c")]
    log = play(text, batch, answers=3, workers=1)
    told = {m.query: m for _, m in log if isinstance(m, TokensCounted)}
    assert (told[1], told[2].failure.status) == (TokensCounted(1, told[1].ids), 503)
    assert [m.rid for _, m in log if isinstance(m, Accepted)] == [3]  # a prompt waits on


def test_an_abort_gives_the_place_in_the_line_back(
    text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)

    async def main() -> list[tuple[str, Any]]:
        log: list[tuple[str, Any]] = []

        def until() -> bool:
            msgs = [m for name, m in log if name == "frontend"]
            if msgs == [Finished(3, FinishReason.ABORT)]:
                ref.tell(prompt(4, "d"))
                ref.tell(prompt(5, "e"))
            elif isinstance(msgs[-1], Finished):
                gate.opened.set()
            return len(msgs) == 5

        async with asyncio.timeout(20):
            system = ActorSystem(encode_local=True)
            for name in ("detokenizer", "scheduler", "frontend"):
                system.add(Sink(name, log, until if name == "frontend" else lambda: False))
            limits = {"limit": LIMIT, "vocab_size": 256, "workers": 1, "max_queue": 2}
            ref = system.add(module.Tokenizer(text, FakeRenderer(text), **limits))
            for rid in (1, 2, 3):
                ref.tell(prompt(rid, "a"))
            running = asyncio.create_task(system.run())
            await asyncio.to_thread(gate.reached.wait, 20)
            ref.tell(Abort(3))
            await running
        return log

    ended = [m for name, m in uvloop.run(main()) if name == "frontend"]
    assert [m.rid for m in ended if isinstance(m, Finished)] == [3, 5]
    assert [m.failure.status for m in ended if isinstance(m, Finished) and m.failure] == [429]
    assert [m.rid for m in ended if isinstance(m, Accepted)] == [1, 2, 4]
