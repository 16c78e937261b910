"""Values that travel together, as fields of messages: log-probabilities, failures, parameters.

Knows nothing of who sends them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

from asyncllm.codec import FLOAT32, INT32, INT64, record
from asyncllm.constrain.protocol import Verdict
from asyncllm.core.request import SamplingParams
from asyncllm.errors import RequestError

record(SamplingParams)


def int32s() -> array[int]:
    """An empty column."""
    return array(INT32)


def int64s() -> array[int]:
    """An empty column of wide numbers."""
    return array(INT64)


def _floats() -> array[float]:
    return array(FLOAT32)


@record
@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of some tokens, each with the ``num_top`` best alternatives."""

    num_top: int = 0
    chosen: array[float] = field(default_factory=_floats)  # one per token
    top_ids: array[int] = field(default_factory=int32s)  # num_top per token, best first
    top: array[float] = field(default_factory=_floats)  # the alternatives' log-probabilities

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def whole(self) -> bool:
        """Every token has all its alternatives."""
        wide = len(self) * self.num_top
        return self.num_top >= 0 and len(self.top_ids) == len(self.top) == wide

    def slice(self, start: int, stop: int | None = None) -> Logprobs:
        """Those of tokens ``[start:stop]``."""
        wide = slice(start * self.num_top, None if stop is None else stop * self.num_top)
        return Logprobs(self.num_top, self.chosen[start:stop], self.top_ids[wide], self.top[wide])

    def pick(self, tokens: Sequence[int]) -> Logprobs:
        """Those of the tokens with these indices, in this order."""
        picked = Logprobs(self.num_top)
        for i in tokens:
            picked.extend(self.slice(i, i + 1))
        return picked

    @staticmethod
    def join(blocks: Sequence[Logprobs]) -> Logprobs:
        """All of them; a step has as many alternatives as the request that wants most."""
        joined = Logprobs(min(block.num_top for block in blocks))
        for block in blocks:
            joined.extend(block)
        return joined

    def extend(self, more: Logprobs) -> None:
        """Append those of further tokens; of theirs that have more alternatives the best ones."""
        self.chosen.extend(more.chosen)
        if more.num_top == self.num_top:
            self.top_ids.extend(more.top_ids)
            self.top.extend(more.top)
        elif self.num_top:
            for first in range(0, len(more.top_ids), more.num_top):
                best = slice(first, first + self.num_top)
                self.top_ids.extend(more.top_ids[best])
                self.top.extend(more.top[best])


@record
@dataclass(frozen=True, slots=True)
class Overflow:
    """What does not fit into the context, in tokens."""

    prompt_len: int  # at least
    max_tokens: int  # that are to be generated; 0: the prompt alone is too long
    limit: int
    flag: str  # that changes the limit


@record
@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request cannot be answered."""

    detail: str
    code: str = ""  # OpenAI's string code
    status: int = 400  # of HTTP
    overflow: Overflow | None = None

    @property
    def valid(self) -> bool:
        return 400 <= self.status <= 599

    @classmethod
    def of(cls, error: RequestError) -> Failure:
        """What travels of an error."""
        return cls(error.message, error.code or "", error.status, error.overflow)


@record
@dataclass(frozen=True, slots=True)
class ConstraintDone:
    """One piece of a constraint's work that a thread brings back."""

    rid: int
    verdict: Verdict
    cpu_s: float = 0.0
    failure: Failure | None = None  # of a refusal
    num: int = 1  # tokens that the constraint has taken, where it was told several


@record
@dataclass(slots=True)
class Opened:
    """A lane that the runners have not seen: the request's way through the device begins."""

    lane: int
    prompt_len: int
    params: SamplingParams
    known: array[int]  # the prompt, and tokens made before a preemption; empty unless needed


@record
@dataclass(frozen=True, slots=True)
class Answered:
    """One HTTP request that has been answered.

    Args:
        route: the path as registered, not as asked for; "other" where none is.
        reason: why generation ended; "refused" when it was not begun; "" when the request was not
            about generation.
        ttft_s: seconds to the first token; < 0: none came.
        tpot_s: seconds per token after the first; < 0: fewer than two came.
    """

    route: str
    status: int
    prompt_len: int
    num_tokens: int
    reason: str
    ttft_s: float
    tpot_s: float
    total_s: float


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a group has to do.

    Args:
        used: KV slots held by requests.
        expected: held and promised: prompt + max_new_tokens of running and waiting requests.
        total: KV slots there are.
        sliding_used, sliding_total: those of layers with a window, where these have their own.
        cached: KV slots that are kept for their prefix only.
        running, waiting: requests.
    """

    used: int = 0
    expected: int = 0
    total: int = 0
    sliding_used: int = 0
    sliding_total: int = 0
    cached: int = 0
    running: int = 0
    waiting: int = 0


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class KvMoved:
    """What a node has sent to others and taken from them, since its start.

    Args:
        sent_bytes: of K/V.
        tokens: whose K/V have come, of requests that have come as a whole.
        transfers: these requests.
        ms: they took together, from the first sign of the sender to the last byte.
        lapses: transfers that have failed.
        waiting: now: portions that could travel and wait for a page.
    """

    sent_bytes: int = 0
    tokens: int = 0
    transfers: int = 0
    ms: int = 0
    lapses: int = 0
    waiting: int = 0

    def __add__(self, other: KvMoved) -> KvMoved:
        return KvMoved(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class KvWire:
    """What K/V of one server look like to another.

    Two servers understand each other if all is equal but ``tp``.

    Args:
        format: names of the formats that they are kept in, see docs/kv-formats.md.
        dtype: of the model's activations, and of K/V that are not quantised.
        num_layers: layers that have K/V.
        num_heads: K/V heads of the whole model; 1 of latents.
        head_bytes: of a head of a token in one layer, K and V and their scales together.
        latent: they are latents, the same on every rank.
        tp: ranks that heads are divided among, or repeated on.
    """

    format: str
    dtype: str
    num_layers: int
    num_heads: int
    head_bytes: int
    latent: bool = False
    tp: int = 1

    @property
    def valid(self) -> bool:
        return min(self.num_layers, self.num_heads, self.head_bytes, self.tp) > 0

    def difference(self, other: KvWire) -> str:
        """What the two would not understand of each other; "": nothing."""
        for name, ours in asdict(self).items():
            if name != "tp" and ours != (theirs := asdict(other)[name]):
                return f"{name} is {ours} here and {theirs} there"
        return ""


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where K/V of a request are wanted.

    Args:
        node: the id of the server, which no other and no later one has.
        epoch: the request's rid there; what is labelled so, and nothing else, is taken for it.
        hit, length: K/V of positions [hit, length) are wanted.
        addresses: of kv_transfer on each rank of the group, by rank.
    """

    node: str
    epoch: int
    hit: int
    length: int
    addresses: tuple[str, ...]
    wire: KvWire

    @property
    def valid(self) -> bool:
        return (
            0 <= self.epoch < 1 << 63
            and 0 <= self.hit < self.length < 1 << 31
            and self.wire.valid
            and len(self.addresses) == self.wire.tp
        )

    def reaches(self, length: int) -> bool:
        """It wants K/V of as many tokens."""
        return self.valid and self.length == length
