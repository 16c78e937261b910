"""Measure guessed tokens: how many come out of a step, and what they gain or cost.

    python bench/speculation.py --model_dir /models/x --device cuda
    python bench/speculation.py --device cpu --own --n 50 --out 96

Options that are not listed in ``--help`` are asyncllm's own. Three kinds of text, each with and
without ``--speculative ngram``, by ``--conc`` requests at a time:

- edits: parts of this project's files and what became of them (``edits.jsonl``, 50 of them)
- other: the same answers to prompts that have nothing to do with them
- json: facts of a short text, by a JSON schema (``structured.jsonl``, 16 of them)

Answers are the real ones whatever the model says: the device computes and samples as always, then
its tokens are replaced. So a model of random weights has the times and the tokens per step of one
that edits well; tokens are pieces of words then, of 3.5 characters on average. With ``--own`` they are the model's own, greedy ones for edits; other texts are then
sampled stories. Structured answers are always in the model's tokens. Tokens must be equal with and without, else this ends with 1 (``--own`` in float32).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import uvloop

from asyncllm.actors.base import Actor
from asyncllm.actors.runner import PendingStep, Runner
from asyncllm.actors.scheduler import Scheduler
from asyncllm.actors.system import ActorSystem
from asyncllm.api.parsing.output_parser import dialect_of
from asyncllm.constrain.factory import ConstraintFactory
from asyncllm.constrain.llguidance_backend import GrammarEngine
from asyncllm.core.ngram_lookup import NgramLookup
from asyncllm.core.request import SamplingParams
from asyncllm.core.speculation import Speculation
from asyncllm.engine.device import CpuDevice, CudaDevice
from asyncllm.environment import cache_dir
from asyncllm.errors import StartupError
from asyncllm.hub import resolve_model_dir
from asyncllm.messages import Finished, StepDone, StepPlan, Submit, Tokens
from asyncllm.server.assembly import make_allocator, make_scheduler
from asyncllm.server.loading import Loaded, load_grammars
from asyncllm.text import ModelTokenizer, load_tokenizer
from bench.offline import engine_config, load

EDITS = Path(__file__).with_name("edits.jsonl")
STRUCTURED = Path(__file__).with_name("structured.jsonl")
ASKED = (
    "<|im_start|>user\nIn {file}: {change}\n```\n{before}\n```<|im_end|>\n"
    "<|im_start|>assistant\n```\n"
)
FORM = (
    "<|im_start|>user\n{ask}\nAnswer with JSON of the schema {schema}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
STORY = "<|im_start|>user\nTell me a story about {change}<|im_end|>\n<|im_start|>assistant\n"
PIECE = re.compile(r" ?\w{1,5}|\s+|.")
KINDS = ("edits", "other", "json")
TEXTS_A_ROW = 8  # for each request at a time, at most
WARM = 2  # requests before each kind, without a figure


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, and the answer that is to come."""

    prompt: array[int]
    answer: array[int]
    temperature: float = 0.0
    grammar: tuple[str, str] | None = None


@dataclass(slots=True)
class Figures:
    """What one kind of text took."""

    kind: str
    conc: int
    guesses: bool
    wall_s: float
    tokens: int
    steps: int
    turns: int  # of requests in steps: a step counts once for each that it has a token of
    drafted: int
    accepted: int
    outputs: list[list[int]]
    alone: dict[str, float] = field(default_factory=dict)  # see ``alone``

    @property
    def per_step(self) -> float:
        """Tokens that a request gets of a step that it is in."""
        return self.tokens / max(1, self.turns)


class Scripted:
    """A device whose tokens are replaced; implements the runner's ``Device``.

    A lane's request is known by its seed.
    """

    def __init__(self, device: CpuDevice | CudaDevice) -> None:
        self._device = device
        self._lanes: dict[int, tuple[int, array[int]]] = {}  # prompt_len, answer
        self.answers: list[array[int]] = []  # by seed; none: the model's own
        self.steps = self.turns = 0

    def launch(self, plan: StepPlan) -> PendingStep:
        for opened in plan.opened if self.answers else ():
            self._lanes[opened.lane] = opened.prompt_len, self.answers[opened.params.seed]
        pending = self._device.launch(plan)
        self.steps += 1
        sampled = [lane for lane, samples in zip(plan.lanes, plan.samples, strict=True) if samples]
        self.turns += len(set(sampled))
        return _Replaced(self, plan, pending)

    def replaced(self, plan: StepPlan, done: StepDone) -> StepDone:
        """``done`` with the tokens of the script."""
        if not self.answers:
            return done
        tokens, columns = done.tokens[:], (plan.lanes, plan.starts, plan.counts, plan.samples)
        for i, (lane, start, count, samples) in enumerate(zip(*columns, strict=True)):
            if samples:
                prompt_len, answer = self._lanes[lane]
                tokens[i] = answer[min(start + count - prompt_len, len(answer) - 1)]
        return replace(done, tokens=tokens)

    def close(self) -> None:
        self._device.close()


class _Replaced:
    """A launched step whose tokens will be replaced."""

    def __init__(self, script: Scripted, plan: StepPlan, pending: PendingStep) -> None:
        self._script, self._plan, self._pending = script, plan, pending
        self.gap_ms: float | None = None

    def wait(self) -> StepDone:
        done = self._pending.wait()
        self.gap_ms = self._pending.gap_ms
        return self._script.replaced(self._plan, done)


class Asker(Actor[Tokens | Finished]):
    """Stands where the detokenizer does; asks the next when one has ended."""

    def __init__(self) -> None:
        super().__init__("detokenizer")
        self.left: list[Submit] = []
        self.outputs: dict[int, list[int]] = {}
        self.asked = self.drafted = self.accepted = 0
        self.ended = asyncio.Event()
        self.error = ""

    def ask(self) -> None:
        """Submit one more, if there is one."""
        if self.left:
            submit = self.left.pop(0)
            self.outputs[submit.rid] = []
            self.asked += 1
            self.system.ref("scheduler").tell(submit)
        elif not self.asked:
            self.ended.set()

    def receive(self, batch: list[Tokens | Finished]) -> None:
        for msg in batch:
            if isinstance(msg, Tokens):
                for rid, token in zip(msg.rids, msg.tokens, strict=True):
                    self.outputs[rid].append(token)
                continue
            self.error = self.error or (msg.failure.detail if msg.failure else "")
            self.drafted += msg.drafted
            self.accepted += msg.accepted
            self.asked -= 1
            self.ask()


class Bench:
    """A loaded engine, without HTTP."""

    def __init__(self, loaded: Loaded, grammars: GrammarEngine) -> None:
        assert loaded.device is not None
        sizes = loaded.spec.vocab_size, loaded.boot.resolved.eos_ids
        loaded.constraints = ConstraintFactory(*sizes, grammars.constrain)
        self._device, self._asker = Scripted(loaded.device), Asker()
        self._system = ActorSystem()
        scheduler = make_scheduler(loaded)
        assert isinstance(scheduler, Scheduler)
        self._core = scheduler.core
        self._speculation = self._core.speculation
        assert self._speculation is not None
        actors: list[Actor[Any]] = [make_allocator(loaded), scheduler, self._asker]
        for actor in (*actors, Runner(self._device, reports=True)):
            self._system.add(actor)
        self._rid = 0
        self._running = asyncio.create_task(self._system.run())

    @property
    def speculation(self) -> Speculation:
        assert self._speculation is not None
        return self._speculation

    async def run(
        self, kind: str, asked: Sequence[Asked], conc: int, *, guesses: bool, own: bool
    ) -> Figures:
        """Answer all, ``conc`` at a time."""
        self._core.speculation = self._speculation if guesses else None
        device, asker = self._device, self._asker
        device.answers = [] if own else [one.answer for one in asked]
        submits = [
            Submit(
                self._rid + i,
                one.prompt,
                SamplingParams(
                    max_new_tokens=len(one.answer),
                    temperature=one.temperature,
                    seed=i,
                    grammar=one.grammar,
                    ignore_eos=True,
                    use_cache=False,
                ),
            )
            for i, one in enumerate(asked)
        ]
        self._rid += len(asked)
        before = device.steps, device.turns, asker.drafted, asker.accepted
        asker.left, asker.outputs = submits, {}
        asker.ended.clear()
        begin = time.perf_counter()
        for _ in range(conc):
            asker.ask()
        ended = asyncio.create_task(asker.ended.wait())
        await asyncio.wait({ended, self._running}, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            await self._running
        if asker.error:
            raise StartupError(asker.error)
        outputs = [tokens for _, tokens in sorted(asker.outputs.items())]
        after = device.steps, device.turns, asker.drafted, asker.accepted
        wall_s, tokens = time.perf_counter() - begin, sum(map(len, outputs))
        steps, turns, drafted, accepted = (b - a for a, b in zip(before, after, strict=True))
        return Figures(
            kind=kind,
            conc=conc,
            guesses=guesses,
            wall_s=wall_s,
            tokens=tokens,
            steps=steps,
            turns=turns,
            drafted=drafted,
            accepted=accepted,
            outputs=outputs,
        )

    async def stop(self) -> None:
        self._system.stop()
        await self._running


def pieces(text: str) -> array[int]:
    """Ids of pieces of words, for models whose tokenizer is unlike those of real ones."""
    return array("i", (crc32(piece.encode()) % 30000 for piece in PIECE.findall(text)))


def _encoded(tokenizer: ModelTokenizer, text: str) -> array[int]:
    return array("i", tokenizer.encode(text, False))


def structured(
    tokenizer: ModelTokenizer, grammars: GrammarEngine, a: argparse.Namespace
) -> list[Asked]:
    """Prompts and answers by schemas, which are compiled here."""
    out = []
    for each in map(json.loads, STRUCTURED.read_text().splitlines()[: a.n]):
        schema = json.dumps(each["schema"])
        if ("schema", schema) not in grammars:
            grammars.keep("schema", schema, grammars.build("schema", schema))
        prompt = _encoded(tokenizer, FORM.format(ask=each["ask"], schema=schema))
        answer = _encoded(tokenizer, json.dumps(each["answer"]))
        answer += array("i", [0] * (a.out - len(answer))) if a.own else array("i")
        out.append(Asked(prompt, answer, grammar=("schema", schema)))
    return out


def texts(
    tokenizer: ModelTokenizer, grammars: GrammarEngine, a: argparse.Namespace
) -> dict[str, list[Asked]]:
    """Prompts and answers; any text will do, so other models' marks do."""
    ids: Callable[[str], array[int]] = partial(_encoded, tokenizer) if a.own else pieces
    edits = [json.loads(line) for line in EDITS.read_text().splitlines()][: a.n]
    answers = [ids(edit["after"] + "\n```")[: a.out] for edit in edits]
    asked = [Asked(ids(ASKED.format(**e)), x) for e, x in zip(edits, answers, strict=True)]
    others = edits[len(edits) // 2 :] + edits[: len(edits) // 2]
    story = [Asked(ids(STORY.format(**e)), x, 1.0) for e, x in zip(others, answers, strict=True)]
    strange = [Asked(ids(ASKED.format(**e)), x) for e, x in zip(others, answers, strict=True)]
    other = story if a.own else strange
    forms = structured(tokenizer, grammars, a) if "json" in a.kinds else []
    return {"edits": asked, "other": other, "json": forms}


async def measure(a: argparse.Namespace, loaded: Loaded) -> list[Figures]:
    """All runs."""
    folder = resolve_model_dir(loaded.boot.config.model_dir, cache_dir())
    tokenizer, vocab_size = load_tokenizer(str(folder)), loaded.spec.vocab_size
    grammars = load_grammars(
        tokenizer, dialect_of(tokenizer.templates), vocab_size, loaded.boot.resolved.eos_ids
    )
    bench, out = Bench(loaded, grammars), list[Figures]()
    try:
        for conc in a.conc:
            for kind, some in texts(tokenizer, grammars, a).items():
                if kind not in a.kinds:
                    continue
                num = max(conc, len(some) if a.own else min(len(some), TEXTS_A_ROW * conc))
                asked = [some[i % len(some)] for i in range(num)]
                for guesses in (False, True) * a.rounds:
                    if len(out) < 2:
                        await bench.run(kind, asked[:WARM], WARM, guesses=guesses, own=a.own)
                    got = await bench.run(kind, asked, conc, guesses=guesses, own=a.own)
                    got.alone = alone(asked, got.outputs, bench.speculation.most)
                    out.append(got)
                    print(line(got), flush=True)
    finally:
        await bench.stop()
    times = bench.speculation.times
    known = {rows: round(times.decoding(rows), 2) for rows in (1 << kind for kind in range(9))}
    print(f"step ms by rows {known}, gap ms {1e3 * times.gap_s:.2f}")
    return out


def alone(asked: Sequence[Asked], outputs: Sequence[Sequence[int]], most: int) -> dict[str, float]:
    """Tokens per step that the lookup gives where rows cost nothing, by the least chance of a
    draft that is tried."""
    out = {}
    for least in (0.1, 0.3, 0.5):
        steps = tokens = 0
        for one, output in zip(asked, outputs, strict=True):
            lookup, i = NgramLookup(one.prompt, len(one.prompt) + len(output)), 1
            lookup.read(len(one.prompt))
            lookup.push(output[0])
            while i < len(output):
                num = sum(chance >= least for chance in lookup.chances(most))
                for draft in (*(lookup.guess(num) if num else ()), None):
                    if i == len(output):
                        break
                    lookup.push(output[i])
                    i += 1
                    if draft != output[i - 1]:
                        break
                steps += 1
            tokens += len(output) - 1
        out[f"{least:g}"] = round(tokens / max(steps, 1), 2)
    return out


def line(some: Figures) -> str:
    """One run for people."""
    return (
        f"{some.kind:<7}{some.conc:>5} at a time {'with' if some.guesses else 'without':<8}"
        f"{some.tokens / some.wall_s:>9.1f} tok/s{some.per_step:>7.2f} tokens a step"
        f"{some.steps:>7} steps{some.drafted:>8} tried{some.accepted:>8} right"
    )


def summary(runs: Sequence[Figures]) -> tuple[str, bool]:
    """A line for each kind of text and number of requests; whether all tokens are the same."""
    lines, same = [], True
    for kind, conc in dict.fromkeys((some.kind, some.conc) for some in runs):
        these = [some for some in runs if (some.kind, some.conc) == (kind, conc)]
        off, on = ([s for s in these if s.guesses is guesses] for guesses in (False, True))
        speeds = [max(s.tokens / s.wall_s for s in part) for part in (off, on)]
        differ = sum(a != b for a, b in zip(off[-1].outputs, on[-1].outputs, strict=True))
        same &= not differ
        lines.append(
            f"{kind:<7}{conc:>5} at a time: {on[-1].per_step:.2f} tokens a step, "
            f"{speeds[1]:.1f} tok/s, x {speeds[1] / speeds[0]:.3f}, "
            f"{differ} of {len(on[-1].outputs)} answers differ; tokens a step of the lookup alone, "
            f"by its least chance: {on[-1].alone}"
        )
    return "\n".join(lines), same


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--n",
        type=int,
        default=32,
        help="texts of each kind; without --own 8 at most for each request at a time",
    )
    p.add_argument("--out", type=int, default=256, help="tokens of an answer at most")
    p.add_argument("--conc", type=int, nargs="+", default=[1, 8, 64], help="requests at a time")
    p.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    p.add_argument("--rounds", type=int, default=1, help="times without and with, in turns")
    p.add_argument("--own", action="store_true", help="the model's own answers")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    a, rest = p.parse_known_args(argv)
    try:
        config = engine_config(["--speculative", "ngram", *rest])
        runs = uvloop.run(measure(a, load(config)))
    except StartupError as error:
        sys.stderr.write(f"speculation.py: {error}\n")
        return 2
    told, same = summary(runs)
    print(told)
    if a.json:
        a.json.write_text(json.dumps([asdict(some) for some in runs]) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
