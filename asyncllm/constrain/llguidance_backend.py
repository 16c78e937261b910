"""Compiles grammars with llguidance, caches them, and follows one output by each.

Owns the compiled grammars. Knows texts and token ids; knows no requests and no tensors. Nothing
else knows the library.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from time import thread_time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from asyncllm.constrain.grammars import ebnf, regex
from asyncllm.constrain.grammars.calls import calls_grammar
from asyncllm.constrain.grammars.writing import Possible, schema_grammar
from asyncllm.errors import RequestError, ServerBusy, StartupError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Bits = NDArray[np.int32]

MAX_KEPT: Final = 256
MAX_KEPT_CHARS: Final = 16 << 20  # of grammars, as the library reads them
BYTES: Final = 256  # tokens after the vocabulary, of one byte each, for text that is not a token

# What a token of an ambiguous grammar takes grows with the output, so that the first that takes
# longer is hardly over it; what the library counts bounds a single one.
MAX_STEP_S: Final = 0.05  # of CPU time
TOO_SLOW: Final = "the grammar is too ambiguous to be followed: simplify it"
MAX_STEP_ITEMS: Final = 40_000  # its time grows with the square
MAX_STEP_FUEL: Final = 200_000
MAX_START_FUEL: Final = 250_000
MAX_ROW_ITEMS: Final = 20_000
MAX_STATES: Final = 50_000
MAX_SIZE: Final = 500_000

NAMES: Final = {"json": "JSON", "schema": "the JSON schema", "regex": "the regular expression",
                "ebnf": "the EBNF grammar", "choice": "the choices", "calls": "the tools' parameters"}  # fmt: skip
_LIMIT: Final = re.compile(r"fuel|too (complex|many|large|big)|limit|exceed", re.IGNORECASE)


class TooSlow(RequestError):
    """A grammar is so ambiguous that following one output would hold up all others."""


class Grammars:
    """Compiles; :meth:`build` may run in any thread, everything else on the loop's.

    Args:
        pieces: bytes of every token in text; b"": it never is text.
        vocab_size: width of the logits; ids without a piece never come.
        end_ids: tokens that end an output.
        special: ids of special tokens, which are not text either
        marks: but for these, with which calls are written.

    Raises:
        StartupError: llguidance cannot be imported.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        vocab_size: int,
        end_ids: Sequence[int],
        special: Collection[int] = frozenset(),
        marks: Collection[str] = (),
    ) -> None:
        self._lib = library()
        texts = [*pieces[:vocab_size], *([b""] * (vocab_size - len(pieces)))]
        table = [b"" if i in special else text for i, text in enumerate(texts)]
        spelled = {mark.encode() for mark in marks}
        self._call_texts = [
            text if text in spelled else plain for text, plain in zip(texts, table, strict=True)
        ]
        ends = sorted(i for i in end_ids if i < vocab_size)
        self._tokens = self._call_tokens = self._tokenizer(table, ends)
        if self._call_texts != table:
            self._call_tokens = self._tokenizer(self._call_texts, ends)
        known = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        known[:vocab_size] = 1
        self._all = np.packbits(known, bitorder="little").view(np.int32)
        known[ends] = 0
        self._others = np.packbits(known, bitorder="little").view(np.int32)
        self._limits = self._lib.LLParserLimits(
            max_items_in_row=MAX_ROW_ITEMS,
            initial_lexer_fuel=MAX_START_FUEL,
            step_lexer_fuel=MAX_STEP_FUEL,
            step_max_items=MAX_STEP_ITEMS,
            max_lexer_states=MAX_STATES,
            max_grammar_size=MAX_SIZE,
            verbose_errors=False,
        )
        self._letters = self._tokenizer([], [])
        self._terminals: dict[str, LLMatcher | None] = {}
        self._possible = Possible(self._matches, lambda term: self._terminal(term) is not None)
        self._kept: OrderedDict[tuple[str, str], CompiledGrammar] = OrderedDict()
        self._kept_chars = 0

    def _tokenizer(self, texts: list[bytes], ends: list[int]) -> LLTokenizer:
        told = self._lib.TokenizerWrapper(_Vocabulary(texts, ends))
        made: LLTokenizer = self._lib.LLTokenizer(told, eos_token=ends or None)
        return made

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def build(self, kind: str, text: str) -> CompiledGrammar:
        """Compile. ``kind`` as in ``core.request.GRAMMARS``.

        Raises:
            RequestError: the text is not of its kind, no text at all can match it, or outputs
                would take too long to follow.
        """
        grammar = self._translate(kind, text)
        tokens = self._call_tokens if kind == "calls" else self._tokens
        matcher = self._matcher(tokens, grammar)
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error())
        compiled = CompiledGrammar(matcher, len(grammar))
        try:
            self._follow(compiled).start()
        except TooSlow as error:
            raise RequestError(f"{NAMES[kind]}: {error.message}") from error
        except RequestError as error:
            raise RequestError(f"{NAMES[kind]}: no text at all can match") from error
        return compiled

    def _matcher(self, tokens: LLTokenizer, grammar: str) -> LLMatcher:
        # every way to spell a forced text in tokens may come: the model knows which is usual
        told = f'%llguidance {{"no_forcing": true}}\n{grammar}'
        made: LLMatcher = self._lib.LLMatcher(tokens, told, log_level=0, limits=self._limits)
        return made

    def _translate(self, kind: str, text: str) -> str:
        match kind:
            case "regex":
                return f"start: A\nA: /{regex.raw(regex.full(regex.parse(text)))}/"
            case "ebnf":
                return ebnf.to_lark(text)
            case "choice":
                return choices(json.loads(text))
            case "calls":
                return calls_grammar(json.loads(text.partition("\n")[2]), self._possible)
            case _:
                pass
        return schema_grammar('{"type": "object"}' if kind == "json" else text, self._possible)

    def _terminal(self, terminal: str) -> LLMatcher | None:
        """At the beginning of a terminal; None: it matches nothing. Raises RequestError."""
        if terminal not in self._terminals:
            matcher = self._matcher(self._letters, f"start: A\nA: {terminal}")
            if matcher.is_error():
                raise _refusal("schema", matcher.get_error())
            matcher.compute_bitmask()
            if len(self._terminals) > MAX_KEPT:
                self._terminals.clear()
            self._terminals[terminal] = None if matcher.is_error() else matcher
        return self._terminals[terminal]

    def _matches(self, terminal: str, text: str) -> bool:
        if (start := self._terminal(terminal)) is None:
            return False
        matcher = start.deep_copy()
        data = text.encode(errors="surrogatepass")
        return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()

    def keep(self, kind: str, text: str, compiled: CompiledGrammar) -> None:
        """Remember; the one not used for longest goes when there are too many."""
        if (kind, text) in self._kept:
            return
        self._kept[kind, text] = compiled
        self._kept_chars += compiled.chars
        while len(self._kept) > MAX_KEPT or (
            self._kept_chars > MAX_KEPT_CHARS and len(self._kept) > 1
        ):
            _, gone = self._kept.popitem(last=False)
            self._kept_chars -= gone.chars

    def constrain(self, kind: str, text: str) -> Matcher:
        """A fresh constraint of a kept grammar.

        Raises:
            ServerBusy: it has been forgotten since it was compiled.
        """
        if (compiled := self._kept.get((kind, text))) is None:
            raise ServerBusy("the compiled grammar had to make room for others, try again")
        self._kept.move_to_end((kind, text))
        return self._follow(compiled)

    def _follow(self, compiled: CompiledGrammar) -> Matcher:
        return Matcher(compiled.matcher, self._all, self._others, self._call_texts)


class CompiledGrammar:
    """A grammar that nobody has followed yet.

    Args:
        chars: its length, as the library reads it.
    """

    __slots__ = ("chars", "matcher")

    def __init__(self, matcher: LLMatcher, chars: int) -> None:
        self.matcher, self.chars = matcher, chars


class Matcher:
    """Follows one output; a :class:`asyncllm.constrain.protocol.Constraint`.

    Args:
        start: the library's, and stays at the beginning; its tokens are the vocabulary and 256
            bytes.
        every, others: all tokens, and all but the end tokens, as bits.
        texts: bytes of all tokens, for calls.

    :meth:`start` and :meth:`accept` raise RequestError where no token can follow, TooSlow where to
    find out takes too much work.
    """

    def __init__(self, start: LLMatcher, every: Bits, others: Bits, texts: Sequence[bytes]) -> None:
        self._start, self._every, self._others = start, every, others
        self._matcher = start.deep_copy()
        self._texts = texts
        self._bits = np.zeros(len(every), np.int32)

    def slow(self, token: int | None) -> bool:
        return True

    def start(self) -> None:
        self._fill()

    def mask(self) -> bytes:
        return self._bits.tobytes()

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0

    def piece(self, token: int) -> bytes:
        """The bytes of a token in calls."""
        return self._texts[token]

    def restart(self) -> None:
        """Follow another output, from its beginning."""
        self._matcher = self._start.deep_copy()  # one that has failed is not to be reset
        self._fill()

    def begin(self, text: bytes) -> bool:
        """Advance by ``text``. False: the output cannot continue with it."""
        first = len(self._texts)
        return self._matcher.consume_tokens([first + byte for byte in text]) and not self._fill()

    def accept(self, token: int) -> bool:
        begun = thread_time()
        if not self._matcher.consume_token(token):
            raise _too_slow(self._matcher) or RequestError(
                f"token {token} does not continue the output as its grammar wants"
            )
        return self._matcher.is_stopped() or self._fill(begun)

    def _fill(self, begun: float | None = None) -> bool:
        """Bits of the next token. True: no token but an end can come, and one may."""
        begun = thread_time() if begun is None else begun
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error():
            raise _too_slow(self._matcher) or self._nothing()
        if thread_time() - begun > MAX_STEP_S:
            raise TooSlow(TOO_SLOW)
        np.bitwise_and(words[: len(self._every)], self._every, out=self._bits)
        if (self._bits & self._others).any():
            return False
        if self._bits.any() or self._matcher.is_accepting():
            return True
        raise self._nothing()

    @staticmethod
    def _nothing() -> RequestError:
        return RequestError("no token of this model can continue the output as its grammar wants")


class _Vocabulary:
    """What the library asks of a tokenizer. It never has to split a text."""

    bos_token_id = None

    def __init__(self, texts: list[bytes], ends: Sequence[int]) -> None:
        self.tokens = [*texts, *(bytes([byte]) for byte in range(BYTES))]
        self.eos_token_id = ends[0] if ends else 0
        self.special_token_ids = list(ends)

    def __call__(self, text: bytes) -> list[int]:
        return [len(self.tokens) - BYTES + byte for byte in text]


def library() -> Any:
    """llguidance. Raises StartupError: it is not there."""
    try:
        import llguidance
    except ImportError as error:
        raise StartupError(
            f"--output_constraint_mode llguidance: {error} (none: no constrained output)"
        ) from error
    return llguidance


def choices(texts: Iterable[str]) -> str:
    """The engine's grammar of one of ``texts``."""
    made = "|".join(regex.raw(regex.literal(text)) for text in texts)
    return f"start: A\nA: /{made}/"


def _too_slow(matcher: LLMatcher) -> TooSlow | None:
    """The reason why a matcher failed, if that is unbounded work."""
    told = matcher.stop_reason(), matcher.get_error()
    if told[0] in ("ParserTooComplex", "LexerTooComplex") or _LIMIT.search(told[1]):
        return TooSlow(TOO_SLOW)
    return None


def _refusal(kind: str, error: str) -> RequestError:
    """The library's message without the source that it was given."""
    text = re.sub(r"^at \d+\(\d+\): ", "", error.strip())
    text = re.split(r"\n *\d+ \| |\n<state>", text)[0].replace("\n", " ")
    text = text if len(text) <= 300 else text[:297] + "..."
    return RequestError(f"{NAMES[kind]} cannot be compiled: {text}")
