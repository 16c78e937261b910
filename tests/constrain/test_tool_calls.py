"""Calls among free text: where a mask begins and ends, and tokens that came too early."""

from __future__ import annotations

import pytest

from asyncllm.constrain.protocol import Constraint, ResampleToken
from asyncllm.constrain.reasoning import ReasoningConstraint, ReasoningMarks, ReasoningTags
from asyncllm.constrain.tool_calls import ToolCallConstraint
from asyncllm.constrain.vocabulary import Vocabulary, bits

# one token for each
WORDS = [
    *(
        b"a",
        b"<",
        b"call",
        b">",
        b"<call>",
        b">(",
        b">!",
        b"(",
        b"x",
        b")",
        b"</s>",
        b"<t>",
        b"</t>",
    ),
    b"b<call>(x",
    b">?",
]
VOCAB = Vocabulary(WORDS, len(WORDS))


class Parens(Constraint):
    """A form: ``(``, any number of ``x``, ``)``."""

    def __init__(self) -> None:
        self.text: bytes | None = None

    def piece(self, token: int) -> bytes:
        return WORDS[token]

    def restart(self) -> None:
        self.text = b""

    def begin(self, text: bytes) -> bool:
        assert self.text == b""
        self.text = text
        return text.strip(b"x") == b"("

    def mask(self) -> bytes:
        return bits([WORDS.index(b"x"), WORDS.index(b")")] if self.text else [7], len(WORDS))

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0

    def accept(self, token: int) -> bool:
        assert self.text is not None
        self.text += WORDS[token]
        return WORDS[token] == b")"


def calls(thinking: ReasoningConstraint | None = None) -> ToolCallConstraint:
    return ToolCallConstraint(b"<call>", Parens(), len(WORDS), thinking)


def feed(made: ToolCallConstraint, *words: bytes) -> None:
    for word in words:
        assert not made.accept(WORDS.index(word))


def free(made: ToolCallConstraint) -> bool:
    """Any token may come, and nothing waits."""
    assert made.mask_is_stable_for(2) is (made.mask() == b"")
    return made.mask_is_stable_for(2)


@pytest.mark.parametrize(
    "words",
    [
        (b"<call>",),
        (b"<", b"call", b">"),
        (b"a", b"<", b"<", b"call", b">"),
        (b"<", b"call", b">("),
    ],
)
def test_the_form_holds_from_the_mark_to_its_end(words: tuple[bytes, ...]) -> None:
    made = calls()
    for _ in range(2):
        for word in words[:-1]:
            feed(made, word)
            assert free(made)
        feed(made, words[-1])
        if words[-1] != b">(":
            assert made.mask() == bits([7], len(WORDS))
            feed(made, b"(")
        assert not free(made)
        feed(made, b"x", b")")
        assert free(made)
        feed(made, b"(", b"</s>", b"x")


def test_a_token_that_came_before_its_mask_was_known() -> None:
    made = calls()
    feed(made, b"<call>")
    with pytest.raises(ResampleToken):
        made.accept(WORDS.index(b"a"))
    feed(made, b"(", b"x")
    with pytest.raises(ResampleToken):
        made.accept(WORDS.index(b"</s>"))
    feed(made, b")")
    assert free(made)


def test_a_token_with_the_mark_and_more_that_does_not_fit_is_not_taken_twice() -> None:
    made = calls()
    feed(made, b"<", b"call")
    wrong = [WORDS.index(word) for word in (b">!", b">?")]
    for token in wrong:
        with pytest.raises(ResampleToken):
            made.accept(token)
    others = set(range(len(WORDS))) - set(wrong)
    assert (made.mask(), made.mask_is_stable_for(0), made.mask_is_stable_for(1)) == (
        bits(others, len(WORDS)),
        True,
        False,
    )
    feed(made, b">(")
    assert not free(made)
    feed(made, b")", b"b<call>(x")
    assert not free(made)


def test_marks_in_reasoning_begin_nothing() -> None:
    tags = ReasoningTags(begins=(b"<t>",), ends=(b"</t>",), close=b"</t>")
    rules = ReasoningMarks(VOCAB, tags, (10,))
    made = calls(ReasoningConstraint(rules, opened=False, limit=None, answer=None))
    feed(made, b"<t>", b"<call>", b"a", b"<", b"call")
    assert free(made)
    feed(made, b"</t>", b">", b"a")
    assert free(made)
    feed(made, b"<call>")
    assert not free(made)


def test_a_limit_of_reasoning_is_kept() -> None:
    tags = ReasoningTags(begins=(b"<t>",), ends=(b"</t>",), close=b"</t>")
    rules = ReasoningMarks(VOCAB, tags, (10,))
    made = calls(ReasoningConstraint(rules, opened=True, limit=3, answer=None))
    feed(made, b"a", b"a")
    assert (made.mask_is_stable_for(1), made.mask()) == (False, b"")
    feed(made, b"a")
    assert made.mask() == bits([WORDS.index(b"</t>")], len(WORDS))
    feed(made, b"</t>", b"<call>")
    assert made.mask() == bits([7], len(WORDS))
