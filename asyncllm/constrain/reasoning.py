"""Limits reasoning, and applies the grammar only once the answer begins.

Owns where one output is between its marks. Knows tokens and their bytes; which model writes which
marks is known in :mod:`asyncllm.api.parsing.reasoning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from asyncllm.constrain.protocol import NO_PATH, Constraint, Path, ResampleToken
from asyncllm.constrain.vocabulary import Vocabulary, bits, either, every, passes, without

SPACE = b" \t\r\n"
GAPS = (b"\n", b"\n\n")  # one of these may separate reasoning from a constrained answer


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningTags:
    """How a model writes reasoning.

    Args:
        begins: any of them opens it.
        ends: any of them ends it.
        close: what is written where it must end.
        answer: what an answer begins with; before it reasoning may come again. b"": reasoning
            comes first or not at all, and what follows is the answer.
        strays: end it too, and belong to what follows.
    """

    begins: tuple[bytes, ...]
    ends: tuple[bytes, ...]
    close: bytes
    answer: bytes = b""
    strays: tuple[bytes, ...] = ()


class ReasoningMarks:
    """What the tags mean in one vocabulary.

    Attributes:
        before: the mask of reasoning that an answer of a given form is to follow: no end of the
            output, no stray, no token that ends reasoning and has a piece of the answer in it.
    """

    def __init__(self, vocab: Vocabulary, tags: ReasoningTags, eos_ids: tuple[int, ...]) -> None:
        self.vocab, self.tags = vocab, tags
        self.last = (tags.answer,) if tags.answer else tags.ends  # the answer follows one of these
        self.keep = max(map(len, (*tags.begins, *tags.ends, *tags.strays, *self.last))) - 1
        banned = {i for i in eos_ids if i < vocab.size}
        for stray in tags.strays:
            banned.update(vocab.containing(stray))
        for mark in self.last:
            banned.update(
                i for i in vocab.containing(mark) if self.contaminates(vocab.piece(i), mark)
            )
        self.before = without(every(vocab.size), banned)
        gaps = [] if tags.answer else [i for i, p in enumerate(vocab.pieces) if p in GAPS]
        self.gap = bits(gaps, vocab.size)

    @staticmethod
    def contaminates(text: bytes, mark: bytes) -> bool:
        """Whether more than white space follows the mark in ``text``."""
        return bool(text.partition(mark)[2].strip(SPACE))


class _At(Enum):
    BEFORE = auto()  # reasoning may begin, or the answer
    INSIDE = auto()
    CLOSING = auto()  # the limit is reached: what closes it is being written
    GAP = auto()  # behind reasoning, or before any, and the answer's mark has not come
    ANSWER = auto()


class ReasoningConstraint(Constraint):
    """A :class:`asyncllm.constrain.protocol.Constraint`.

    Reasoning continues without waiting for tokens that are not known yet, as long as its limit is
    far. So the token after its end may have been sampled as part of it: if it does not fit,
    :meth:`accept` raises ResampleToken.

    Args:
        opened: the prompt ends inside reasoning; else the output may begin with it.
        limit: tokens of reasoning, its tags not counted; None: no limit.
        answer: constrains the text after reasoning; None: it is free.
    """

    def __init__(
        self, rules: ReasoningMarks, *, opened: bool, limit: int | None, answer: Constraint | None
    ) -> None:
        self._rules, self._tags, self._vocab = rules, rules.tags, rules.vocab
        self._limit, self._answer = limit, answer
        self._count = 0
        self._text = b""  # the end of what has come, as far as a mark may be in it
        self._rest = b""  # to be written
        self._gap = False
        self._at = _At.GAP if self._tags.answer else _At.BEFORE
        if opened:
            self._open(b"")

    @property
    def inside(self) -> bool:
        """The next token is reasoning, or closes it."""
        return self._at in (_At.INSIDE, _At.CLOSING)

    def slow(self, token: int | None) -> bool:
        if self._answer is None:
            return False
        answers = token is None or self._at in (_At.BEFORE, _At.ANSWER)
        return answers and self._answer.slow(token)

    def start(self) -> None:
        if self._answer is not None:
            self._answer.start()

    def mask_is_stable_for(self, ahead: int) -> bool:
        if ahead == 0:
            return True
        if self._at is _At.ANSWER:
            return self._answer is None or (
                not self._gap and self._answer.mask_is_stable_for(ahead)
            )
        if self._at is _At.CLOSING or (self._answer is not None and self._at is _At.BEFORE):
            return False
        return self._limit is None or self._count + ahead < self._limit

    def mask(self) -> bytes:
        if self._at is _At.CLOSING:
            return bits(self._vocab.beginnings_of(self._rest)[-1:], self._vocab.size)
        if self._answer is None:
            return b""
        if self._at is _At.ANSWER:
            mask = self._answer.mask()
            return either(mask, self._rules.gap) if self._gap else mask
        if self._at is _At.BEFORE:
            tags = bits(self._tag_tokens(), self._vocab.size)
            return tags if self._text else either(self._answer.mask(), tags)
        return self._before()

    def accept(self, token: int) -> bool:
        if self._answer is not None and not passes(self.mask(), token):
            raise ResampleToken
        piece = self._vocab.piece(token)
        match self._at:
            case _At.ANSWER:
                return self._go_on(token)
            case _At.CLOSING:
                self._write(self._rest[len(piece) :])
            case _At.BEFORE:
                return self._lead(token, piece)
            case _At.INSIDE:
                self._count += 1
                self._inside(self._text + piece)
            case _At.GAP:
                self._between(self._text + piece)
        return False

    def look_ahead(self, guess: Path, most: int) -> None:
        if self._answer is not None and self._answers:
            self._answer.look_ahead(guess, most)

    @property
    def path(self) -> Path:
        return self._answer.path if self._answer is not None and self._answers else NO_PATH

    @property
    def _answers(self) -> bool:
        """What comes next is the answer's."""
        return self._at is _At.ANSWER and not self._gap

    def _lead(self, token: int, piece: bytes) -> bool:
        if self._answer is not None and not self._text and passes(self._answer.mask(), token):
            self._at = _At.ANSWER
            return self._answer.accept(token)
        text = (self._text + piece).lstrip(SPACE)
        for begin in self._tags.begins:
            if text.startswith(begin):
                self._open(text[len(begin) :])
                return False
        if any(begin.startswith(text) for begin in self._tags.begins):
            self._text = text
        else:
            self._at = _At.ANSWER
        return False

    def _tag_tokens(self) -> list[int]:
        """Tokens that continue a begin tag."""
        tags = [begin for begin in self._tags.begins if begin.startswith(self._text)]
        return [i for tag in tags for i in self._vocab.beginnings_of(tag[len(self._text) :])]

    def _open(self, text: bytes) -> None:
        self._at = _At.INSIDE
        self._inside(text)

    def _inside(self, text: bytes) -> None:
        tags = self._tags
        strays = tags.strays if self._answer is None else ()
        answers = (tags.answer,) if tags.answer else ()
        if end := _first(text, (*tags.ends, *strays, *answers)):
            self._text = b""
            self._count = max(self._count - 1, 0)  # the token of the tag
            if tags.answer and end != tags.answer:
                self._at = _At.GAP
                self._between(text.partition(end)[2])
            else:
                self._begin_answer()
            return
        self._text = text[-self._rules.keep :]
        if self._limit is not None and self._count >= self._limit:
            self._at = _At.CLOSING
            begun = max(_overlaps(text, tags.close), default=0)
            self._write(tags.close[begun:])

    def _between(self, text: bytes) -> None:
        if _first(text, (self._tags.answer,)):
            self._begin_answer()
        elif begin := _first(text, self._tags.begins):
            self._open(text.partition(begin)[2])
        else:
            self._text = text[-self._rules.keep :]

    def _write(self, rest: bytes) -> None:
        self._rest = rest
        if not self._vocab.beginnings_of(rest):
            self._begin_answer()

    def _begin_answer(self) -> None:
        self._at = _At.ANSWER
        self._gap = self._answer is not None and any(self._rules.gap)

    def _go_on(self, token: int) -> bool:
        if self._answer is None:
            return False
        gap, self._gap = self._gap, False
        if gap and passes(self._rules.gap, token) and not passes(self._answer.mask(), token):
            return False
        return self._answer.accept(token)

    def _before(self) -> bytes:
        """``ReasoningMarks.before`` less what would end a mark that has begun, and spoil it."""
        spoiling = []
        for mark in self._rules.last:
            for begun in _overlaps(self._text, mark):
                rest = mark[begun:]
                tokens = self._vocab.beginning_with(rest)
                spoiling += [
                    i for i in tokens if ReasoningMarks.contaminates(self._vocab.piece(i), rest)
                ]
        return without(self._rules.before, spoiling) if spoiling else self._rules.before


def _first(text: bytes, marks: tuple[bytes, ...]) -> bytes:
    """The mark that comes first in ``text``; b"": none does."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found)[1] if found else b""


def _overlaps(text: bytes, mark: bytes) -> list[int]:
    """How many bytes at the end of ``text`` may be the beginning of ``mark``, not all of it."""
    return [n for n in range(1, min(len(text), len(mark) - 1) + 1) if mark.startswith(text[-n:])]
