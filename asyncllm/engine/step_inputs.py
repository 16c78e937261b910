"""The inputs of a step as named columns, and the rows of a step plan on the host.

Knows plans and numpy. The columns that CUDA graphs read are separate from optional ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from asyncllm.engine.sharing import SharedColumns
from asyncllm.messages import StepPlan

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
HostColumn = NDArray[np.int32] | NDArray[np.float32]
A = TypeVar("A")  # a Column on the host, a Tensor on the device
B = TypeVar("B")


@dataclass(slots=True)
class StepRows:
    """A step plan unpacked: one entry per row, per new token or per cached token."""

    lanes: I32
    starts: I32
    counts: I32
    num_decode: int
    tokens: I32  # [num_tokens], -1: the lane's last token
    positions: I32  # [num_tokens]
    token_lanes: I32  # [num_tokens]
    slots: I32  # [num_tokens]
    sliding: I32 | None  # [num_tokens] of the second slot space, where there is one
    cached: Scatter[HostColumn] | None  # slots of cached tokens, to lane * max_len + position
    cached_sliding: Scatter[HostColumn] | None
    cu: I32  # [num_rows + 1] prefix sums of counts
    samples: NDArray[np.bool_]  # [num_rows]
    shared: SharedColumns | None = None  # shared prefixes of decode rows

    @property
    def sampled(self) -> tuple[I32, I32, I32]:
        """Of the rows that sample: lanes, positions of the tokens that they yield, and their last
        tokens in the step."""
        lanes, ends, last = self.lanes, self.starts + self.counts, self.cu[1:] - np.int32(1)
        if self.samples.all():
            return lanes, ends, last
        return lanes[self.samples], ends[self.samples], last[self.samples]

    @property
    def shape(self) -> Bucket:
        """The bucket that these rows fill."""
        return Bucket(len(self.tokens), self.num_decode, len(self.lanes) - self.num_decode)


def unpack(plan: StepPlan, max_len: int, *, two_spaces: bool = False) -> StepRows:
    """Spread the columns of ``plan`` over its tokens; ~15 us for 256 rows that decode.

    Without ``two_spaces`` all layers use one column of slots: the sliding one, if present.
    """
    first = plan.slots if two_spaces else plan.sliding or plan.slots
    columns = plan.lanes, plan.starts, plan.counts, plan.cached_counts, first, plan.tokens
    lanes, starts, counts, heads, slots, tokens = (np.frombuffer(c, np.int32) for c in columns)
    assert not two_spaces or len(plan.sliding) == len(slots), "a plan without the second space"
    sliding = np.frombuffer(plan.sliding, np.int32) if two_spaces else None
    if plan.num_decode == len(counts):  # a token each
        cu, positions, token_lanes = np.arange(len(counts) + 1, dtype=np.int32), starts, lanes
    else:
        cu = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=cu[1:])
        span = np.arange(cu[-1], dtype=np.int32)
        positions = span + np.repeat(starts - cu[:-1], counts)
        token_lanes = np.repeat(lanes, counts)
    cached, cached_sliding, new_slots = None, None, slots
    if heads.any():
        totals = heads + counts
        ends = np.cumsum(totals, dtype=np.int32)
        where = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts + counts - ends, totals)
        old = where < np.repeat(starts, totals)
        places = (np.repeat(lanes, totals) * np.int32(max_len) + where)[old]
        cached, new_slots = Scatter[HostColumn](places, slots[old]), slots[~old]
        if sliding is not None:
            cached_sliding = Scatter[HostColumn](places, sliding[old])
            sliding = sliding[~old]
    return StepRows(
        lanes=lanes,
        starts=starts,
        counts=counts,
        num_decode=plan.num_decode,
        tokens=tokens,
        positions=positions,
        token_lanes=token_lanes,
        slots=new_slots,
        sliding=sliding,
        cached=cached,
        cached_sliding=cached_sliding,
        cu=cu,
        samples=np.frombuffer(plan.samples, np.uint8).astype(bool),
    )


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """The shape of a step, or of the graph that runs it."""

    num_tokens: int
    num_decode: int  # rows of one token, which come first
    num_prefill: int  # other rows
    shares: bool = False  # decode rows may share prefix reads


class SamplingColumns(NamedTuple, Generic[A]):
    """Sampling parameters of the sampled rows, [num_rows] each."""

    temperature: A  # float32
    top_p: A
    min_p: A
    uniform: A
    top_k: A  # int32
    logit_rows: A  # the last token of the row, in the step
    lanes: A


class Penalties(NamedTuple, Generic[A]):
    """Rows with penalties, [p] each; rows of length 0 are padding."""

    rows: A  # of the logits
    lanes: A
    lens: A  # tokens of the lane so far
    prompt_lens: A
    presence: A
    frequency: A
    repetition: A
    penalize_prompt: A  # 0 or 1


class SharedRowColumns(NamedTuple, Generic[A]):
    """Shared prefixes of decode rows, int32; see ``SharedRows``."""

    order: A  # [num_decode]
    places: A
    owns: A
    groups: A  # [4 * MAX_GROUPS]


class RowColumns(NamedTuple, Generic[A]):
    """Inputs of the decoder, int32; see :class:`asyncllm.models.attention.Batch`."""

    tokens: A  # [num_tokens], -1: the lane's last one
    token_lanes: A
    positions: A
    slots: A
    decode_lanes: A  # [num_decode]
    decode_lens: A
    prefill_cu: A  # [num_prefill + 1]
    prefill_lanes: A  # [num_prefill]
    prefill_starts: A
    sliding_slots: A | None = None  # [num_tokens] if there are two slot spaces


class StepColumns(NamedTuple, Generic[A]):
    """The inputs that every step has and CUDA graphs read.

    Attributes:
        penalties: of all sampled rows, if there are graphs.
        shared: shared prefixes of decode rows, if enabled.
    """

    sampling: SamplingColumns[A]
    penalties: Penalties[A] | None
    rows: RowColumns[A]
    shared: SharedRowColumns[A] | None = None


class Scatter(NamedTuple, Generic[A]):
    """Values for positions of a flattened table."""

    where: A
    values: A


class LogitBias(NamedTuple, Generic[A]):
    """``logits[rows, tokens] += values``."""

    rows: A
    tokens: A
    values: A


class GivenTokens(NamedTuple, Generic[A]):
    """Tokens named by requests: in the log-probabilities, ``ids[rows, columns]`` are ``tokens``."""

    rows: A
    columns: A
    tokens: A


class LengthPenalties(NamedTuple, Generic[A]):
    """Rows whose logits of end tokens are raised, and the factor."""

    rows: A
    scales: A


class Bitmask(NamedTuple, Generic[A]):
    """Sampled rows, and a bit per token: token t is allowed if bit t % 32 of word t // 32 is
    set."""

    rows: A  # [m]
    bits: A  # [m, words]


class PromptTargets(NamedTuple, Generic[A]):
    """Prompt tokens whose log-probabilities are requested, over all rows."""

    tokens: A


@dataclass(slots=True)
class OptionalInputs(Generic[A]):
    """Optional inputs of a step."""

    known: Scatter[A] | None = None  # tokens for the history
    cached: Scatter[A] | None = None  # slots for the table
    cached_sliding: Scatter[A] | None = None  # for the table of the second space
    bias: LogitBias[A] | None = None
    penalties: Penalties[A] | None = None  # of rows that have any, if no graph applies them
    lengths: LengthPenalties[A] | None = None
    given: GivenTokens[A] | None = None
    masks: Bitmask[A] | None = None
    targets: PromptTargets[A] | None = None

    def map(self, call: Callable[[A], B]) -> OptionalInputs[B]:
        """With ``call`` applied to each column, in a fixed order."""
        made: OptionalInputs[B] = OptionalInputs()
        for name in self.__slots__:
            if (group := getattr(self, name)) is not None:
                setattr(made, name, group._make(map(call, group)))
        return made
