"""Compiles grammars with llguidance, caches them, and follows one output by each.

Owns the compiled grammars. Knows texts and token ids; knows no requests and no tensors. Nothing
else knows the library.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from time import thread_time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from asyncllm.constrain.grammars import ebnf, regex
from asyncllm.constrain.grammars.calls import calls_grammar
from asyncllm.constrain.grammars.writing import COMPACT, FeasibilityChecks, schema_grammar
from asyncllm.constrain.likely_tokens import LikelyTokens
from asyncllm.constrain.protocol import NO_PATH, Path
from asyncllm.constrain.spelling import Spelling
from asyncllm.errors import RequestError, ServerBusy, StartupError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Bits = NDArray[np.int32]

MAX_KEPT: Final = 256
MAX_KEPT_BYTES: Final = 1 << 30  # of kept grammars, at their largest
MAX_TERMINAL_BYTES: Final = 128 << 20  # of what is known of terminals
# What the library takes is not to be asked for. Measured with hostile grammars: each character of
# one takes up to 100 bytes; a state that outputs lead to 1,150, and 7 for each terminal.
CHAR_BYTES: Final = 100
STATE_BYTES: Final = 1200
TERMINAL_BYTES: Final = 8
LEAST_STATES: Final = 3_000  # of a grammar; a text that it spells takes one for each character
MORE_STATES: Final = 4  # times as many where these do not suffice
MAX_STATES_BYTES: Final = 64 << 20
BYTES: Final = 256  # tokens after the vocabulary, of one byte each, for text that is not a token

# What a token of an ambiguous grammar takes grows with the output, so that the first that takes
# longer is hardly over it; what the library counts bounds a single one.
MAX_STEP_S: Final = 0.05  # of CPU time
TOO_SLOW: Final = "the grammar is too ambiguous to be followed: simplify it"
MAX_STEP_ITEMS: Final = 40_000  # its time grows with the square
MAX_STEP_FUEL: Final = 1_000_000
MAX_START_FUEL: Final = 250_000
MAX_ROW_ITEMS: Final = 20_000
MAX_STATES: Final = 50_000  # of a terminal by itself
MAX_SIZE: Final = 500_000
MAX_TRANSLATE_S: Final = 1.0  # of CPU time

# Tokens are followed ahead while that takes less than this, and where it has been quick so far.
AHEAD_S: Final = 0.001
QUICK_S: Final = 0.0005
LEAST_CHANCE: Final = 0.1  # of a token that is followed
# how often what the grammar forces is spelled as the tokenizer spells it, before that is known
SPELLED: Final = 0.9
WEIGHT: Final = 4.0  # of that, in tokens
FADE: Final = 0.96  # of an observation with each later one

OBJECT: Final = '{"type": "object"}'  # the schema of the kind "json"
NAMES: Final = {"json": "JSON", "schema": "the JSON schema", "compact": "the JSON schema",
                "regex": "the regular expression", "ebnf": "the EBNF grammar",
                "choice": "the choices", "calls": "the tools' parameters"}  # fmt: skip
_LIMIT: Final = re.compile(r"fuel|too (complex|many|large|big)|limit|exceed", re.IGNORECASE)
# a limit of the states that matchers of one grammar share: none of them can go on
_USED_UP: Final = re.compile(r"too many (states|expressions)")


class TooSlow(RequestError):
    """A grammar is so ambiguous that following one output would hold up all others."""


class StatesUsedUp(TooSlow):
    """Nobody can go on with the states that matchers of a grammar share: see ``Matcher``."""


class GrammarEngine:
    """Compiles; :meth:`build` may run in any thread, everything else on the loop's.

    Args:
        pieces: bytes of every token in text; b"": it never is text.
        vocab_size: width of the logits; ids without a piece never come.
        end_ids: tokens that end an output.
        special: ids of special tokens, which are not text either
        marks: but for these, with which calls are written.
        encode: the tokenizer, for texts without special tokens around them; None: what a grammar
            forces is not guessed.

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
        encode: Callable[[str], Sequence[int]] | None = None,
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
        self._spelling = Spelling(encode, self._call_texts)
        self._letters = self._tokenizer([], [])
        self._terminals: dict[str, LLMatcher | None] = {}
        self._terminal_bytes = 0
        self._kept: OrderedDict[tuple[str, str], CompiledGrammar] = OrderedDict()

    def _tokenizer(self, texts: list[bytes], ends: list[int]) -> LLTokenizer:
        told = self._lib.TokenizerWrapper(_TokenizerAdapter(texts, ends))
        made: LLTokenizer = self._lib.LLTokenizer(told, eos_token=ends or None)
        return made

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether it is kept; who asks is about to use it."""
        if key not in self._kept:
            return False
        self._kept.move_to_end(key)
        return True

    def __len__(self) -> int:
        return len(self._kept)

    def build(self, kind: str, text: str) -> CompiledGrammar:
        """Compile. ``kind`` as in ``core.request.GRAMMARS``.

        Raises:
            RequestError: the text is not of its kind, no text at all can match it, or outputs
                would take too long to follow.
        """
        try:
            grammar = self._translate(kind, text)
        except RecursionError:
            raise RequestError(f"{NAMES[kind]}: references are nested too deeply") from None
        tokens = self._call_tokens if kind == "calls" else self._tokens
        compiled = CompiledGrammar(grammar, partial(self._matcher, tokens, grammar))
        if compiled.matcher.is_error():
            raise _refusal(kind, compiled.matcher.get_error())
        try:
            self._follow(compiled).start()
        except TooSlow as error:
            raise RequestError(f"{NAMES[kind]}: {error.message}") from error
        except RequestError as error:
            raise RequestError(f"{NAMES[kind]}: no text at all can match") from error
        return compiled

    def _matcher(self, tokens: LLTokenizer, grammar: str, max_states: int) -> LLMatcher:
        limits = self._lib.LLParserLimits(
            max_items_in_row=MAX_ROW_ITEMS,
            initial_lexer_fuel=MAX_START_FUEL,
            step_lexer_fuel=MAX_STEP_FUEL,
            step_max_items=MAX_STEP_ITEMS,
            max_lexer_states=max_states,
            max_grammar_size=MAX_SIZE,
            verbose_errors=False,
        )
        # every way to spell a forced text in tokens may come: the model knows which is usual
        told = f'%llguidance {{"no_forcing": true}}\n{grammar}'
        made: LLMatcher = self._lib.LLMatcher(tokens, told, log_level=0, limits=limits)
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
                return calls_grammar(json.loads(text.partition("\n")[2]), self._checks(kind))
            case "compact":
                return schema_grammar(text, self._checks(kind), COMPACT)
            case _:
                pass
        return schema_grammar(OBJECT if kind == "json" else text, self._checks(kind))

    def _checks(self, kind: str) -> FeasibilityChecks:
        """For one grammar, which may take MAX_TRANSLATE_S from now on."""
        until = thread_time() + MAX_TRANSLATE_S

        def check_time() -> None:
            if thread_time() > until:
                raise RequestError(
                    f"{NAMES[kind]}: it takes longer than {MAX_TRANSLATE_S:g} s to translate:"
                    " simplify it"
                )

        def exists(terminal: str) -> bool:
            check_time()
            return self._terminal(terminal) is not None

        def matches(terminal: str, text: str) -> bool:
            check_time()
            return self._matches(terminal, text)

        return FeasibilityChecks(matches, exists, check_time)

    def _terminal(self, terminal: str) -> LLMatcher | None:
        """At the beginning of a terminal; None: it matches nothing. Raises RequestError."""
        known = self._terminals  # other threads may put another in its place
        if terminal not in known:
            matcher = self._matcher(self._letters, f"start: A\nA: {terminal}", MAX_STATES)
            if matcher.is_error():
                raise _refusal("schema", matcher.get_error())
            matcher.compute_bitmask()
            self._terminal_bytes += len(terminal) * CHAR_BYTES
            if len(known) > MAX_KEPT or self._terminal_bytes > MAX_TERMINAL_BYTES:
                known, self._terminal_bytes = {}, 0
                self._terminals = known
            known[terminal] = None if matcher.is_error() else matcher
        return known[terminal]

    def _matches(self, terminal: str, text: str) -> bool:
        if (start := self._terminal(terminal)) is None:
            return False
        matcher = start.deep_copy()
        data = text.encode(errors="surrogatepass")
        self._terminal_bytes += len(data) * STATE_BYTES  # which stay, for the terminal's next text
        fits = matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()
        if matcher.is_error():  # a limit, so that nothing is known, nor can be with this matcher
            self._terminals.pop(terminal, None)
            raise _refusal("schema", matcher.get_error())
        return fits

    def keep(self, kind: str, text: str, compiled: CompiledGrammar) -> None:
        """Remember."""
        self._kept.setdefault((kind, text), compiled)
        self._forget()

    def _forget(self) -> None:
        """Those not used for longest go where there are too many, or they may take too much
        memory; outputs that follow one go on."""
        kept = self._kept
        taken = sum(each.num_bytes for each in kept.values())
        while len(kept) > 1 and (len(kept) > MAX_KEPT or taken > MAX_KEPT_BYTES):
            _, gone = kept.popitem(last=False)
            taken -= gone.num_bytes

    def constrain(self, kind: str, text: str) -> Matcher:
        """A fresh constraint of a kept grammar.

        Raises:
            ServerBusy: it has been forgotten since it was compiled.
        """
        if (compiled := self._kept.get((kind, text))) is None:
            raise ServerBusy("the compiled grammar had to make room for others, try again")
        self._kept.move_to_end((kind, text))
        self._forget()  # they may have grown
        return self._follow(compiled)

    def _follow(self, compiled: CompiledGrammar) -> Matcher:
        return Matcher(compiled, self._all, self._others, self._spelling)


class CompiledGrammar:
    """A grammar, and the library's matcher at its beginning.

    Args:
        text: as the library reads it.
        make: compiles it, for outputs that lead to up to a number of states.

    Attributes:
        matcher: all copies of one share the states that outputs have led to.
        states: how many there may be.
        most: how many there may ever be.
    """

    __slots__ = ("_chars", "_state_bytes", "make", "matcher", "most", "states")

    def __init__(self, text: str, make: Callable[[int], LLMatcher]) -> None:
        self._chars = len(text)
        # each terminal is in a line of its own
        self._state_bytes = STATE_BYTES + TERMINAL_BYTES * text.count("\nT")
        self.most = MAX_STATES_BYTES // self._state_bytes
        self.states = min(LEAST_STATES + self._chars, self.most)
        self.make, self.matcher = make, make(self.states)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes at most, about."""
        return self._chars * CHAR_BYTES + self.states * self._state_bytes


class Matcher:
    """Follows one output; a :class:`asyncllm.constrain.protocol.Constraint`.

    Where one output has led to more states than there may be, or to one that takes too much work,
    none that shares them can go on. Then each follows its tokens again, with other states, of which
    there may be more each time.

    Args:
        grammar: its matcher stays at the beginning; its tokens are the vocabulary and 256 bytes.
        every, others: all tokens, and all but the end tokens, as bits.
        spelling: knows the bytes of all tokens, for calls.

    :meth:`start` and :meth:`accept` raise RequestError where no token can follow, TooSlow where to
    find out takes too much work.
    """

    def __init__(
        self, grammar: CompiledGrammar, every: Bits, others: Bits, spelling: Spelling
    ) -> None:
        self._grammar, self._every, self._others = grammar, every, others
        self._beginning = grammar.matcher
        self._matcher = self._beginning.deep_copy()
        self._said = array("i")
        self._spelling = spelling
        self._mask = b""
        self._ahead: _Ahead | None = None
        self._worked_s = 0.0  # by the last token that was not foreseen
        self._right, self._tried = SPELLED * WEIGHT, WEIGHT  # of what the grammar forced

    def slow(self, token: int | None) -> bool:
        return self._ahead is None or not self._ahead.foresees(token)

    def start(self) -> None:
        self._advance()

    def mask(self) -> bytes:
        return self._mask

    def mask_is_stable_for(self, ahead: int) -> bool:
        return ahead == 0

    def piece(self, token: int) -> bytes:
        """The bytes of a token in calls."""
        return self._spelling.pieces[token]

    def restart(self) -> None:
        """Follow another output, from its beginning."""
        self._beginning = self._grammar.matcher
        self._matcher = self._beginning.deep_copy()  # one that has failed is not to be reset
        self._ahead, self._said = None, array("i")
        self._advance()

    def begin(self, text: bytes) -> bool:
        """Advance by ``text``. False: the output cannot continue with it."""
        first = len(self._spelling.pieces)
        try:
            return not self._advance(*(first + byte for byte in text))
        except TooSlow:
            raise
        except RequestError:
            return False

    def accept(self, token: int) -> bool:
        if (ahead := self._ahead) is not None:
            right = ahead.foresees(token)
            if ahead.is_forced:
                self._right = self._right * FADE + right
                self._tried = self._tried * FADE + 1
            if right:
                self._said.append(token)
                self._mask = ahead.pop()
                return False
            self._ahead, self._matcher = None, ahead.here()
        return self._advance(token)

    def look_ahead(self, guess: Path, most: int) -> None:
        if self._worked_s > QUICK_S or self._ahead is not None:
            return
        begun, mask, chance = thread_time(), self._mask, 1.0
        ahead = _Ahead(self._matcher)
        likely = LikelyTokens(guess, self._spelling, self._right / self._tried)
        while len(ahead.path.tokens) < most and thread_time() - begun < AHEAD_S:
            if (found := likely.next(mask, ahead.matcher.compute_ff_bytes)) is None:
                break
            token, rate, forced = found
            chance *= rate
            if chance < LEAST_CHANCE:
                break
            ahead.spoilt = True
            if not ahead.matcher.consume_token(token) or ahead.matcher.is_stopped():
                break
            try:
                mask, whole = self._allowed(ahead.matcher)
            except RequestError:
                break
            if whole:  # an output ends with that token, so nothing would come after it
                break
            ahead.add(token, chance, mask, forced)
        if ahead.path.tokens:
            ahead.path.num_predicted = min(
                guess.num_predicted, likely.num_guessed, len(ahead.path.tokens)
            )
            self._ahead = ahead

    @property
    def path(self) -> Path:
        return NO_PATH if self._ahead is None else self._ahead.rest

    def _advance(self, *tokens: int) -> bool:
        """Follow ``tokens``, and make the next mask. True: no token but an end can come, and one
        may."""
        begun = thread_time()
        self._said.extend(tokens)
        try:
            whole = self._take(*tokens)
            self._worked_s = thread_time() - begun
            if self._worked_s > MAX_STEP_S * max(len(tokens), 1):
                raise TooSlow(TOO_SLOW)
        except StatesUsedUp:
            whole = self._anew()
            self._worked_s = thread_time() - begun
        return whole

    def _anew(self) -> bool:
        """As :meth:`_advance`, after all tokens so far: with the states that the grammar has got in
        the meantime, else with new ones, which it gets if they suffice."""
        grammar = self._grammar
        fresh, states = grammar.matcher, grammar.states
        while True:
            if fresh is self._beginning:  # used up
                states = min(states * MORE_STATES, grammar.most)
                fresh = grammar.make(states)
            self._beginning, self._matcher = fresh, fresh.deep_copy()
            try:
                whole = self._take(*self._said)
            except StatesUsedUp:
                if states == grammar.most and fresh is not grammar.matcher:
                    raise
                continue
            grammar.matcher, grammar.states = fresh, states
            return whole

    def _take(self, *tokens: int) -> bool:
        """Whether nothing but an end may come after ``tokens``; else makes the mask."""
        if tokens and not self._matcher.consume_tokens([*tokens]):
            raise self._too_slow(self._matcher) or RequestError(
                f"token {tokens[-1]} does not continue the output as its grammar wants"
            )
        if tokens and self._matcher.is_stopped():
            return True
        self._mask, whole = self._allowed(self._matcher)
        return whole

    def _allowed(self, matcher: LLMatcher) -> tuple[bytes, bool]:
        """The next mask, and whether no token but an end can come, and one may."""
        words = np.frombuffer(matcher.compute_bitmask(), np.int32)
        if matcher.is_error():
            raise self._too_slow(matcher) or self._nothing()
        bits = words[: len(self._every)] & self._every
        whole = not (bits & self._others).any()
        if whole and not bits.any() and not matcher.is_accepting():
            raise self._nothing()
        return bits.tobytes(), whole

    def _too_slow(self, matcher: LLMatcher) -> TooSlow | None:
        """The reason why a matcher failed, if that is unbounded work."""
        reason, error = matcher.stop_reason(), matcher.get_error()
        shared = self._beginning.deep_copy()  # a token that leads to a state too many "fails parse"
        shared.compute_bitmask()
        if _USED_UP.search(f"{error} {shared.get_error()}"):
            return StatesUsedUp(TOO_SLOW)
        if reason in ("ParserTooComplex", "LexerTooComplex") or _LIMIT.search(error):
            return TooSlow(TOO_SLOW)
        return None

    @staticmethod
    def _nothing() -> RequestError:
        return RequestError("no token of this model can continue the output as its grammar wants")


class _Ahead:
    """Tokens that are likely to come, followed by a copy of what follows the output.

    A copy, since what has failed once by a limit cannot be taken back.

    Attributes:
        path: with those that have come since.
        matcher: after the last of them.
        spoilt: but it has been given a token more.
    """

    def __init__(self, before: LLMatcher) -> None:
        self._before = before
        self.matcher, self.spoilt = before.deep_copy(), False
        self.path = Path()
        self._forced = bytearray()
        self._num = 0  # of tokens that have come

    def add(self, token: int, chance: float, mask: bytes, forced: bool) -> None:
        """``matcher`` has been given ``token``."""
        self.spoilt = False
        self.path.tokens.append(token)
        self.path.chances.append(chance)
        self.path.masks.append(mask)
        self._forced.append(forced)

    def foresees(self, token: int | None) -> bool:
        """Whether ``token`` comes next."""
        return self._num < len(self._forced) and self.path.tokens[self._num] == token

    @property
    def is_forced(self) -> bool:
        """Whether the next token is here because it spells what is forced."""
        return self._num < len(self._forced) and bool(self._forced[self._num])

    def pop(self) -> bytes:
        """The next token has come: the mask after it."""
        self._num += 1
        return self.path.masks[self._num - 1]

    @property
    def rest(self) -> Path:
        """Without the tokens that have come."""
        path, num = self.path, self._num
        if not num:
            return path
        before = path.chances[num - 1]
        chances = [chance / before for chance in path.chances[num:]]
        predicted = max(path.num_predicted - num, 0)
        return Path(path.tokens[num:], chances, path.masks[num:], predicted)

    def here(self) -> LLMatcher:
        """After the tokens that have come."""
        if self._num == len(self._forced) and not self.spoilt:
            return self.matcher
        if self._num:
            self._before.consume_tokens(self.path.tokens[: self._num])
        return self._before


class _TokenizerAdapter:
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


def _refusal(kind: str, error: str) -> RequestError:
    """The library's message without the source that it was given."""
    text = re.sub(r"^at \d+\(\d+\): ", "", error.strip())
    text = re.split(r"\n *\d+ \| |\n<state>", text)[0].replace("\n", " ")
    text = text if len(text) <= 300 else text[:297] + "..."
    return RequestError(f"{NAMES[kind]} cannot be compiled: {text}")
