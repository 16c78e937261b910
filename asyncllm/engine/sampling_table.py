"""Sampling parameters of all lanes on the host, and the batch that a step needs.

Knows SamplingParams and numpy; does not know tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from asyncllm.core.request import SamplingParams
from asyncllm.engine.step_inputs import (
    F32,
    I32,
    GivenTokens,
    HostColumn,
    LengthPenalties,
    LogitBias,
    Penalties,
    StepRows,
)
from asyncllm.messages import StepPlan

BIAS = np.dtype([("token", np.int32), ("value", np.float32)])
MOST_SCALE = 1e30  # bound of a length penalty, so that its product with a logit is finite
BAN = -1e30  # below every logit but above -inf, since a constraint may allow nothing else
# Beyond these all tokens are as likely, or repeated for ever. Nothing becomes infinite, which would
# make NaN of what a mask forbids, and a BAN that is multiplied by both is still one.
MOST_TEMPERATURE = 1e15
LEAST_REPETITION = 1e-10


@dataclass(slots=True)
class SamplingBatch:
    """Sampling parameters of the n sampled rows of a step."""

    logit_rows: I32  # [n] the last token of the row, in the step
    lanes: I32
    temperature: F32  # 0: greedy
    top_k: I32  # vocab_size: all
    top_p: F32
    min_p: F32
    uniform: F32  # in (0, 1), a function of (seed, position); 0.5 if all rows are greedy
    all_greedy: bool
    truncates: bool  # some row has top_k, top_p or min_p
    bias: LogitBias[HostColumn] | None
    penalties: Penalties[HostColumn] | None
    lengths: LengthPenalties[HostColumn] | None
    num_top: int  # most alternatives of any row; -1: no log-probabilities
    given: GivenTokens[HostColumn] | None
    masked: bool  # some row has a mask

    @property
    def changes(self) -> bool:
        """Whether some row's logits are modified before sampling by more than penalties."""
        return self.masked or self.bias is not None or self.lengths is not None


@dataclass(slots=True)
class Scored:
    """Prompt log-probabilities that one row of a step yields."""

    row: int
    first: int  # index of its first token in the step
    targets: I32  # the tokens that followed
    num_top: int


@dataclass(slots=True)
class OpenLane:
    """Parameters that only some lanes use."""

    params: SamplingParams
    prompt_len: int
    known: I32
    # arrays of BIAS: a step has hundreds of rows, and a row may have hundreds of entries
    biases: NDArray[np.void]
    bans: NDArray[np.void]  # the same before min_new_tokens, with end tokens banned


@dataclass(slots=True)
class LaneColumns:
    """What some lanes contribute to a batch whatever the positions of their rows are."""

    key: bytes  # the lanes
    idle: F32  # in the place of random numbers that no row uses
    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    all_greedy: bool
    truncates: bool
    num_top: int
    given: GivenTokens[HostColumn] | None
    penalized: bool  # some lane has penalties
    biased: bool  # some lane has biases or a least number of tokens
    lengthened: bool  # some lane has a length penalty
    banned: bytes = b""  # rows of the last batch whose end tokens were banned ...
    bias: LogitBias[HostColumn] | None = None  # ... and its biases, which depend on no more


class SamplingTable:
    """Sampling parameters of every lane; written when a plan opens the lane.

    Successive steps mostly sample the same lanes, so what depends on these alone is kept.

    Args:
        eos_ids: banned until a request reaches its min_new_tokens.
    """

    def __init__(self, num_lanes: int, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._vocab_size, self._eos_ids = vocab_size, eos_ids
        self.temperature = np.zeros(num_lanes, np.float32)
        self.top_k = np.full(num_lanes, vocab_size, np.int32)
        self.top_p = np.ones(num_lanes, np.float32)
        self.min_p = np.zeros(num_lanes, np.float32)
        self.seed = np.zeros(num_lanes, np.uint64)
        self.prompt_len = np.zeros(num_lanes, np.int32)
        self.logprobs = np.full(num_lanes, -1, np.int32)
        self.presence = np.zeros(num_lanes, np.float32)
        self.frequency = np.zeros(num_lanes, np.float32)
        self.repetition = np.ones(num_lanes, np.float32)
        self.penalize_prompt = np.zeros(num_lanes, bool)
        self.penalized = np.zeros(num_lanes, bool)
        self.biased = np.zeros(num_lanes, bool)
        self.least = np.zeros(num_lanes, np.int32)
        self.length_start = np.zeros(num_lanes, np.int32)
        self.length_factor = np.ones(num_lanes, np.float64)
        self.scored = np.zeros(num_lanes, bool)
        self.names_tokens = np.zeros(num_lanes, bool)
        self.lanes: dict[int, OpenLane] = {}
        self._kept: LaneColumns | None = None  # of the last batch, unless lanes have changed
        self._any_scored = False

    def open(self, plan: StepPlan) -> None:
        """Add the lanes that ``plan`` opens."""
        if not plan.opened:
            return
        self._kept = None
        for opened in plan.opened:
            number, p = opened.lane, opened.params
            known = np.frombuffer(opened.known, np.int32)
            biases, bans = (self._pairs(p, banned=each) for each in (False, True))
            self.lanes[number] = OpenLane(p, opened.prompt_len, known, biases, bans)
            self.temperature[number] = min(p.temperature, MOST_TEMPERATURE)
            self.top_k[number] = p.top_k if p.top_k > 0 else self._vocab_size
            self.top_p[number], self.min_p[number] = p.top_p, p.min_p
            self.seed[number] = p.seed & 0xFFFFFFFFFFFFFFFF
            self.prompt_len[number] = opened.prompt_len
            self.logprobs[number] = p.logprobs
            self.presence[number] = p.presence_penalty
            self.frequency[number] = p.frequency_penalty
            self.repetition[number] = max(p.repetition_penalty, LEAST_REPETITION)
            self.penalize_prompt[number] = p.penalize_prompt
            self.penalized[number] = (
                p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
            )
            self.least[number] = p.min_new_tokens
            self.length_start[number], self.length_factor[number] = p.length_penalty or (0, 1.0)
            self.biased[number] = bool(p.logit_bias)
            self.scored[number] = p.prompt_logprobs >= 0
            self.names_tokens[number] = bool(p.logprob_ids)
        self._any_scored = bool(self.scored.any())

    def batch(self, rows: StepRows, masked: bool = False) -> SamplingBatch:
        """Parameters of the rows of a step that sample, in row order."""
        lanes, ends, last = rows.sampled
        known = self._kept
        if known is None or known.key != lanes.tobytes():
            known = self._kept = self._columns(lanes)
        return SamplingBatch(
            logit_rows=last,
            lanes=lanes,
            temperature=known.temperature,
            top_k=known.top_k,
            top_p=known.top_p,
            min_p=known.min_p,
            uniform=known.idle if known.all_greedy else uniform(self.seed[lanes], ends),
            all_greedy=known.all_greedy,
            truncates=known.truncates,
            bias=self._bias(known, lanes, ends) if known.biased else None,
            penalties=self._penalties(lanes, ends) if known.penalized else None,
            lengths=self._lengths(lanes, ends) if known.lengthened else None,
            num_top=known.num_top,
            given=known.given,
            masked=masked,
        )

    def _columns(self, lanes: I32) -> LaneColumns:
        temperature = self.temperature[lanes]
        top_k, top_p, min_p = self.top_k[lanes], self.top_p[lanes], self.min_p[lanes]
        truncates = (top_k < self._vocab_size) | (top_p < 1) | (min_p > 0)
        return LaneColumns(
            key=lanes.tobytes(),
            idle=np.full(len(lanes), 0.5, np.float32),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            all_greedy=not temperature.any(),
            truncates=bool((truncates & (temperature > 0)).any()),
            num_top=int(self.logprobs[lanes].max(initial=-1)),
            given=self._given(lanes),
            penalized=bool(self.penalized[lanes].any()),
            biased=bool((self.biased[lanes] | (self.least[lanes] > 0)).any()),
            lengthened=bool((self.length_factor[lanes] > 1).any()),
        )

    def _lengths(self, lanes: I32, ends: I32) -> LengthPenalties[HostColumn] | None:
        """Rows beyond the start of their length penalty, and factor ** (tokens beyond) - 1."""
        generated = ends - self.prompt_len[lanes]
        beyond = generated - self.length_start[lanes]
        # nothing may undo the ban of end tokens
        on = (beyond > 0) & (self.length_factor[lanes] > 1) & (generated >= self.least[lanes])
        if not on.any():
            return None
        rows = np.flatnonzero(on).astype(np.int32)
        with np.errstate(over="ignore"):
            grown = np.power(self.length_factor[lanes[rows]], beyond[rows]) - 1
        return LengthPenalties(rows, np.minimum(grown, MOST_SCALE).astype(np.float32))

    def _penalties(self, lanes: I32, ends: I32) -> Penalties[HostColumn]:
        rows = np.flatnonzero(self.penalized[lanes]).astype(np.int32)
        lanes = lanes[rows]
        return Penalties(
            rows=rows,
            lanes=lanes,
            lens=ends[rows],
            prompt_lens=self.prompt_len[lanes],
            presence=self.presence[lanes],
            frequency=self.frequency[lanes],
            repetition=self.repetition[lanes],
            penalize_prompt=self.penalize_prompt[lanes].astype(np.int32),
        )

    def _bias(self, known: LaneColumns, lanes: I32, ends: I32) -> LogitBias[HostColumn] | None:
        """Biases of logit_bias, and bans of end tokens before min_new_tokens."""
        banned = ends - self.prompt_len[lanes] < self.least[lanes]
        if known.banned == (key := banned.tobytes()):
            return known.bias
        known.banned, known.bias = key, None
        rows = np.flatnonzero(self.biased[lanes] | banned).astype(np.int32)
        entries = []
        for row in map(int, rows):
            lane = self.lanes[int(lanes[row])]
            entries.append(lane.bans if banned[row] else lane.biases)
        if any(map(len, entries)):
            every = np.concatenate(entries)
            rows = np.repeat(rows, [*map(len, entries)])
            known.bias = LogitBias(rows, every["token"].copy(), every["value"].copy())
        return known.bias

    def _given(self, lanes: I32) -> GivenTokens[HostColumn] | None:
        """Tokens whose log-probabilities are requested by id."""
        entries = [
            (row, column, token)
            for row in map(int, np.flatnonzero(self.names_tokens[lanes]))
            for column, token in enumerate(self.lanes[int(lanes[row])].params.logprob_ids)
        ]
        if not entries:
            return None
        return GivenTokens(*(np.array(column, np.int32) for column in zip(*entries, strict=True)))

    def _pairs(self, p: SamplingParams, *, banned: bool) -> NDArray[np.void]:
        pairs = list(p.logit_bias)
        if banned:
            ends = p.stop_token_ids if p.ignore_eos else (*p.stop_token_ids, *self._eos_ids)
            pairs += [(token, BAN) for token in ends]
        return np.array([pair for pair in pairs if pair[0] < self._vocab_size], BIAS)

    def scores(self, rows: StepRows) -> list[Scored]:
        """Prompt log-probabilities that this step can yield."""
        if not self._any_scored:
            return []
        out = []
        for row in np.flatnonzero(self.scored[rows.lanes]):
            lane = self.lanes[int(rows.lanes[row])]
            start, count = int(rows.starts[row]), int(rows.counts[row])
            targets = lane.known[start + 1 : min(start + count + 1, lane.prompt_len)]
            if len(targets):
                first = int(rows.cu[row])
                out.append(Scored(int(row), first, targets, lane.params.prompt_logprobs))
        return out


def uniform(seed: NDArray[np.uint64], position: I32) -> F32:
    """One number in (0, 1) per row from (seed, position): independent of the rest of the batch.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
    """
    z = seed + (position.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    out: F32 = ((z >> np.uint64(42)).astype(np.float32) + np.float32(0.5)) / np.float32(1 << 22)
    return out
