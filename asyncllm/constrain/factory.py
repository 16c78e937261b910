"""Makes the constraint of a request from its grammar, its allowed tokens and its reasoning limit.

Knows requests' parameters; knows neither text formats nor tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final, NoReturn

from asyncllm.constrain.healing import Healing
from asyncllm.constrain.protocol import Constraint
from asyncllm.constrain.reasoning import ReasoningConstraint, ReasoningMarks
from asyncllm.constrain.token_list import AllowedTokens
from asyncllm.constrain.tool_calls import CallGrammar, ToolCallConstraint
from asyncllm.constrain.vocabulary import Vocabulary, bits
from asyncllm.core.request import SamplingParams
from asyncllm.errors import RequestError

OFF: Final = "constrained output is off on this server (--output_constraint_mode none)"


def unconstrained(kind: str, text: str) -> NoReturn:
    """Makes no grammars. Raises RequestError."""
    raise RequestError(OFF)


class ConstraintFactory:
    """Makes the constraint of each request.

    Args:
        vocab_size: width of the logits.
        eos_ids: tokens that end an output.
        grammar: a fresh constraint of a grammar (kind, text); raises RequestError.
        thinking: how the model writes reasoning; None: it does not.
        vocab: for token healing; None: it is off.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_ids: Collection[int],
        grammar: Callable[[str, str], CallGrammar] = unconstrained,
        thinking: ReasoningMarks | None = None,
        vocab: Vocabulary | None = None,
    ) -> None:
        self._vocab_size, self._eos_ids, self._grammar = vocab_size, eos_ids, grammar
        self._vocab = vocab
        self._thinking = thinking

    def of(
        self, params: SamplingParams, thoughts: str = "", healed: Sequence[bytes] = ()
    ) -> Constraint | None:
        """A fresh constraint; None: any token may come. Raises RequestError.

        Args:
            thoughts, healed: see ``Submit``.
        """
        if healed and self._vocab is not None:
            return Healing(self._vocab, healed)
        grammar = None if params.grammar is None else self._grammar(*params.grammar)
        calls = params.grammar is not None and params.grammar[0] == "calls"
        limit, thinking = params.max_thinking_tokens, None
        if (
            self._thinking is not None
            and thoughts in ("open", "none")
            and (grammar or limit is not None)
        ):
            thinking = ReasoningConstraint(
                self._thinking,
                opened=thoughts == "open",
                limit=limit,
                answer=None if calls else grammar,
            )
        if params.grammar is not None and grammar is not None and calls:
            mark = params.grammar[1].partition("\n")[0].encode()
            return ToolCallConstraint(mark, grammar, self._vocab_size, thinking)
        if thinking is not None:
            return thinking
        if grammar is not None:
            return grammar
        if params.allowed_token_ids:
            ends = () if params.ignore_eos else self._eos_ids
            return AllowedTokens(bits((*params.allowed_token_ids, *ends), self._vocab_size))
        return None
