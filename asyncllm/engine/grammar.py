"""Grammars of one vocabulary: compiling them with xgrammar, keeping them, following one output.

Owns the compiled grammars. Knows texts and token ids; knows no requests and no tensors.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from time import thread_time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asyncllm.core.request import Constraint
from asyncllm.errors import RequestError, ServerBusy, StartupError

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, GrammarCompiler

Bits = NDArray[np.int32]

MAX_DEPTH = 64  # of a schema: the compiler's time grows fast with it
MAX_KEPT = 256
MAX_KEPT_BYTES = 256 << 20
MAX_STEP_S = 0.5  # of the loop's CPU time for one token
TRIED = 16  # tokens of an output that is tried when a grammar has been compiled
INTEGER_DIGITS = 16
EXPONENT_DIGITS = 2

# keywords that the compiler does not enforce: the output could break them
UNENFORCED = frozenset(
    ("multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "not", "if",
     "dependentRequired", "dependentSchemas")
)  # fmt: skip
NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions"))
VALUES = frozenset(("enum", "const", "default", "examples"))

# what may stand around a value between tags, in EBNF: parsers take the rest for a part of it
TAG_SPACE = {"qwen_xml": r"([\n])", "glm_xml": '("")'}
# In the compiler's own EBNF: literals and regular expressions, which stay as they are; a repeated
# class of digits; a repeated rule.
TOKENS = re.compile(
    r'"(?:[^"\\]|\\.)*"|(?P<digits>\[0-9\])\*|\[(?:[^\]\\]|\\.)*\]|(?P<rule>\w+)\{(?P<low>\d+), -1\}'
)
DIGIT_RULE = re.compile(r"^(\w+) ::= \(\(\[0-9\]\)\)$", re.MULTILINE)


class Grammars:
    """Compiles; :meth:`build` may run in any thread, everything else on the loop's.

    Args:
        pieces: bytes of every token in text; b"": it never is text.
        vocab_size: width of the logits; ids without a piece never come.
        end_ids: tokens that end an output.
        special: ids of special tokens, which are no text either
        marks: but for these, with which calls are written.

    Raises:
        StartupError: xgrammar cannot be imported.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        vocab_size: int,
        end_ids: Sequence[int],
        special: Collection[int] = frozenset(),
        marks: Collection[str] = (),
    ) -> None:
        # imported here: it takes seconds, and --output_constraint_mode none does without
        try:
            import xgrammar
        except ImportError as error:
            raise StartupError(
                f"--output_constraint_mode xgrammar: {error} (none: no constrained output)"
            ) from error
        self._lib = xgrammar
        texts = [*pieces[:vocab_size], *([b""] * (vocab_size - len(pieces)))]
        table = [b"" if i in special else text for i, text in enumerate(texts)]
        spelled = {mark.encode() for mark in marks}
        self._call_texts = [
            text if text in spelled else plain for text, plain in zip(texts, table, strict=True)
        ]
        ends = sorted(i for i in end_ids if i < vocab_size)

        def compiler(table: list[bytes]) -> GrammarCompiler:
            info = xgrammar.TokenizerInfo(
                table, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=ends
            )
            return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

        self._compiler = self._call_compiler = compiler(table)
        if self._call_texts != table:
            self._call_compiler = compiler(self._call_texts)
        known = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        known[:vocab_size] = 1
        self._all = np.packbits(known, bitorder="little").view(np.int32)
        known[ends] = 0
        self._others = np.packbits(known, bitorder="little").view(np.int32)
        self._kept: OrderedDict[tuple[str, str], CompiledGrammar] = OrderedDict()
        self._kept_bytes = 0

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def build(self, kind: str, text: str) -> CompiledGrammar:
        """Compile; the GIL is released. ``kind`` as in ``core.request.GRAMMARS``.

        Raises:
            RequestError: the text is not of its kind, no text at all can match it, or outputs
                would take too long to follow.
        """
        try:
            compiled = self._compile(kind, text)
        except RuntimeError as error:
            raise RequestError(f"{NAMES[kind]} cannot be compiled: {_cause(error)}") from error
        self._try(self._follow(compiled))
        return compiled

    def _try(self, matcher: Matcher) -> None:
        """Some output, so that a grammar is refused here and not on the loop. Raises TooSlow."""
        matcher.start()
        rng = np.random.default_rng(0)
        for _ in range(TRIED):
            allowed = np.frombuffer(matcher.mask(), np.int32) & self._others
            tokens = np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little"))
            try:
                if not len(tokens) or matcher.accept(int(rng.choice(tokens))):
                    return
            except TooSlow:
                raise
            except RequestError:
                return  # another output may do

    def keep(self, kind: str, text: str, compiled: CompiledGrammar) -> None:
        """Remember; the one not used for longest goes when there are too many."""
        if (kind, text) in self._kept:
            return
        self._kept[kind, text] = compiled
        self._kept_bytes += _size(compiled)
        while len(self._kept) > MAX_KEPT or (
            self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1
        ):
            _, gone = self._kept.popitem(last=False)
            self._kept_bytes -= _size(gone)

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
        matcher = self._lib.GrammarMatcher(compiled)
        return Matcher(matcher, self._all, self._others, self._call_texts)

    def _compile(self, kind: str, text: str) -> CompiledGrammar:
        if kind == "regex":
            return self._compiler.compile_regex(text)
        if kind == "ebnf":
            return self._compiler.compile_grammar(text)
        if kind == "calls":
            forms = json.loads(text.partition("\n")[2])
            ebnf = bound_digits(str(self._lib.Grammar.from_structural_tag(call_tag(forms))))
            return self._call_compiler.compile_grammar(spaced(ebnf, forms[0]["style"]))
        schema = '{"type": "object"}' if kind == "json" else text
        check_schema(schema)
        # no white space but ", " and ": ", and no number without end: a model that likes blanks
        # or digits would go on with them until max_tokens
        grammar = self._lib.Grammar.from_json_schema(schema, any_whitespace=False, strict_mode=True)
        return self._compiler.compile_grammar(bound_digits(str(grammar)))


NAMES = {"json": "JSON", "schema": "the JSON schema", "regex": "the regular expression",
         "ebnf": "the EBNF grammar", "calls": "the tools' parameters"}  # fmt: skip


class TooSlow(RequestError):
    """A grammar is so ambiguous that following one output would hold up all others."""


class Matcher(Constraint):
    """Follows one output; a :class:`asyncllm.core.request.Constraint`.

    Args:
        matcher: xgrammar's, at the beginning.
        every, others: all tokens, and all but the end tokens, as bits.
        texts: bytes of all tokens, for calls.

    Raises:
        RequestError: no token can begin. TooSlow: to find out takes more than MAX_STEP_S, which
            :meth:`accept` raises too.
    """

    def __init__(self, matcher: Any, every: Bits, others: Bits, texts: Sequence[bytes]) -> None:
        self._matcher, self._every, self._others = matcher, every, others
        self._texts = texts
        self._bits = np.zeros((1, len(every)), np.int32)

    def slow(self, token: int | None) -> bool:
        return True

    def start(self) -> None:
        self._fill()

    def mask(self) -> bytes:
        return self._bits.tobytes()

    def holds(self, ahead: int) -> bool:
        return ahead == 0

    def piece(self, token: int) -> bytes:
        """The bytes of a token in calls."""
        return self._texts[token]

    def restart(self) -> None:
        """Follow another output, from its beginning."""
        self._matcher.reset()
        self._fill()

    def begin(self, text: bytes) -> bool:
        """Go on by ``text``. False: the output cannot go on like that."""
        return bool(self._matcher.accept_string(text)) and not self._fill()

    def accept(self, token: int) -> bool:
        begun = thread_time()
        if not self._matcher.accept_token(token):
            raise RequestError(f"token {token} does not continue the output as its grammar wants")
        return self._matcher.is_terminated() or self._fill(begun)

    def _fill(self, begun: float | None = None) -> bool:
        """Bits of the next token. True: no token but an end can come, and one may."""
        begun = thread_time() if begun is None else begun
        if not self._matcher.fill_next_token_bitmask(self._bits):
            self._bits.fill(-1)
        if thread_time() - begun > MAX_STEP_S:
            raise TooSlow("the grammar is too ambiguous to be followed: simplify it")
        self._bits &= self._every  # bits after the last token mean nothing
        if (self._bits[0] & self._others).any():
            return False
        if self._bits.any() or self._matcher.is_completed():
            return True
        raise RequestError("no token of this model can continue the output as its grammar wants")


def call_tag(forms: list[dict[str, Any]]) -> str:
    """xgrammar's structural tag of what may follow a call's mark: one of the forms.

    Args:
        forms: each with ``begin`` (white space that it begins with may differ), ``schema``,
            ``style``, ``end``.

    Raises:
        RequestError: as :func:`check_schema`.
    """
    sequences = []
    for form in forms:
        check_schema(json.dumps(form["schema"]))
        begin = form["begin"]
        parts: list[dict[str, Any]] = [
            {"type": "const_string", "value": begin.lstrip()},
            {"type": "json_schema", "json_schema": form["schema"], "style": form["style"],
             "max_whitespace_cnt": 1},
        ]  # fmt: skip
        if begin != begin.lstrip():
            parts.insert(0, {"type": "regex", "pattern": r"[ \n]{0,2}"})
        if form["end"]:
            parts.append({"type": "const_string", "value": form["end"]})
        sequences.append({"type": "sequence", "elements": parts})
    return json.dumps({"type": "structural_tag", "format": {"type": "or", "elements": sequences}})


def spaced(ebnf: str, style: str) -> str:
    """The compiler's EBNF of arguments in ``style``, without white space that changes their values."""
    if style not in TAG_SPACE:
        return ebnf
    return "\n".join(
        line if line.startswith("basic_") else line.replace(r"([ \n\r\t])", TAG_SPACE[style])
        for line in ebnf.split("\n")
    )


def check_schema(text: str) -> None:
    """Refuse what would take the compiler long, and what it would not enforce.

    Raises:
        RequestError: with the place and the limit.
    """
    try:
        root = json.loads(text)
    except RecursionError:
        raise RequestError(f"the JSON schema is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise RequestError(f"the JSON schema is not valid JSON: {error}") from error
    for node, path, is_schema in _nodes(root):
        if len(path) > MAX_DEPTH:
            raise RequestError(f"the JSON schema is nested more than {MAX_DEPTH} deep")
        if not is_schema or not isinstance(node, dict):
            continue
        if bad := sorted(UNENFORCED & node.keys()):
            where = "/".join(("#", *path))
            raise RequestError(
                f"the JSON schema has {bad[0]} at {where}, which cannot be enforced: leave it out"
            )
        if len(node.get("allOf") or ()) > 1:
            where = "/".join(("#", *path))
            raise RequestError(
                f"the JSON schema has an allOf of several at {where}, which cannot be enforced:"
                " merge them"
            )


def _nodes(root: Any) -> Iterator[tuple[Any, tuple[str, ...], bool]]:
    """Every container with its path, and whether it is read as a schema."""
    stack: list[tuple[Any, tuple[str, ...], bool]] = [(root, (), True)]
    while stack:
        node, path, is_schema = stack.pop()
        yield node, path, is_schema
        if len(path) > MAX_DEPTH:
            return
        if isinstance(node, dict):
            for key, value in node.items():
                # below "properties" keys are names; what "enum" holds are values
                inner = not is_schema or key not in NAMED
                if isinstance(value, dict | list) and not (is_schema and key in VALUES):
                    stack.append((value, (*path, key), inner))
        elif isinstance(node, list):
            stack += [
                (value, (*path, str(i)), is_schema)
                for i, value in enumerate(node)
                if isinstance(value, dict | list)
            ]


def bound_digits(ebnf: str) -> str:
    """The compiler's EBNF of a schema with an end to every number.

    Integer and fraction get at most about INTEGER_DIGITS digits, exponents EXPONENT_DIGITS, so
    that every number that can come is finite in double precision.
    """
    digit_rules = set(DIGIT_RULE.findall(ebnf))

    def shorter(line: str) -> str:
        most = EXPONENT_DIGITS if "[eE]" in line else INTEGER_DIGITS

        def bounded(found: re.Match[str]) -> str:
            if found["digits"]:
                return f"[0-9]{{0, {most - 1}}}"
            if found["rule"] in digit_rules:
                return f"{found['rule']}{{{found['low']}, {max(most, int(found['low']))}}}"
            return found[0]

        return TOKENS.sub(bounded, line)

    return "\n".join(map(shorter, ebnf.split("\n")))


def _size(compiled: CompiledGrammar) -> int:
    return int(compiled.memory_size_bytes)


def _cause(error: RuntimeError) -> str:
    """The library's message without its clock and source lines."""
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+: ", "", str(error)).strip()
    return text if len(text) <= 300 else text[:297] + "..."
