"""What can hold the output of one model: its grammars, its marks of reasoning,
the texts of its tokens.

Hands engine and core what they need of tokenizer and dialect; knows no requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncllm.api.parsing import reasoning, tools
from asyncllm.api.parsing.output_parser import Dialect
from asyncllm.constrain.engine import Grammars
from asyncllm.core.constraints import Constraints, unconstrained
from asyncllm.core.thinking import Rules
from asyncllm.core.vocabulary import Vocabulary
from asyncllm.errors import StartupError
from asyncllm.text import Text


def load_grammars(
    text: Text, dialect: Dialect, vocab_size: int, eos_ids: Sequence[int]
) -> Grammars:
    """Grammars of the model's tokens; special ones are no text, but for the marks of calls."""
    marks = tools.special_tokens(dialect.calls)
    return Grammars(text.pieces, vocab_size, eos_ids, text.special, marks)


def load_constraints(
    text: Text,
    dialect: Dialect,
    vocab_size: int,
    eos_ids: tuple[int, ...],
    *,
    grammars: Grammars | None,
    heals: bool,
) -> Constraints:
    """What makes the constraints of requests.

    Args:
        grammars: None: constrained output is off.
        heals: for --token_healing_mode.

    Raises:
        StartupError: tokens cannot be healed.
    """
    if heals and text.table is None:
        raise StartupError(
            "--token_healing_mode: this tokenizer's tokens have no text of their own"
        )
    style, vocab, thinking = dialect.reasoning, None, None
    if style or heals:
        vocab = Vocabulary(text.pieces, vocab_size, text.special)
        if style:
            thinking = Rules(vocab, reasoning.tags(style, frozenset(text.pieces)), eos_ids)
    return Constraints(
        vocab_size,
        eos_ids,
        unconstrained if grammars is None else grammars.constrain,
        thinking,
        vocab,
    )
