"""Runs one step on one device: the tensors of a rank and what a plan does to them.

Owns K/V, the lane tables and the last token of every lane. Knows neither actors nor scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asyncllm import log
from asyncllm.core.windows import PerSpace
from asyncllm.engine.bitmask import apply_token_bitmask, bitmask_of
from asyncllm.engine.graphs import Capture, DecoderGraphs
from asyncllm.engine.h2d import Staged, Uploader
from asyncllm.engine.parallel import Group
from asyncllm.engine.sampler_graphs import SampledTokens, SamplerGraphs, SamplerVariant
from asyncllm.engine.sampling import Sampler, SamplingTensors, TorchSampler, put_given, raise_ends
from asyncllm.engine.sampling_table import SamplingBatch, SamplingTable, Scored
from asyncllm.engine.sharing import SharedReads
from asyncllm.engine.step_inputs import (
    Bucket,
    HostColumn,
    OptionalInputs,
    Penalties,
    PromptTargets,
    SamplingColumns,
    Scatter,
    SharedRowColumns,
    StepColumns,
    StepRows,
    unpack,
)
from asyncllm.kernels.attention.shared_rows import SharedRows
from asyncllm.messages import StepPlan
from asyncllm.models.attention import Batch, HostRows, zeros
from asyncllm.models.model import Model

LOGIT_ROWS = 256  # prompt log-probabilities: rows of logits that exist at a time


ScoredTensors = tuple[Scored, Tensor, Tensor, Tensor]  # chosen, top ids, top values


@dataclass(slots=True)
class PreparedStep:
    """A plan unpacked on the host; no longer depends on the lane table."""

    step: int
    rows: StepRows
    bucket: Bucket | None  # the graph that runs the step; None: eager
    variant: SamplerVariant | None  # the graph that runs its end (sampling); None: eager
    batch: SamplingBatch
    scored: list[Scored]
    staged: Staged


@dataclass(slots=True)
class Outputs:
    """What a step leaves on the device."""

    tokens: Tensor | None  # [n] int32; None on ranks that do not report or where no row samples
    logprobs: tuple[Tensor, Tensor, Tensor] | None  # chosen, top ids, top values
    scored: list[ScoredTensors]


class Engine:
    """The model, its K/V and its tables on one rank.

    Args:
        model: this rank's share of the weights, loaded.
        num_slots: KV slots; slot ``num_slots`` is an extra one that padding writes to.
        num_sliding: the same for layers with a window; None: they share the others' slots.
        num_lanes: maximum concurrent requests.
        num_rows: maximum sampled rows per step; None: one per request.
        max_len: longest sequence.
        eos_ids: end tokens of the model, for min_new_tokens and length penalties.
        shares_prefixes: decode rows read shared prefixes once, if the attention backend can.
    """

    def __init__(
        self,
        model: Model,
        group: Group,
        *,
        num_slots: int,
        num_lanes: int,
        max_len: int,
        eos_ids: tuple[int, ...],
        num_sliding: int | None = None,
        num_rows: int | None = None,
        shares_prefixes: bool = False,
    ) -> None:
        self.model, self.group, self.max_len, self.num_slots = model, group, max_len, num_slots
        self.device = device = model.site.device
        layout = model.site.attention.layout
        room = PerSpace(num_slots, num_slots if num_sliding is None else num_sliding)
        self.kv = layout.allocate(PerSpace(room.full + 1, room.sliding + 1), device)
        self._two_spaces = num_sliding is not None and all(layout.bytes_per_slot())
        # one extra lane, which padding writes to
        self.table = zeros((num_lanes + 1, max_len), torch.int32, device)
        self.sliding_table = None
        if self._two_spaces:
            self.sliding_table = zeros((num_lanes + 1, max_len), torch.int32, device)
        self.history = zeros((num_lanes + 1, max_len), torch.int32, device)
        self.last_token = zeros((num_lanes + 1,), torch.int64, device)
        self.num_rows = num_rows or num_lanes
        self.lanes = SamplingTable(num_lanes, model.vocab_size, eos_ids)
        ends = [i for i in eos_ids if i < model.vocab_size]
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.graphs: tuple[DecoderGraphs, SamplerGraphs] | None = None
        self._no_top = torch.empty(self.num_rows, 0, device=device)
        self._stage, self.sampler = _step_ops(model)
        self.sharing = SharedReads(model.site.attention.sharing() if shares_prefixes else None)
        self._uploader = Uploader(
            device,
            num_lanes=num_lanes,
            num_rows=self.num_rows,
            dump_slot=room.full if layout.bytes_per_slot().full else room.sliding,
            dump_sliding=room.sliding if self._two_spaces else None,
            fixed=device.type != "cpu",
        )

    def capture(self, capture: Capture, chunk: int) -> None:
        """Make CUDA graphs for decode steps, and for mixed ones up to the full step of ``chunk``
        tokens.

        Every rank must call this at the same time, while no step is in flight.
        """
        hidden = zeros((self.num_rows, self.model.hidden_size), self.model.site.dtype, self.device)
        decoder = DecoderGraphs(self.num_rows, chunk, shares=self.sharing.costs is not None)
        sampler = SamplerGraphs(hidden)
        with log.phase(f"capture {len(decoder.all())} graphs of the decoder"):
            decoder.capture(capture, self._uploader, self._forward)
        with log.phase(f"capture {len(sampler.all())} graphs of sampling"):
            sampler.capture(capture, self._uploader, self._end)
        self.graphs = decoder, sampler

    def close(self) -> None:
        """Free the graphs, which must go before the collectives that they hold."""
        for graphs in self.graphs or ():
            graphs.close()

    def prepare(self, plan: StepPlan) -> PreparedStep:
        """Read ``plan``; host work only. Plans must come in order: lanes are opened here."""
        self.lanes.open(plan)
        rows = unpack(plan, self.max_len, two_spaces=self._two_spaces)
        rows.shared = None if plan.common else self.sharing.of(plan)
        masks = bitmask_of(plan, rows)
        batch = self.lanes.batch(rows, masked=masks is not None)
        scored = self.lanes.scores(rows)
        bucket, variant = None, None
        num_tokens = plan.common or len(rows.tokens)
        mixed = plan.mixed or rows.num_decode < len(rows.lanes)
        if self.graphs is not None:
            decoder, sampler = self.graphs
            bucket = decoder.pick(rows, num_tokens, mixed=mixed)
            variant = sampler.pick(batch)
            num_tokens = decoder.size(num_tokens, mixed=mixed)
        # groups in lockstep have steps of equal size, with or without a graph
        shape = replace(rows.shape, num_tokens=num_tokens) if plan.common else None
        extras: OptionalInputs[HostColumn] = OptionalInputs(
            known=_known(plan, self.max_len),
            cached=rows.cached,
            cached_sliding=rows.cached_sliding,
            bias=batch.bias,
            penalties=None if variant is not None else batch.penalties,
            lengths=batch.lengths,
            given=batch.given,
            masks=masks,
            targets=PromptTargets(np.concatenate([s.targets for s in scored])) if scored else None,
        )
        staged = self._uploader.write(rows, batch, extras, bucket, shape)
        return PreparedStep(plan.step, rows, bucket, variant, batch, scored, staged)

    @torch.inference_mode()
    def execute(self, work: PreparedStep) -> Outputs:
        """Run the step; returns as soon as everything is queued on the device."""
        given, extras = self._uploader.upload(work.staged)
        num_sampled = len(work.batch.lanes)
        for table, scatter in (
            (self.history, extras.known),
            (self.table, extras.cached),
            (self.sliding_table, extras.cached_sliding),
        ):
            if scatter is not None and table is not None:
                table.view(-1).index_copy_(0, scatter.where.long(), scatter.values)
        if work.bucket is not None:
            assert self.graphs is not None
            hidden = self.graphs[0].replay(work.bucket)
        else:
            hidden = self._forward(given, work.rows.shape, work.rows)
        scored = self._score(hidden, work.scored, extras.targets)
        if not num_sampled:
            return Outputs(None, None, scored)
        picked = None
        if num_sampled < len(work.rows.tokens):  # else a decode step: no need to pick
            picked = given.sampling.logit_rows[:num_sampled]
        if work.variant is None:
            last = hidden[:num_sampled] if picked is None else hidden[picked.long()]
            logits = self.model.logits(last)
            return self._choose(logits, work, given.sampling, extras, scored)
        assert self.graphs is not None
        tokens, scores = self.graphs[1].end(work.variant, hidden, picked, num_sampled)
        if scores is None:
            return Outputs(tokens, None, scored)
        none = self._no_top[:num_sampled]
        return Outputs(tokens, (scores, none.int(), none), scored)

    def _forward(
        self, given: StepColumns[Tensor], shape: Bucket, rows: StepRows | None = None
    ) -> Tensor:
        """The decoder on a step's columns; captured in graphs, so it makes no decisions on the
        host."""
        host, max_count = None, shape.num_tokens
        if rows is not None:
            max_count = int(rows.counts[rows.num_decode :].max(initial=0))
            host = HostRows(*(list(map(int, c)) for c in (rows.lanes, rows.starts, rows.counts)))
        # tokens, lanes, positions, slots; the columns of Batch begin with the last two
        columns = given.rows
        sliding = self.sliding_table, columns.sliding_slots
        tokens = self._stage(*columns[:4], self.last_token, self.table, self.history, *sliding)
        batch = Batch(
            *(tokens, self.table, *columns[2:-1], max_count, host, *sliding),
            lanes=columns.token_lanes,
            shared=_shared(given.shared),
        )
        return self.model.forward(batch, self.kv)

    def _end(
        self, hidden: Tensor, given: StepColumns[Tensor], variant: SamplerVariant
    ) -> SampledTokens:
        """Compute tokens from the hidden states of the sampled rows; captured in graphs."""
        logits = changed = self.model.logits(hidden)
        if variant.penalized and not self.group.rank:
            assert given.penalties is not None
            changed = logits.clone() if variant.scored else logits
            penalties = Penalties(*(column[: len(hidden)] for column in given.penalties))
            self.sampler.penalize(changed, self.history, penalties, self.max_len)
        chosen = self._sample(
            changed, given.sampling, greedy=variant.greedy, truncates=variant.truncates
        )
        if not variant.scored or self.group.rank:
            return chosen.int(), None
        return chosen.int(), self.sampler.log_probs(logits, chosen, 0)[0]

    def _sample(
        self, logits: Tensor, given: SamplingColumns[Tensor], *, greedy: bool, truncates: bool
    ) -> Tensor:
        """Tokens [n] int64 of logits [n, vocab_size], the same on every rank; updates the lanes."""
        num = len(logits)
        if self.group.rank:
            chosen = torch.empty(num, dtype=torch.int64, device=logits.device)
        else:
            wanted = SamplingTensors(
                temperature=given.temperature[:num],
                top_k=given.top_k[:num],
                top_p=given.top_p[:num],
                min_p=given.min_p[:num],
                uniform=given.uniform[:num],
                all_greedy=greedy,
                truncates=truncates,
            )
            chosen = self.sampler.sample(logits, wanted)
        self.last_token[given.lanes[:num].long()] = self.group.broadcast(chosen)
        return chosen

    def _choose(
        self,
        logits: Tensor,
        work: PreparedStep,
        given: SamplingColumns[Tensor],
        extras: OptionalInputs[Tensor],
        scored: list[ScoredTensors],
    ) -> Outputs:
        batch, changed = work.batch, logits
        if (batch.changes or batch.penalties) and self.group.rank == 0:
            changed = logits.clone() if batch.num_top >= 0 else logits
            self._change(changed, work, extras)
        chosen = self._sample(changed, given, greedy=batch.all_greedy, truncates=batch.truncates)
        logprobs = None
        if batch.num_top >= 0 and self.group.rank == 0:
            logprobs = self.sampler.log_probs(logits, chosen, batch.num_top)
            if extras.given is not None:
                put_given(logits, chosen, logprobs, *extras.given)
        return Outputs(chosen.int(), logprobs, scored)

    def _change(self, logits: Tensor, work: PreparedStep, extras: OptionalInputs[Tensor]) -> None:
        if extras.bias is not None:
            self.sampler.add_bias(logits, *extras.bias)
        if extras.penalties is not None and work.batch.penalties is not None:
            longest = int(work.batch.penalties.lens.max())
            self.sampler.penalize(logits, self.history, extras.penalties, longest)
        if extras.lengths is not None:
            raise_ends(logits, *extras.lengths, self.ends)
        if extras.masks is not None:
            apply_token_bitmask(logits, *extras.masks)

    def _score(
        self, hidden: Tensor, rows: list[Scored], targets: PromptTargets[Tensor] | None
    ) -> list[ScoredTensors]:
        """Log-probabilities of prompt tokens, in slices so that few logits exist at a time."""
        if targets is None:
            return []
        found, begin = [], 0
        for row in rows:
            pieces = []
            for first in range(0, len(row.targets), LOGIT_ROWS):
                at = begin + first
                some = targets.tokens[at : begin + min(first + LOGIT_ROWS, len(row.targets))].long()
                logits = self.model.logits(hidden[row.first + first :][: len(some)])
                pieces.append(self.sampler.log_probs(logits, some, row.num_top))
            begin += len(row.targets)
            chosen, ids, top = (torch.cat(column) for column in zip(*pieces, strict=True))
            found.append((row, chosen, ids, top))
        return found


def _shared(columns: SharedRowColumns[Tensor] | None) -> SharedRows | None:
    """What the decode rows of a step read only once."""
    if columns is None:
        return None
    return SharedRows(columns.groups.view(4, -1), *columns[:-1])


def _known(plan: StepPlan, max_len: int) -> Scatter[HostColumn] | None:
    """Tokens of opened lanes that the history must hold before penalties read it."""
    lanes = [(o.lane, np.frombuffer(o.known, np.int32)) for o in plan.opened if o.known]
    if not lanes:
        return None
    where = [np.arange(len(ids), dtype=np.int32) + lane * max_len for lane, ids in lanes]
    return Scatter(np.concatenate(where, dtype=np.int32), np.concatenate([ids for _, ids in lanes]))


def _step_ops(model: Model) -> tuple[Callable[..., Tensor], Sampler]:
    """The kernels before the model, :func:`asyncllm.kernels.embedding.stage`, and after it."""
    # imported here: without a GPU there may be no Triton
    if model.site.device.type != "cpu":
        from asyncllm.engine.sampling_cuda import TritonSampler
        from asyncllm.kernels.embedding import stage

        return stage, TritonSampler(model.vocab_size, model.site.device)
    from asyncllm.engine import ops_cpu

    return ops_cpu.stage, TorchSampler()
