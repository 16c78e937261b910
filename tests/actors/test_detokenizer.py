"""Detokenizer: text of many streams in short turns, stop strings, one Finished each."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from asyncllm.actors.base import Actor
from asyncllm.actors.detokenizer import LOOK_EVERY, Detokenizer
from asyncllm.actors.system import ActorSystem
from asyncllm.codec import i32, i64
from asyncllm.core.request import FinishReason
from asyncllm.messages import (
    Finished,
    GroupRemoved,
    OpenTextStream,
    RequestsOrphaned,
    ResubmitRequests,
    StopHit,
    TextDelta,
    Tokens,
    TokenTexts,
)
from asyncllm.records import Failure, Logprobs
from asyncllm.text import ModelTokenizer, load_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    """Byte-level, one id per byte and <eos>."""
    folder: Path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<eos>", "<call>")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return load_tokenizer(str(folder))


def one_by_one(msg: Any) -> list[Any]:
    """With a TextDelta for each request of a TokenTexts."""
    if not isinstance(msg, TokenTexts):
        return [msg]
    rows = zip(msg.rids, msg.tokens, msg.texts, msg.logprobs, strict=True)
    return [
        TextDelta(rid, text, i32([token]), (text,), None if isnan(x) else scores(x), None)
        for rid, token, text, x in rows
    ]


def scores(*chosen: float) -> Logprobs:
    return Logprobs(chosen=array("f", chosen))


class Sink(Actor[Any]):
    def __init__(
        self, name: str, log: list[Any], until: Callable[[], bool], *, expand: bool = True
    ) -> None:
        super().__init__(name)
        self.log, self.until, self.expand = log, until, expand

    def receive(self, batch: list[Any]) -> None:
        self.log.extend(chain.from_iterable(map(one_by_one, batch)) if self.expand else batch)
        if self.until():
            self.system.stop()


def play(
    text: ModelTokenizer,
    script: list[Any],
    *,
    finished: int,
    budget_s: float = 0.0005,
    expand: bool = True,
) -> tuple[list[Any], list[Any]]:
    """What frontend and scheduler got. A ``list`` in the script arrives as one batch.

    ``expand``: with a TextDelta for each request of a TokenTexts.
    """
    front: list[Any] = []
    sched: list[Any] = []

    def until() -> bool:
        return sum(isinstance(m, Finished) for m in front) == finished

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem(encode_local=True)
            system.add(Sink("scheduler", sched, until))
            system.add(Sink("frontend", front, until, expand=expand))
            detokenizer = Detokenizer(text, budget_s=budget_s)
            ref = system.add(detokenizer)

            async def feed() -> None:
                for batch in script:
                    for msg in batch if isinstance(batch, list) else [batch]:
                        ref.tell(msg)
                    await asyncio.sleep(0)  # one round of the loop: the batch is delivered
                    await asyncio.sleep(0)  # and another for what came of it

            feeding = asyncio.create_task(feed())
            await system.run()
            await feeding
            assert not detokenizer._streams

    uvloop.run(main())
    return front, sched


def follow(
    rid: int, *stop: str, tail: array[int] | None = None, print_eos: bool = False
) -> OpenTextStream:
    return OpenTextStream(rid, i32(tail or []), stop, True, print_eos)


def sequenced(rid: int, *sequences: list[int]) -> OpenTextStream:
    return OpenTextStream(rid, i32([]), (), True, False, (), tuple(map(tuple, sequences)))


def tokens(
    rids: list[int],
    ids: list[int],
    ends: list[int] | None = None,
    logprobs: Logprobs | None = None,
    prompt: tuple[tuple[int, Logprobs], ...] = (),
) -> Tokens:
    return Tokens(1, i64(rids), i32(ids), bytes(ends or [0] * len(ids)), logprobs, prompt)


def done(rid: int, num_tokens: int, reason: FinishReason = FinishReason.LENGTH) -> Finished:
    return Finished(rid, reason, None, 1, num_tokens)


def said(front: list[Any], rid: int) -> str:
    return "".join(m.text for m in front if isinstance(m, TextDelta) and m.rid == rid)


def healed(text: ModelTokenizer, prompt: str, again: str) -> OpenTextStream:
    return OpenTextStream(7, text.encode(prompt, False), (), True, False, healed=again.encode())


def test_what_a_prompt_says_already_is_neither_shown_nor_counted(text: ModelTokenizer) -> None:
    ids = list(text.encode("ünd ok", False))
    scores = Logprobs(chosen=array("f", [-1.5]))
    script = [
        healed(text, "h", "ün"),
        *[tokens([7], [i], logprobs=scores) for i in ids],
        done(7, 7),
    ]
    front, _ = play(text, script, finished=1)
    assert said(front, 7) == "d ok"
    deltas = front[:-1]
    assert sum(len(d.ids) for d in deltas) == 4
    assert sum(len(d.logprobs) for d in deltas) == 4
    assert "".join(p for d in deltas for p in d.pieces) == "d ok"


def test_a_token_that_says_more_than_the_prompt_shows_the_rest(text: ModelTokenizer) -> None:
    long = replace(text, pieces=[*text.pieces])
    long.pieces[text.encode("x", False)[0]] = b"so"  # a token of two characters, for its length
    (token,) = text.encode("x", False)
    script = [healed(text, "h", "x"), tokens([7], [token]), tokens([7], [token]), done(7, 2)]
    front, _ = play(long, script, finished=1)
    assert said(front, 7) == "x"
    assert [len(d.ids) for d in front[:-1]] == [1, 1]


def test_text_comes_token_by_token_and_finished_last(text: ModelTokenizer) -> None:
    ids = list(text.encode("hé", False))
    script = [follow(7), *[tokens([7], [i]) for i in ids], done(7, 3)]
    front, sched = play(text, script, finished=1)
    deltas, end = front[:-1], front[-1]
    assert [d.text for d in deltas] == ["h", "", "é"]
    assert [d.ids.tolist() for d in deltas] == [[i] for i in ids]
    assert [d.pieces for d in deltas] == [("h",), ("",), ("é",)]
    assert end == done(7, 3)
    assert sched == []


def test_several_steps_in_one_turn_become_one_delta(text: ModelTokenizer) -> None:
    ids = list(text.encode("abc", False))
    script = [[follow(1), *[tokens([1], [i]) for i in ids]], done(1, 3)]
    front, _ = play(text, script, finished=1)
    assert [(m.text, m.pieces) for m in front[:-1]] == [("abc", ("a", "b", "c"))]


def test_unfinished_character_is_flushed_before_finished(text: ModelTokenizer) -> None:
    part = list(text.encode("é", False))[:1]
    front, _ = play(text, [[follow(1), tokens([1], part), done(1, 1)]], finished=1)
    assert [(m.text, m.pieces) for m in front[:-1]] == [("\ufffd", ("\ufffd",))]
    late, _ = play(text, [follow(1), tokens([1], part), done(1, 1)], finished=1)
    assert said(late, 1) == "\ufffd"
    assert isinstance(late[-1], Finished)


def test_character_begun_in_the_prompt_is_finished(text: ModelTokenizer) -> None:
    first, second = text.encode("é", False)
    script = [follow(1, tail=i32([first])), tokens([1], [second]), done(1, 1)]
    front, _ = play(text, script, finished=1)
    assert said(front, 1) == "é"


def test_ending_token_is_hidden_unless_asked_for(text: ModelTokenizer) -> None:
    (a,), eos = text.encode("a", False), text.eos_id
    assert eos is not None
    script: list[Any] = [follow(1), follow(2, print_eos=True)]
    script += [tokens([1, 2], [a, a]), tokens([1, 2], [eos, eos], [1, 1])]
    script += [done(1, 2, FinishReason.STOP), done(2, 2, FinishReason.STOP)]
    front, _ = play(text, script, finished=2)
    assert said(front, 1) == "a"
    assert said(front, 2) == "a<eos>"
    hidden = [m for m in front if isinstance(m, TextDelta) and m.rid == 1][-1]
    assert (hidden.ids.tolist(), hidden.pieces) == ([eos], ("",))


@pytest.mark.parametrize("at_once", [False, True])
def test_what_ended_the_text_is_in_it_where_it_is_asked_for(
    text: ModelTokenizer, at_once: bool
) -> None:
    ids = list(text.encode("one STOP two", False))
    (b,), eos = text.encode("b", False), text.eos_id
    assert eos is not None

    def opened(rid: int, *stop: str) -> OpenTextStream:
        return OpenTextStream(rid, i32([]), stop, True, False, include_stop=True)

    steps = [tokens([1] * 12, ids)] if at_once else [tokens([1], [i]) for i in ids]
    script: list[Any] = [opened(1, "STOP"), *steps, done(1, 12), opened(2), opened(3)]
    script += [
        tokens([2, 3], [b, eos], [1, 1]),
        done(2, 1, FinishReason.STOP),
        done(3, 1, FinishReason.STOP),
    ]
    front, _ = play(text, script, finished=3)
    assert said(front, 1) == "one STOP"
    assert said(front, 2) == "b"  # a stop token
    assert said(front, 3) == ""  # a special one


def test_special_tokens_are_shown_by_name(text: ModelTokenizer) -> None:
    eos, call = text.encode("<eos><call>", False)
    script = [follow(1), OpenTextStream(2, i32([]), (), True, False, ("<call>", "</call>"))]
    script += [tokens([1, 2], [call, call]), tokens([1, 2], [eos, eos])]
    script += [tokens([1, 2], [call, call], [1, 1]), done(1, 3), done(2, 3)]
    front, _ = play(text, script, finished=2)
    assert (said(front, 1), said(front, 2)) == ("", "<call>")  # one that ends is no part of it


def test_stop_string_over_tokens_is_cut_and_told_once(text: ModelTokenizer) -> None:
    ids = list(text.encode("one STOP two", False))
    script = [follow(1, "STOP"), *[tokens([1], [i]) for i in ids], done(1, 12)]
    front, sched = play(text, script, finished=1)
    assert said(front, 1) == "one "
    assert sched == [StopHit(1, 8)]
    end = front[-1]
    assert (end.reason, end.num_tokens, end.cached_len) == (FinishReason.STOP, 8, 1)
    shown = [m for m in front if isinstance(m, TextDelta)]
    assert array("i", [i for m in shown for i in m.ids]) == i32(ids[:8])
    assert "".join(p for m in shown for p in m.pieces) == "one STOP"


def test_stop_string_found_with_the_end_needs_no_stop_hit(text: ModelTokenizer) -> None:
    ids = list(text.encode("aXb", False))
    end = Finished(1, FinishReason.LENGTH, num_tokens=3, drafted=4, accepted=3)
    front, sched = play(text, [[follow(1, "X"), tokens([1] * 3, ids), end]], finished=1)
    assert said(front, 1) == "a"
    assert (front[-1].reason, front[-1].num_tokens) == (FinishReason.STOP, 2)
    assert (front[-1].drafted, front[-1].accepted) == (4, 2)
    assert sched == []


def test_error_after_a_stop_string_is_a_stop(text: ModelTokenizer) -> None:
    (x,) = text.encode("X", False)
    error = Finished(1, FinishReason.ERROR, Failure("no room", "code", 500), 0, 4)
    front, _ = play(text, [follow(1, "X"), tokens([1], [x]), error], finished=1)
    assert front[-1] == Finished(1, FinishReason.STOP, None, 0, 1, "X")


def test_stop_sequence_over_steps_is_cut_and_told_once(text: ModelTokenizer) -> None:
    ids = list(text.encode("aaab!", False))
    script = [sequenced(1, ids[1:4]), *[tokens([1], [i]) for i in ids], done(1, 5)]
    front, sched = play(text, script, finished=1)
    deltas = [m for m in front if isinstance(m, TextDelta)]
    # the third a could still be the second of the sequence, the second its first
    assert [(m.text, len(m.ids)) for m in deltas] == [("a", 1), ("", 3)]
    assert array("i", [i for m in deltas for i in m.ids]) == i32(ids[:4])
    assert deltas[-1].pieces == ("", "", "")
    assert sched == [StopHit(1, 4)]
    assert (front[-1].reason, front[-1].num_tokens, front[-1].stop) == (FinishReason.STOP, 4, "")


@pytest.mark.parametrize("at_once", [False, True])
def test_beginning_of_a_stop_sequence_comes_out_when_it_fails(
    text: ModelTokenizer, at_once: bool
) -> None:
    ids = list(text.encode("ababc☃", False))
    steps = [tokens([1], [i], logprobs=Logprobs(chosen=_f32(-n))) for n, i in enumerate(ids)]
    script = [sequenced(1, [*ids[:2], ids[4], ids[4]]), *steps, done(1, len(ids))]
    front, sched = play(text, [script] if at_once else script, finished=1)
    deltas = [m for m in front if isinstance(m, TextDelta)]
    assert (said(front, 1), sched) == ("ababc☃", [])
    assert array("i", [i for m in deltas for i in m.ids]) == i32(ids)
    assert [x for m in deltas for x in m.logprobs.chosen] == [-n for n in range(len(ids))]
    assert front[-1] == done(1, len(ids))


def test_end_inside_the_beginning_of_a_stop_sequence_shows_it(text: ModelTokenizer) -> None:
    a, b = text.encode("ab", False)
    script = [sequenced(1, [a, b, a]), tokens([1], [a]), tokens([1], [b]), done(1, 2)]
    front, _ = play(text, script, finished=1)
    assert (said(front, 1), front[-1].reason) == ("ab", FinishReason.LENGTH)


def test_stop_sequence_found_with_the_end_needs_no_stop_hit(text: ModelTokenizer) -> None:
    ids = list(text.encode("xab!", False))
    script = [[sequenced(1, ids[1:3]), tokens([1] * 4, ids), done(1, 4)]]
    front, sched = play(text, script, finished=1)
    assert (said(front, 1), sched) == ("x", [])
    assert (front[-1].reason, front[-1].num_tokens) == (FinishReason.STOP, 3)


def test_stop_string_before_a_stop_sequence_wins(text: ModelTokenizer) -> None:
    ids = list(text.encode("xSTOPab", False))
    follow_both = OpenTextStream(1, i32([]), ("STOP",), True, False, (), (tuple(ids[-2:]),))
    front, _ = play(text, [follow_both, tokens([1] * 7, ids), done(1, 7)], finished=1)
    assert (said(front, 1), front[-1].stop, front[-1].num_tokens) == ("x", "STOP", 5)


def test_text_before_a_stop_sequence_is_whole(text: ModelTokenizer) -> None:
    half, a, b = *text.encode("é", False)[:1], *text.encode("ab", False)
    both = OpenTextStream(1, i32([]), ("ab!",), True, False, (), ((b, b),))
    script = [both, tokens([1] * 4, [half, a, b, b]), done(1, 4)]
    front, _ = play(text, script, finished=1)
    assert said(front, 1) == "\ufffda"


def test_held_back_text_comes_out_at_the_end(text: ModelTokenizer) -> None:
    ids = list(text.encode("a STO", False))
    front, sched = play(text, [follow(1, "STOP"), tokens([1] * 5, ids), done(1, 5)], finished=1)
    assert said(front, 1) == "a STO"
    assert front[-1].reason == FinishReason.LENGTH
    assert sched == []


def test_single_tokens_of_a_step_share_a_message(text: ModelTokenizer) -> None:
    """In order; what is held back, or has alternatives, comes alone."""
    a, b = text.encode("ab", False)
    wide = Logprobs(1, _f32(-1, -2, -3), i32([a, a, a]), _f32(-1, -1, -1))
    script = [
        [follow(1), follow(2, "zz"), follow(3)],
        tokens([3, 2, 1], [a, b, b], logprobs=scores(-1, -2, nan)),
        tokens([3, 2, 1], [a, b, b], logprobs=wide),
        tokens([1, 3], [a, b]),
        [done(1, 3), done(2, 2), done(3, 3)],
    ]
    front, _ = play(text, script, finished=3, expand=False)
    alike = [m for m in front if isinstance(m, TokenTexts)]
    assert [(m.rids.tolist(), m.tokens.tolist(), m.texts) for m in alike] == [
        ([3, 1], [a, b], ("a", "b")),
        ([1, 3], [a, b], ("a", "b")),
    ]
    assert alike[0].logprobs.tolist() == [-1, -inf], "NaN is none that a model has computed"
    assert all(map(isnan, alike[1].logprobs))
    assert [m.rid for m in front if isinstance(m, TextDelta)] == [2, 3, 2, 1]


def test_unknown_requests_are_ignored(text: ModelTokenizer) -> None:
    (a,) = text.encode("a", False)
    script = [done(9, 0), tokens([9, 1], [a, a]), follow(1), tokens([9, 1], [a, a]), done(1, 1)]
    front, _ = play(text, script, finished=1)
    assert {m.rid for m in front} == {1}
    assert said(front, 1) == "a"


def test_logprobs_travel_with_their_tokens_as_wide_as_all_have_them(text: ModelTokenizer) -> None:
    a, b = text.encode("ab", False)
    wide = Logprobs(2, _f32(-1, -2), i32([1, 2, 3, 4]), _f32(-1, -3, -2, -4))
    slim = Logprobs(1, _f32(-5), i32([5]), _f32(-5))
    first, second = tokens([8, 1], [a, a], logprobs=wide), tokens([1], [b], logprobs=slim)
    batch = [follow(1), first, second, done(1, 2)]
    front, _ = play(text, [batch], finished=1)
    delta = front[0]
    assert delta.logprobs == Logprobs(1, _f32(-2, -5), i32([3, 5]), _f32(-2, -5))


def test_logprobs_of_others_do_not_make_half_columns(text: ModelTokenizer) -> None:
    a, b = text.encode("ab", False)
    shared = Logprobs(chosen=_f32(-1, -2))
    batch = [follow(1), tokens([1, 8], [a, a], logprobs=shared), tokens([1], [b]), done(1, 2)]
    front, _ = play(text, [batch], finished=1)
    assert (front[0].text, front[0].logprobs) == ("ab", None)


def test_prompt_logprobs_of_all_chunks_come_with_the_first_tokens(text: ModelTokenizer) -> None:
    (a,) = text.encode("a", False)
    one = (1, Logprobs(1, _f32(-1, -2), i32([1, 2]), _f32(-1, -2)))
    two = (1, Logprobs(1, _f32(-3), i32([3]), _f32(-3)))
    script = [follow(1), tokens([], [], prompt=(one,)), tokens([1], [a], prompt=(two,))]
    front, _ = play(text, [*script, tokens([1], [a]), done(1, 2)], finished=1)
    whole = Logprobs(1, _f32(-1, -2, -3), i32([1, 2, 3]), _f32(-1, -2, -3))
    assert [m.prompt for m in front[:-1]] == [whole, None]
    scored, _ = play(text, [follow(1), tokens([], [], prompt=(one,)), done(1, 0)], finished=1)
    assert [m.prompt for m in scored[:-1]] == [one[1]]


def test_turns_are_short_fair_and_lose_nothing(text: ModelTokenizer) -> None:
    rids = list(range(50))
    ids = list(text.encode("ab", False))
    others: list[int] = []

    class Other(Actor[Any]):
        """Counts its own turns between the detokenizer's."""

        def receive(self, batch: list[Any]) -> None:
            others.append(len(seen))
            if len(others) < 30:
                self.put(batch[0])

    seen: list[Any] = []

    async def main() -> None:
        async with asyncio.timeout(20):
            system = ActorSystem()
            detokenizer = system.add(Detokenizer(text, budget_s=0.0))
            until = lambda: sum(isinstance(m, Finished) for m in seen) == 50  # noqa: E731
            system.add(Sink("frontend", seen, until))
            system.add(Sink("scheduler", [], lambda: False))
            other = system.add(Other("other"))
            for rid in rids:
                detokenizer.tell(follow(rid))
            detokenizer.tell(tokens(rids, [ids[0]] * 50))
            detokenizer.tell(tokens(rids, [ids[1]] * 50))
            for rid in rids:
                detokenizer.tell(done(rid, 2))
            other.tell("go")
            await system.run()

    uvloop.run(main())
    assert [m.rid for m in seen if isinstance(m, TextDelta)] == rids
    assert all(said(seen, rid) == "ab" for rid in rids)
    steps = [b - a for a, b in pairwise(others) if b - a]
    assert len(steps) > 5
    assert max(steps) <= 2 * LOOK_EVERY  # a TextDelta and a Finished each


def _f32(*values: float) -> array[float]:
    return array("f", values)


@pytest.mark.parametrize(
    ("stop", "wanted", "num"),
    [
        ("<call>", "ab", 3),
        ("b<call>", "a", 3),
        ("<call>\n", "ab", 4),
        ("<call>x", "ab\n", 5),  # never comes: ends by <eos>, which nobody asked for
        ("call", "ab\n", 5),  # text of a token that is not shown
        ("<eos>", "ab\n", 5),
        ("a", "", 1),
    ],
)
@pytest.mark.parametrize("ends", [0, 1])
def test_the_text_of_a_hidden_token_stops(
    text: ModelTokenizer, stop: str, wanted: str, num: int, ends: int
) -> None:
    ids = [*text.encode("ab<call>\n<eos>", False)]
    script: list[Any] = [follow(7, "zz", stop)]
    script += [tokens([7], [i], [ends if i == ids[-1] else 0]) for i in ids]
    front, sched = play(text, [*script, done(7, 5, FinishReason.STOP)], finished=1)
    assert said(front, 7) == wanted
    found = stop if stop not in ("<call>x", "call") else ""
    assert (front[-1].stop, front[-1].num_tokens) == (found, num)
    assert (StopHit(7, num) in sched) is bool(found)


def test_the_text_of_a_shown_token_stops(text: ModelTokenizer) -> None:
    ids = [*text.encode("ab<call>cd", False)]
    shown = OpenTextStream(7, i32([]), ("<call>c",), False, False)
    front, _ = play(text, [shown, tokens([7] * 5, ids), done(7, 5)], finished=1)
    assert said(front, 7) == "ab"


def test_of_a_lost_groups_requests_those_begin_again_of_which_nothing_has_come(
    text: ModelTokenizer,
) -> None:
    """Each ends once; what the group said before its end, and comes later, does not count."""
    late = [
        replace(tokens([1, 2], text.encode("no", False)), endpoint=1),
        replace(done(1, 1), endpoint=1),
    ]
    script = [
        [follow(1), follow(2), follow(3, "o"), follow(4)],
        [replace(tokens([2, 3], text.encode("go", False)), endpoint=1)],
        [
            GroupRemoved(1, 1, "it was killed"),
            RequestsOrphaned(i64([1, 2, 3, 9]), "it was killed"),
            *late,
        ],
        [tokens([1, 4], text.encode("ab", False)), done(1, 1), done(4, 1)],
    ]
    front, sched = play(text, script, finished=4)
    assert [said(front, rid) for rid in (1, 2, 3, 4)] == ["a", "g", "", "b"]
    assert sched == [StopHit(3, 1), ResubmitRequests(i64([1]), i64([2, 3, 9]))]
    ends = {msg.rid: msg for msg in front if isinstance(msg, Finished)}
    detail = "the ranks that generated this answer are lost (it was killed); try again"
    assert ends[2].failure == Failure(detail, "group_lost", 503)
    assert ends[3].reason is FinishReason.STOP, "it had its stop string"
    assert [ends[rid].reason for rid in (1, 4)] == [FinishReason.LENGTH] * 2
