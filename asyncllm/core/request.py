"""Sampling parameters of a request, and the reasons for which it can end.

Knows values and their meaning; knows neither HTTP field names nor tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import isfinite


class FinishReason(IntEnum):
    """Why a request ended; the integer travels in messages."""

    STOP = 0  # an eos or stop token, or a stop string
    LENGTH = 1  # max_new_tokens, or the context is full
    ABORT = 2  # the client left, or the server is going down
    ERROR = 3  # see the detail
    MOVED = 4  # it continues where its K/V went; reported to masters only


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens for one request; every value has been checked against its limits.

    Logits are changed in this order:

    1. logit_bias, and banning of eos tokens by min_new_tokens 2. presence, frequency and repetition
    penalties 3. the length penalty on eos tokens 4. the mask of the constraint 5. temperature 6.
    top_k, top_p, min_p

    Log-probabilities are of the unchanged logits.
    """

    max_new_tokens: int | None = None  # None: fill the context; the tokenizer resolves it. 0: score
    min_new_tokens: int = 0  # eos and stop tokens are banned until then
    temperature: float = 1.0  # 0: greedy
    top_k: int = -1  # -1: all
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the best token's probability
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    penalize_prompt: bool = False  # the repetition penalty counts prompt tokens too
    seed: int = 0  # same seed and prompt, same tokens; the frontend draws one when none is given
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # cut from the text
    stop_sequences: tuple[tuple[int, ...], ...] = ()  # of ids, each at least two; cut from the text
    logprobs: int = -1  # -1: none; 0: of the chosen token; N: of the N best too
    logprob_ids: tuple[int, ...] = ()  # of these ids instead of the best ones; each once, and
    # logprobs is their number
    prompt_logprobs: int = -1  # the same for prompt tokens; such a request takes no prefix hit
    skip_special_tokens: bool = True
    print_eos: bool = False  # show the text of the eos or stop token that ended the request
    include_stop: bool = False  # show what ended it, unless it is a special token that is not shown
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    use_cache: bool = True  # use and add prefix cache entries
    grammar: tuple[str, str] | None = None  # (kind, text) to match; kinds in GRAMMARS
    length_penalty: tuple[int, float] | None = None  # (start, factor > 1): raises eos logits to
    # logit + |logit| * (factor ** (generated - start) - 1) after start tokens (transformers'
    # ExponentialDecayLengthPenalty)
    allowed_token_ids: tuple[int, ...] = ()  # only these and eos tokens are allowed; (): all
    max_thinking_tokens: int | None = None  # reasoning tokens before it is ended; None: no limit

    @property
    def shares_prefix(self) -> bool:
        """Whether a prefix hit is allowed: no result needs the hit's tokens to be computed."""
        return self.use_cache and self.prompt_logprobs < 0

    def possible(self, vocab_size: int) -> bool:
        """Whether values of the right types are in range; applied to what other processes send."""
        numbers = (
            self.temperature, self.top_p, self.min_p, self.presence_penalty,
            self.frequency_penalty, self.repetition_penalty, *(b for _, b in self.logit_bias),
            *(self.length_penalty or ()),
        )  # fmt: skip
        counts = (
            self.max_new_tokens or 0, self.min_new_tokens, self.max_thinking_tokens or 0,
            self.top_k + 1, self.logprobs + 1, self.prompt_logprobs + 1,
            *(self.length_penalty or ())[:1],
        )  # fmt: skip
        ids = (
            *self.stop_token_ids, *self.allowed_token_ids, *(i for i, _ in self.logit_bias),
            *self.logprob_ids,
            *(i for ids in self.stop_sequences for i in ids),
        )  # fmt: skip
        return (
            all(map(isfinite, numbers))
            and min(self.temperature, self.top_p, self.min_p, self.repetition_penalty) >= 0
            and self.repetition_penalty > 0
            and all(0 <= count <= _MAX_INT32 for count in counts)
            and max(self.logprobs, self.prompt_logprobs) <= vocab_size
            and len(self.logprob_ids) <= max(self.logprobs, 0)
            and -(1 << 63) <= self.seed < 1 << 63
            and all(0 <= i < vocab_size for i in ids)
            and all(len(ids) > 1 for ids in self.stop_sequences)
            and (self.grammar is None or self.grammar[0] in GRAMMARS)
        )


# kinds of SamplingParams.grammar: any JSON object (no text), a JSON schema, one of JSON without
# white space, a regular expression, EBNF rules starting at ``root``, a JSON array of texts to
# choose from, calls within free text: the mark that begins one, a line break, and a JSON array of
# what may follow it, each {"begin", "schema", "style", "end"}
GRAMMARS = ("json", "schema", "compact", "regex", "ebnf", "choice", "calls")
# a key in a string's schema: the string must match this grammar in Lark's notation
LARK = "\ue000lark"


_MAX_INT32 = (1 << 31) - 1
