"""Reasoning before an answer: its limit, the form of what follows, and where both meet."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncllm.constrain.protocol import Constraint, ResampleToken
from asyncllm.constrain.reasoning import ReasoningConstraint, ReasoningMarks, ReasoningTags
from asyncllm.constrain.vocabulary import Vocabulary, bits, passes

EOS = 0
ORDINARY = [bytes([c]) for c in b"abc <>/think{}\n"]
PIECES = [b"</s>", *dict.fromkeys([*ORDINARY, b"<think>", b"</think>", b"\n\n", b"</", b"thin",
          b">{", b">\n", b"ab", b"</think>{", b"CALL"])]  # fmt: skip
IDS = {piece: i for i, piece in enumerate(PIECES)}
VOCAB = Vocabulary(PIECES, len(PIECES) + 3)
THINK = ReasoningTags(
    begins=(b"<think>",), ends=(b"</think>",), close=b"</think>", strays=(b"CALL",)
)
SPELLED = [piece for piece in PIECES if piece not in (b"<think>", b"</think>", b"</think>{")]
RULES = ReasoningMarks(VOCAB, THINK, (EOS, 999))


class Braces(Constraint):
    """``{``, any number of ``a``, ``}``, and then the end."""

    def __init__(self) -> None:
        self.text = b""

    def mask(self) -> bytes:
        pieces = (b"a", b"}") if self.text else (b"{",)
        ids = [EOS] if self.text.endswith(b"}") else [IDS[piece] for piece in pieces]
        return bits(ids, VOCAB.size)

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0

    def accept(self, token: int) -> bool:
        assert passes(self.mask(), token)
        self.text += VOCAB.piece(token)
        return self.text.endswith(b"}")


def thinking(opened: bool, limit: int | None, answer: Constraint | None, rules: ReasoningMarks = RULES) -> ReasoningConstraint:  # fmt: skip
    return ReasoningConstraint(rules, opened=opened, limit=limit, answer=answer)


def spell(text: bytes, *tokens: bytes) -> list[int]:
    """Ids of tokens of the text, single characters where none of ``tokens`` begins."""
    out = []
    while text:
        piece = next((t for t in tokens if text.startswith(t)), text[:1])
        out.append(IDS[piece])
        text = text[len(piece) :]
    return out


def write(constraint: ReasoningConstraint, wanted: Iterable[int], most: int = 60) -> bytes:
    """What comes of a model that wants these tokens, and then ``a`` for ever.

    Where it may not have its way it takes the first token that it may. It goes by the mask of the
    token before as long as that is said to hold, which without a form must be true.
    """
    wants, out = list(wanted), b""
    early: bytes | None = None
    for _ in range(most):
        mask = constraint.mask() if early is None else early
        assert constraint._answer is not None or mask == constraint.mask()
        early = mask if constraint.mask_is_stable_for(1) else None
        wish = wants.pop(0) if wants else IDS[b"a"]
        token = may(mask, wish)
        try:
            whole = constraint.accept(token)
        except ResampleToken:
            assert not passes(constraint.mask(), token)
            token, early = may(constraint.mask(), wish), None
            whole = constraint.accept(token)
        out += VOCAB.piece(token)
        if whole:
            break
    return out


def may(mask: bytes, wish: int) -> int:
    return wish if passes(mask, wish) else next(t for t in range(VOCAB.size) if passes(mask, t))


@pytest.mark.parametrize("limit", [0, 1, 2, 7])
@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_ends_at_its_limit_and_the_answer_goes_on(limit: int, opened: bool) -> None:
    begin = b"" if opened else b"<think>"
    out = write(thinking(opened, limit, None), spell(begin, b"<think>"), 40)
    thoughts, tag, answer = out.removeprefix(begin).partition(b"</think>")
    assert (thoughts, tag, set(answer)) == (b"a" * limit, b"</think>", {ord("a")})


def test_reasoning_that_ends_by_itself_is_left_alone_and_so_is_an_answer_without() -> None:
    for text in (b"ab</think>\n\ncc <think> ab", b"<think> c</think> ab"):
        wanted = spell(text, b"</think>", b"<think>")
        constraint = thinking(not text.startswith(b"<"), 10, None)
        assert write(constraint, wanted, len(wanted)) == text
        assert constraint.mask_is_stable_for(9)
    plain = thinking(False, 2, None)
    assert write(plain, spell(b"ab<think>abc"), 30).startswith(b"ab<think>abcaaaa")
    assert plain.mask_is_stable_for(9)


def test_a_limit_far_away_lets_steps_overlap() -> None:
    constraint = thinking(True, 4, None)
    seen = []
    for _ in range(4):
        seen.append([constraint.mask_is_stable_for(ahead) for ahead in (0, 1, 2)])
        assert constraint.mask() == b""
        constraint.accept(IDS[b"a"])
    assert seen == [[True] * 3, [True] * 3, [True, True, False], [True, False, False]]
    assert constraint.mask() == bits([IDS[b"</think>"]], VOCAB.size)
    assert not constraint.mask_is_stable_for(1)


def test_a_tag_half_written_is_not_begun_again() -> None:
    rules = ReasoningMarks(
        Vocabulary([p if p in SPELLED else b"" for p in PIECES], VOCAB.size), THINK, (EOS,)
    )
    out = write(thinking(True, 5, None, rules), spell(b"abc</th"), 20)
    assert out.startswith(b"abc</think>aaa")


def test_a_call_ends_reasoning_unless_an_answer_of_some_form_must_follow() -> None:
    free = thinking(True, 3, None)
    assert write(free, [IDS[b"CALL"]], 10) == b"CALL" + b"a" * 9
    formed = thinking(True, None, Braces())
    assert not passes(formed.mask(), IDS[b"CALL"])


def test_the_form_begins_behind_reasoning() -> None:
    text = b"ab {</think>\n\n{a}"
    wanted = spell(text, b"</think>", b"\n\n")
    assert write(thinking(True, None, Braces()), wanted) == text
    assert write(thinking(False, None, Braces()), spell(b"<think>", b"<think>") + wanted) == (
        b"<think>" + text
    )


def test_reasoning_does_not_wait_and_what_came_too_early_comes_again() -> None:
    constraint = thinking(True, None, Braces())
    assert constraint.mask_is_stable_for(2)
    constraint.accept(IDS[b"</think>"])
    assert not constraint.mask_is_stable_for(1)
    for refused in (IDS[b"a"], IDS[b"CALL"], EOS):
        with pytest.raises(ResampleToken):
            constraint.accept(refused)
    assert not constraint.accept(IDS[b"\n\n"])
    assert not constraint.accept(IDS[b"{"])
    assert constraint.accept(IDS[b"}"])
    assert not thinking(True, 2, Braces()).mask_is_stable_for(2)


def test_without_reasoning_the_form_holds_at_once() -> None:
    assert write(thinking(False, None, Braces()), spell(b"{a}")) == b"{a}"
    first = thinking(False, None, Braces()).mask()
    assert {i for i in range(VOCAB.size) if passes(first, i)} == {
        IDS[b"{"],
        IDS[b"<think>"],
        IDS[b"<"],
    }


def test_the_limit_brings_the_form() -> None:
    assert write(thinking(True, 3, Braces()), [], 20).startswith(b"aaa</think>{aaa")


@given(
    wanted=st.lists(st.sampled_from(range(len(PIECES))), max_size=30),
    opened=st.booleans(),
    limit=st.one_of(st.none(), st.integers(0, 6)),
)
def test_whatever_a_model_wants_the_answer_has_its_form(
    wanted: list[int], opened: bool, limit: int | None
) -> None:
    out = write(thinking(opened, limit, Braces()), [*wanted, *spell(b"</think>{}")], 100)
    thoughts, tag, answer = (b"<think>" * opened + out).partition(b"</think>")
    if not tag:
        answer, thoughts = (out, b"") if out.startswith(b"{") else (b"{", out)
        assert limit is None or not thoughts
    assert b"</s>" not in thoughts
    assert answer.lstrip().startswith(b"{")
    assert set(answer.strip()) <= set(b"{}a")


HARMONY = ReasoningTags(
    begins=(b"<think>",), ends=(b"</",), close=b"</ab", answer=b"ab"
)  # channels in miniature: "<think>" opens one, "</" ends it, "ab" begins the answer


def test_with_channels_reasoning_may_come_again_and_counts_together() -> None:
    rules = ReasoningMarks(VOCAB, HARMONY, (EOS,))
    text = b"<think>cc</ <think>c</ ab{a}"
    wanted = spell(text, b"<think>", b"</", b"ab")
    assert write(thinking(False, None, Braces(), rules), wanted) == text
    assert write(thinking(False, 2, None, rules), wanted, 12).startswith(b"<think>cc</ab")
    again = spell(b"<think>c</ <think>ccc", b"<think>", b"</")
    assert write(thinking(False, 2, None, rules), again, 12).startswith(b"<think>c</ <think>c</ab")


class TestVocabulary:
    @given(st.lists(st.binary(max_size=3), max_size=30), st.binary(min_size=1, max_size=4))
    def test_ranges_are_those_of_a_plain_search(self, pieces: list[bytes], text: bytes) -> None:
        vocab = Vocabulary([*pieces, b"\xff\xff"], 100)
        every = range(len(vocab.pieces))
        begins = [i for i in every if vocab.piece(i).startswith(text)]
        assert sorted(vocab.beginning_with(text)) == begins
        starts = [i for i in every if vocab.piece(i) and text.startswith(vocab.piece(i))]
        found = vocab.beginnings_of(text)
        assert sorted(found) == starts
        lengths = [len(vocab.piece(i)) for i in found]
        assert lengths == sorted(lengths)
