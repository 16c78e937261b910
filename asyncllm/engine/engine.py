"""One step on one device: the tensors of a rank and what a plan does to them.

Owns K/V, the lane tables and the last token of every lane. Knows neither actors nor why a row is
in a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncllm.engine.bitmask import apply_token_bitmask, mask_columns
from asyncllm.engine.graphs import Bucket, Graphs
from asyncllm.engine.parallel import Group
from asyncllm.engine.sampler_graphs import (
    Ended,
    SamplerGraphs,
    SamplerVariant,
    penalty_matrix,
    tail_columns,
)
from asyncllm.engine.sampling import Penalties, Sampler, SamplingTensors, TorchSampler, raise_ends
from asyncllm.engine.sampling_table import SamplingBatch, SamplingTable, Scored
from asyncllm.engine.step_inputs import Columns, Placed, Rows, Uploader, unpack
from asyncllm.messages import StepPlan
from asyncllm.models.attention import Batch, HostRows, zeros
from asyncllm.models.model import Model

LOGIT_ROWS = 256  # prompt log-probabilities: rows of logits that exist at a time


ScoredTensors = tuple[Scored, Tensor, Tensor, Tensor]  # chosen, top ids, top values


@dataclass(slots=True)
class Work:
    """A plan, read on the host; needs nothing more from the lane table."""

    step: int
    rows: Rows
    bucket: Bucket | None  # the graph that runs it; None: eager
    tail: SamplerVariant | None  # the graph that runs its end; None: eager
    choice: SamplingBatch
    scored: list[Scored]
    columns: Columns
    penalty_len: int  # longest history of a penalised row; 0: none


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
        num_slots: tokens whose K/V fit; slot ``num_slots`` is a dump for padding.
        num_lanes: requests that can be under way at once.
        max_len: longest sequence.
        eos_ids: end tokens of the model, for min_new_tokens and length penalties.
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
    ) -> None:
        self.model, self.group, self.max_len, self.num_slots = model, group, max_len, num_slots
        self.device = device = model.site.device
        self.kv = model.site.attention.layout.allocate(num_slots + 1, device)
        # one lane more than requests can have: padding writes there
        self.table = zeros((num_lanes + 1, max_len), torch.int32, device)
        self.history = zeros((num_lanes + 1, max_len), torch.int32, device)
        self.last_token = zeros((num_lanes + 1,), torch.int64, device)
        self.num_lanes = num_lanes
        self.lanes = SamplingTable(num_lanes, model.vocab_size, eos_ids)
        ends = [i for i in eos_ids if i < model.vocab_size]
        self.ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self.graphs: Graphs | None = None
        self.tails: SamplerGraphs | None = None
        self._no_top = torch.empty(num_lanes, 0, device=device)
        self._row_numbers = torch.arange(num_lanes, dtype=torch.int32, device=device)
        self._stage, self.sampler = _step_ops(model)
        self._uploader = Uploader(device)

    def capture(self, stream: torch.cuda.Stream, most_tokens: int) -> None:
        """Make CUDA graphs for decode steps, and for mixed steps up to ``most_tokens`` tokens.

        Every rank must call this at the same time, while no step is in flight.
        """
        hidden = zeros((self.num_lanes, self.model.hidden_size), self.model.site.dtype, self.device)
        tails = SamplerGraphs(self._end, self._uploader, hidden, dump_lane=self.num_lanes)
        graphs = Graphs(
            self._forward,
            self._uploader,
            tails.columns(),
            most_rows=self.num_lanes,
            most_tokens=most_tokens,
            dump_lane=self.num_lanes,
            dump_slot=self.num_slots,
        )
        pool = torch.cuda.graph_pool_handle()
        graphs.capture(stream, pool)
        tails.capture(stream, pool)
        self.graphs, self.tails = graphs, tails

    def close(self) -> None:
        """Free the graphs, which must go before the collectives that they hold."""
        for held in (self.graphs, self.tails):
            if held is not None:
                held.close()

    def prepare(self, plan: StepPlan) -> Work:
        """Read ``plan``; host work only. Plans must come in order: lanes are opened here."""
        self.lanes.open(plan)
        rows = unpack(plan, self.max_len)
        choice = self.lanes.choice(rows, masked=bool(plan.masks))
        scored = self.lanes.scores(rows)
        bucket, tail = None, None
        columns, penalties = tail_columns(choice, rows), self._penalty_columns(rows, choice)
        if self.graphs is not None and self.tails is not None:
            bucket, tail = self.graphs.pick(rows), self.tails.pick(choice)
            if penalties and tail is not None:
                columns["penalties"] = penalty_matrix(penalties, len(choice.temperature))
                penalties = {}
            columns = self.tails.columns(columns)
        columns |= self._row_columns(rows, bucket)
        columns |= penalties
        if choice.bias_rows:
            columns["bias_rows"] = np.array(choice.bias_rows, np.int32)
            columns["bias_tokens"] = np.array(choice.bias_tokens, np.int32)
            columns["bias_values"] = np.array(choice.bias_values, np.float32)
        if len(choice.length_rows):
            columns["length_rows"] = choice.length_rows
            columns["length_scales"] = choice.length_scales
        penalty_len = int(penalties["pen_lens"].max()) if penalties else 0
        for i, part in enumerate(scored):
            columns[f"targets{i}"] = part.targets
        columns |= self._known_columns(plan)
        columns |= mask_columns(plan, rows)
        return Work(plan.step, rows, bucket, tail, choice, scored, columns, penalty_len)

    @torch.inference_mode()
    def execute(self, work: Work) -> Outputs:
        """Run the step; returns as soon as everything is queued on the device."""
        rows = work.rows
        d = self._uploader.upload(work.columns)
        if "known" in d:
            self.history.view(-1).index_copy_(0, d["known_where"].long(), d["known"])
        if "cached_slots" in d:
            self.table.view(-1).index_copy_(0, d["cached_where"].long(), d["cached_slots"])
        if work.bucket is not None:
            assert self.graphs is not None
            hidden = self.graphs.replay(work.bucket)
        else:
            hidden = self._forward(d, None, rows)
        scored = [self._score(hidden, s, d[f"targets{i}"]) for i, s in enumerate(work.scored)]
        num_sampled = len(work.choice.temperature)
        if not num_sampled:
            return Outputs(None, None, scored)
        picked = None
        if num_sampled < len(rows.tokens):  # else a decode step: no need to pick
            picked = d["logit_rows"][:num_sampled]
        if work.tail is None:
            last = hidden[:num_sampled] if picked is None else hidden[picked.long()]
            return self._choose(self.model.logits(last), work, d, scored)
        assert self.tails is not None
        tokens, scores = self.tails.replay(work.tail, hidden, picked, num_sampled)
        if scores is None:
            return Outputs(tokens, None, scored)
        none = self._no_top[:num_sampled]
        return Outputs(tokens, (scores, none.int(), none), scored)

    def _row_columns(self, rows: Rows, bucket: Bucket | None) -> Columns:
        """What the decoder needs; in the fixed shapes of ``bucket`` where there is one."""
        columns: Columns
        if bucket is not None:
            assert self.graphs is not None
            columns = self.graphs.columns(bucket, rows)
        else:
            nd = rows.num_decode
            columns = {
                "tokens": rows.tokens,
                "token_lanes": rows.token_lanes,
                "positions": rows.positions,
                "slots": rows.slots,
                "decode_lanes": rows.lanes[:nd],
                "decode_lens": rows.starts[:nd] + 1,
                "prefill_lanes": rows.lanes[nd:],
                "prefill_starts": rows.starts[nd:],
                "prefill_cu": rows.cu[nd:],
            }
        if len(rows.cached_slots):
            columns |= {"cached_where": rows.cached_where, "cached_slots": rows.cached_slots}
        return columns

    def _forward(self, d: Placed, bucket: Bucket | None, rows: Rows | None = None) -> Tensor:
        """The decoder on a step's columns; what a graph captures, so without any host decision."""
        host, max_count = None, bucket.num_tokens if bucket else 0
        if rows is not None:
            rest = rows.counts[rows.num_decode :]
            max_count = int(rest.max()) if len(rest) else 0
            columns = (rows.lanes, rows.starts, rows.counts)
            host = HostRows(*(list(map(int, column)) for column in columns))
        batch = Batch(
            tokens=self._stage(
                d["tokens"],
                d["token_lanes"],
                positions := d["positions"],
                slots := d["slots"],
                self.last_token,
                self.table,
                self.history,
            ),
            positions=positions,
            slots=slots,
            table=self.table,
            decode_lanes=d["decode_lanes"],
            decode_lens=d["decode_lens"],
            prefill_lanes=d["prefill_lanes"],
            prefill_starts=d["prefill_starts"],
            prefill_cu=d["prefill_cu"],
            max_count=max_count,
            host=host,
        )
        return self.model.forward(batch, self.kv)

    def _end(self, hidden: Tensor, d: Placed, tail: SamplerVariant) -> Ended:
        """From hidden states of the rows that sample to their tokens; what a graph captures."""
        logits = changed = self.model.logits(hidden)
        if tail.penalized and not self.group.rank:
            changed = logits.clone() if tail.scored else logits
            self.sampler.penalize(changed, self.history, self._penalties(d, len(hidden)))
        chosen = self._sample(changed, d, greedy=tail.greedy, truncates=tail.truncates)
        if not tail.scored or self.group.rank:
            return chosen.int(), None
        return chosen.int(), self.sampler.log_probs(logits, chosen, 0)[0]

    def _penalties(self, d: Placed, num: int) -> Penalties:
        """Of all rows of a graph, from its matrix."""
        lens, prompt_lens, presence, frequency, repetition, prompt = d["penalties"][:, :num]
        return Penalties(
            rows=self._row_numbers[:num],
            lanes=d["sampled_lanes"][:num],
            lens=lens,
            prompt_lens=prompt_lens,
            max_len=self.max_len,
            presence=presence.view(torch.float32),
            frequency=frequency.view(torch.float32),
            repetition=repetition.view(torch.float32),
            penalize_prompt=prompt,
        )

    def _sample(self, logits: Tensor, d: Placed, *, greedy: bool, truncates: bool) -> Tensor:
        """Tokens [n] int64 of logits [n, vocab_size], the same on every rank; lanes keep them."""
        num = len(logits)
        if self.group.rank:
            chosen = torch.empty(num, dtype=torch.int64, device=logits.device)
        else:
            given = SamplingTensors(
                temperature=d["temperature"][:num],
                top_k=d["top_k"][:num],
                top_p=d["top_p"][:num],
                min_p=d["min_p"][:num],
                uniform=d["uniform"][:num],
                all_greedy=greedy,
                truncates=truncates,
            )
            chosen = self.sampler.sample(logits, given)
        self.last_token[d["sampled_lanes"][:num].long()] = self.group.broadcast(chosen)
        return chosen

    def _choose(
        self, logits: Tensor, work: Work, d: Placed, scored: list[ScoredTensors]
    ) -> Outputs:
        choice, changed = work.choice, logits
        if (choice.changes or choice.penalized) and self.group.rank == 0:
            changed = logits.clone() if choice.num_top >= 0 else logits
            self._change(changed, work, d)
        chosen = self._sample(changed, d, greedy=choice.all_greedy, truncates=choice.truncates)
        logprobs = None
        if choice.num_top >= 0 and self.group.rank == 0:
            logprobs = self.sampler.log_probs(logits, chosen, choice.num_top)
        return Outputs(chosen.int(), logprobs, scored)

    def _change(self, logits: Tensor, work: Work, d: Placed) -> None:
        if work.choice.bias_rows:
            self.sampler.add_bias(logits, d["bias_rows"], d["bias_tokens"], d["bias_values"])
        if work.penalty_len:
            penalties = Penalties(
                rows=d["pen_rows"],
                lanes=d["pen_lanes"],
                lens=d["pen_lens"],
                prompt_lens=d["pen_prompt_lens"],
                max_len=work.penalty_len,
                presence=d["pen_presence"],
                frequency=d["pen_frequency"],
                repetition=d["pen_repetition"],
                penalize_prompt=d["pen_prompt"],
            )
            self.sampler.penalize(logits, self.history, penalties)
        if "length_rows" in d:
            raise_ends(logits, d["length_rows"], d["length_scales"], self.ends)
        if "masks" in d:
            apply_token_bitmask(logits, d["mask_rows"], d["masks"])

    def _score(self, hidden: Tensor, part: Scored, targets: Tensor) -> ScoredTensors:
        """Log-probabilities of prompt tokens, in slices so that few logits exist at a time."""
        pieces = []
        for first in range(0, len(part.targets), LOGIT_ROWS):
            some = targets[first : first + LOGIT_ROWS].long()
            at = part.first + first
            logits = self.model.logits(hidden[at : at + len(some)])
            pieces.append(self.sampler.log_probs(logits, some, part.num_top))
        chosen, ids, top = (torch.cat(column) for column in zip(*pieces, strict=True))
        return part, chosen, ids, top

    def _known_columns(self, plan: StepPlan) -> Columns:
        """Tokens of opened lanes that the history must hold before penalties read it."""
        lanes = [(lane, np.frombuffer(ids, np.int32)) for lane, _, _, ids in plan.opened if ids]
        if not lanes:
            return {}
        where = [np.arange(len(ids), dtype=np.int32) + lane * self.max_len for lane, ids in lanes]
        return {
            "known_where": np.concatenate(where, dtype=np.int32),
            "known": np.concatenate([ids for _, ids in lanes]),
        }

    def _penalty_columns(self, rows: Rows, choice: SamplingBatch) -> Columns:
        """Of the rows that have penalties; {} if none has."""
        if not choice.penalized:
            return {}
        picked = np.array(choice.penalized, np.int32)
        lanes, t = rows.lanes[rows.samples][picked], self.lanes
        return {
            "pen_rows": picked,
            "pen_lanes": lanes,
            "pen_lens": rows.sampled_lens[picked],
            "pen_prompt_lens": t.prompt_len[lanes],
            "pen_presence": t.presence[lanes],
            "pen_frequency": t.frequency[lanes],
            "pen_repetition": t.repetition[lanes],
            "pen_prompt": t.penalize_prompt[lanes].astype(np.int32),
        }


def _step_ops(model: Model) -> tuple[Callable[..., Tensor], Sampler]:
    """What comes before the model, :func:`asyncllm.kernels.embedding.stage`, and after it."""
    # imported here: Triton need not exist where there is no GPU
    if model.site.device.type == "cuda":
        from asyncllm.engine.sampling_cuda import TritonSampler
        from asyncllm.kernels.embedding import stage

        return stage, TritonSampler(model.vocab_size, model.site.device)
    from asyncllm.engine import ops_cpu

    return ops_cpu.stage, TorchSampler()
