"""Records carried in messages: log-probabilities, failures, load, parameters of K/V transfer.

Values only; they do not depend on the sender.
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
    """An empty int32 column."""
    return array(INT32)


def int64s() -> array[int]:
    """An empty int64 column."""
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
        """Whether every token has all its alternatives."""
        wide = len(self) * self.num_top
        return self.num_top >= 0 and len(self.top_ids) == len(self.top) == wide

    def slice(self, start: int, stop: int | None = None) -> Logprobs:
        """The part for tokens ``[start:stop]``."""
        wide = slice(start * self.num_top, None if stop is None else stop * self.num_top)
        return Logprobs(self.num_top, self.chosen[start:stop], self.top_ids[wide], self.top[wide])

    def pick(self, tokens: Sequence[int]) -> Logprobs:
        """The part for the tokens with these indices, in this order."""
        picked = Logprobs(self.num_top)
        for i in tokens:
            picked.extend(self.slice(i, i + 1))
        return picked

    @staticmethod
    def join(blocks: Sequence[Logprobs]) -> Logprobs:
        """Concatenate ``blocks``, with as many alternatives as the block that has fewest."""
        joined = Logprobs(min(block.num_top for block in blocks))
        for block in blocks:
            joined.extend(block)
        return joined

    def extend(self, more: Logprobs) -> None:
        """Append those of further tokens, keeping the best ``num_top`` alternatives of each."""
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
    """Sizes, in tokens, of a request that exceeds the context."""

    prompt_len: int  # a lower bound
    max_tokens: int  # to generate; 0: the prompt alone is too long
    limit: int
    flag: str  # the option that changes the limit


@record
@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request cannot be answered.

    Attributes:
        param: what is at fault: "prompt", "max_tokens" or "grammar", which routes call differently,
            or a field by its name; "": nothing of the request.
    """

    detail: str
    code: str = ""  # OpenAI's string code
    status: int = 400  # of HTTP
    overflow: Overflow | None = None
    param: str = ""

    @property
    def valid(self) -> bool:
        return 400 <= self.status <= 599

    @classmethod
    def of(cls, error: RequestError, param: str = "") -> Failure:
        """The record for an error; ``param`` where that is the client's and names none."""
        named = error.param or (param if error.status == 400 else "")
        return cls(error.message, error.code or "", error.status, error.overflow, named)


@record
@dataclass(frozen=True, slots=True)
class ConstraintDone:
    """The result of one slice of a constraint's work in a thread."""

    rid: int
    verdict: Verdict
    cpu_s: float = 0.0  # for these tokens and the mask after them
    ahead_s: float = 0.0  # CPU time for looking ahead behind them
    failure: Failure | None = None  # if it was refused
    num: int = 1  # tokens that the constraint accepted, if it was given several


@record
@dataclass(slots=True)
class OpenedLane:
    """A lane that is new to the runners: a request begins or returns after a preemption."""

    lane: int
    prompt_len: int
    params: SamplingParams
    known: array[int]  # the prompt, and tokens generated before a preemption; empty unless needed


@record
@dataclass(frozen=True, slots=True)
class AnsweredRequest:
    """Statistics of one answered HTTP request.

    Args:
        route: the path as registered, not as requested; "other" if there is none.
        reason: why generation ended; "refused" if it never began; "" if the request did not ask
            for generation.
        ttft_s: seconds to the first token; < 0: there was none.
        tpot_s: seconds per token after the first; < 0: fewer than two.
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
class GroupLoad:
    """The load of a group.

    Args:
        used: KV slots held by requests.
        expected: held and promised: prompt + max_new_tokens of running and waiting requests.
        total: all KV slots.
        sliding_used, sliding_total: the same for layers with a window, if these have their own.
        cached: KV slots kept only for their prefix.
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
class TransferTotals:
    """K/V that a node has sent to and received from others since its start.

    Args:
        sent_bytes: bytes of K/V sent.
        tokens: tokens received, of completed transfers.
        transfers: completed transfers.
        ms: total time of these transfers, from the sender's first frame to the last byte.
        lapses: failed transfers.
        waiting: portions that are ready now and wait for a page.
    """

    sent_bytes: int = 0
    tokens: int = 0
    transfers: int = 0
    ms: int = 0
    lapses: int = 0
    waiting: int = 0

    def __add__(self, other: TransferTotals) -> TransferTotals:
        return TransferTotals(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class KvWireFormat:
    """The layout of one server's K/V on the wire.

    Two servers can exchange K/V if all fields but ``tp`` are equal.

    Args:
        format: names of the formats that K/V are kept in, see docs/kv-formats.md.
        dtype: of the model's activations, and of K/V that are not quantised.
        num_layers: layers that have K/V.
        num_heads: K/V heads of the whole model; 1 for latents.
        head_bytes: bytes per head, token and layer: K, V and their scales together.
        latent: whether they are latents, the same on every rank.
        tp: ranks that heads are divided among, or replicated on.
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

    def difference(self, other: KvWireFormat) -> str:
        """What makes the two incompatible; "": nothing."""
        for name, ours in asdict(self).items():
            if name != "tp" and ours != (theirs := asdict(other)[name]):
                return f"{name} is {ours} here and {theirs} there"
        return ""


@record
@dataclass(frozen=True, slots=True, kw_only=True)
class KvDestination:
    """Where to send the K/V of a request.

    Args:
        node: the server's id, which is never reused.
        epoch: the request's rid there; only data labelled with it is accepted.
        hit, length: the positions [hit, length) are needed.
        addresses: of kv_transfer on each rank of the group, by rank.
    """

    node: str
    epoch: int
    hit: int
    length: int
    addresses: tuple[str, ...]
    wire: KvWireFormat

    @property
    def valid(self) -> bool:
        return (
            0 <= self.epoch < 1 << 63
            and 0 <= self.hit < self.length < 1 << 31
            and self.wire.valid
            and len(self.addresses) == self.wire.tp
        )

    def reaches(self, length: int) -> bool:
        """Whether it is valid and needs K/V of exactly ``length`` tokens."""
        return self.valid and self.length == length
