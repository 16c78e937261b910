"""What K/V or weights in 8 bits cost: nats per token of a text, and how long greedy answers stay the
same.

    python bench/perplexity.py --model_dir /models/x --text book.txt
    python bench/perplexity.py --modes none triton_int8kv triton_fp8kv+triton_gqa_attention
    python bench/perplexity.py --quant_types none fp8w8a8 fp8w8a8-b128 w8a8
    python bench/perplexity.py --model_dir model.gguf --quant_types none stored

Each of ``--modes`` is what --mode may be given, joined by "+", each of ``--quant_types`` what --quant_type
may be, or "stored": the bits that the checkpoint has. Each runs in a process of its own; all are compared with the first. Other options are asyncllm's. Without ``--text`` it is the chapters of
Python's language reference that come with every Python.

The text is cut into windows. The first half of one is computed in chunks, the second half behind a hit
of the prefix cache, in chunks too: all but the first chunk read rows as they lie in memory. So do the
greedy answers to 30 questions, behind prompts that are computed like the text.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from asyncllm.api.common.chat_template import ChatTemplate
from asyncllm.codec import i32
from asyncllm.core.request import SamplingParams
from asyncllm.errors import StartupError
from asyncllm.messages import StepPlan
from asyncllm.records import OpenedLane
from asyncllm.server.loading import Loaded, memory_plan
from asyncllm.text import ModelTokenizer
from bench.offline import engine_config, load

STORED = "stored"  # no --quant_type
SCORED = SamplingParams(temperature=0.0, prompt_logprobs=0)
GREEDY = SamplingParams(temperature=0.0)
LONGEST = 200  # tokens of the prompt of a question, at most
QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "How many days does a leap year have?",
    "Explain why the sky is blue.",
    "What is photosynthesis?",
    "Name three primary colours.",
    "Translate 'good morning' into Spanish.",
    "Write one sentence about autumn.",
    "What does a heart do?",
    "How do I boil an egg?",
    "Give me two reasons to learn to swim.",
    "What is the difference between a lake and a river?",
    "Who was Isaac Newton?",
    "What is a prime number?",
    "Describe a cat to somebody who has never seen one.",
    "What is the largest ocean?",
    "Summarise the story of Cinderella in one sentence.",
    "Why do we sleep?",
    "What is a computer program?",
    "Write a short poem about the sea.",
    "How does a bicycle stay upright?",
    "What is the boiling point of water?",
    "Give an example of a metaphor.",
    "What should I pack for a day in the mountains?",
    "Who painted the Mona Lisa?",
    "What is inflation in economics?",
    "How do bees make honey?",
    "What is the plural of 'mouse'?",
    "Why is exercise good for health?",
    "Tell me a fact about the moon.",
)
WEIGHTS = "quant_type="  # begins what a child is told of --quant_types
MODES = ("none", "triton_int8kv", "ppl_int8kv", "triton_fp8kv")
Figures = dict[str, Any]


@dataclass(slots=True)
class Lane:
    """A sequence on the device.

    Attributes:
        slots: of its tokens; at the beginning those of a prefix hit.
        scores: log-probabilities of the computed ids; the first one has none.
    """

    number: int
    ids: Sequence[int]
    params: SamplingParams
    slots: list[int] = field(default_factory=list)
    computed: int = 0
    scores: list[float] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)


class Feed:
    """Plans steps by hand; slots are given in order and never back, until ``clear``."""

    def __init__(self, loaded: Loaded) -> None:
        assert loaded.device is not None
        self._device, self._slides = loaded.device, loaded.window is not None
        self._room = loaded.num_slots.sliding if self._slides else loaded.num_slots.full
        self._used = self._step = 0

    def clear(self) -> None:
        self._used = 0

    def run(self, lanes: Sequence[Lane], count: int) -> None:
        """A step with the next ``count`` tokens of each, or what is left of its ids; one token
        each if none is."""
        slots, tokens, starts, counts, cached, opened = [], [], [], [], [], []
        for lane in lanes:
            first, head = lane.computed == 0, len(lane.slots)
            lane.computed = head
            new = list(lane.ids[head : head + count]) or [-1]
            if first:
                known = lane.ids if lane.params.prompt_logprobs >= 0 else []
                opened.append(OpenedLane(lane.number, len(lane.ids), lane.params, i32(known)))
            if self._used + len(new) > self._room:
                raise StartupError(f"{self._room:,} slots are too few: raise --max_total_token_num")
            mine = list(range(self._used, self._used + len(new)))
            self._used += len(new)
            slots += (lane.slots if first else []) + mine
            cached.append(head if first else 0)
            lane.slots = lane.slots + mine
            lane.computed += len(new)
            tokens += new
            starts.append(head)
            counts.append(len(new))
        assert sorted(counts, key=lambda n: n != 1) == counts
        self._step += 1
        done = self._device.launch(
            StepPlan(
                step=self._step,
                num_decode=counts.count(1),
                lanes=i32(lane.number for lane in lanes),
                starts=i32(starts),
                counts=i32(counts),
                cached_counts=i32(cached),
                slots=i32(slots),
                tokens=i32(tokens),
                samples=bytearray(lane.computed >= len(lane.ids) for lane in lanes),
                opened=opened,
                sliding=i32(slots if self._slides else []),
            )
        ).wait()
        for lane, token in zip(lanes, done.tokens, strict=True):
            lane.outputs += [token] if token >= 0 else []
        for row, found in done.prompt:
            lanes[row].scores += found.chosen


def score(feed: Feed, ids: Sequence[int], chunk: int) -> list[float]:
    """Log-probabilities of all ids of a window but the first."""
    feed.clear()
    half = len(ids) // 2
    first = Lane(0, ids[:half], SCORED)
    while first.computed < half:
        feed.run([first], chunk)
    second = Lane(1, ids, SCORED, slots=first.slots[:-1])
    while second.computed < len(ids):
        feed.run([second], chunk)
    found = first.scores + second.scores
    assert len(found) == len(ids) - 1, "every token is scored once"
    return found


def answer(
    feed: Feed, prompts: Sequence[Sequence[int]], num: int, chunk: int
) -> tuple[list[list[int]], float]:
    """Greedy answers of ``num`` tokens, all rows together, and tokens per second of decode."""
    feed.clear()
    lanes = [Lane(i, ids, GREEDY) for i, ids in enumerate(prompts)]
    for lane in lanes:
        while lane.computed < len(lane.ids):
            feed.run([lane], chunk)
    begin = time.perf_counter()
    for _ in range(num - 1):
        feed.run(lanes, 1)
    spent = time.perf_counter() - begin
    return [lane.outputs for lane in lanes], len(lanes) * (num - 1) / spent


def questions(text: ModelTokenizer) -> list[list[int]]:
    """Ids of ``QUESTIONS``, as chats where the model knows what a chat is."""
    prompts, add = list(QUESTIONS), True
    if text.templates:
        template, add = ChatTemplate(text.templates, text.special_tokens), False
        chats = ([{"role": "user", "content": question}] for question in prompts)
        prompts = [template.render({"messages": messages}) for messages in chats]
    return [list(text.encode(prompt, add)) for prompt in prompts]


def python_reference() -> str:
    """Chapters of the language reference, in pydoc's words."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 4000)


def measure(a: argparse.Namespace, loaded: Loaded) -> Figures:
    """The figures of one variant."""
    assert loaded.text is not None
    text = python_reference() if a.text is None else a.text.read_text()
    head = list(loaded.text.encode("", add_special_tokens=True))
    ids = list(loaded.text.encode(text, add_special_tokens=False))
    windows = [head + ids[at : at + a.window] for at in range(0, len(ids), a.window)][: a.windows]
    if len(windows) < a.windows or len(windows[-1]) < a.window // 2:
        raise StartupError(f"the text has {len(ids):,} tokens, fewer than {a.windows} windows")
    feed, begin = Feed(loaded), time.perf_counter()
    found = [value for window in windows for value in score(feed, window, a.chunk)]
    spent = time.perf_counter() - begin
    outputs, decode = answer(feed, questions(loaded.text), a.out, a.chunk)
    plan = memory_plan(loaded.boot, loaded.spec)
    return {
        "nats": -sum(found) / len(found),
        "tokens": len(found),
        "prefill": len(found) / spent,
        "decode": decode,
        "slot": sum(plan.division.slot),
        "weights": plan.weights,
        "outputs": outputs,
    }


def kept(first: Figures, other: Figures, num: int) -> int:
    """Greedy answers whose first ``num`` tokens are those of ``first``."""
    pairs = zip(first["outputs"], other["outputs"], strict=True)
    return sum(a[:num] == b[:num] for a, b in pairs)


def table(found: dict[str, Figures], num: int) -> str:
    """For people; ``num``: tokens of a greedy answer that are compared."""
    first = next(iter(found.values()))
    lines = [
        f"{first['tokens']:,} tokens; greedy answers that keep their first {num} tokens, "
        f"of {len(first['outputs'])}; tokens a second",
        "| | nats per token | difference | perplexity | greedy | bytes a token | slots | prefill | decode | "
        "weights, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, now in found.items():
        off = now["nats"] - first["nats"]
        lines.append(
            f"| {name} | {now['nats']:.4f} | {off:+.4f} | {100 * math.expm1(off):+.2f} % | "
            f"{kept(first, now, num)} | {now['slot']:,} | x {first['slot'] / now['slot']:.2f} | "
            f"{now['prefill']:.0f} | {now['decode']:.0f} | {now['weights'] / 2**20:.1f} |"
        )
    return "\n".join(lines)


def in_a_child(name: str, argv: Sequence[str]) -> Figures:
    """``measure`` in a process of its own, which gives all memory back."""
    done = subprocess.run(
        [sys.executable, __file__, *argv, "--child", name], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise StartupError(f"{name} has failed with exit code {done.returncode}")
    figures: Figures = json.loads(done.stdout)
    return figures


def child(a: argparse.Namespace, rest: Sequence[str]) -> Figures:
    kind = a.child.removeprefix(WEIGHTS)
    if kind != a.child:
        names = [] if kind == STORED else ["--quant_type", kind]
    else:
        names = [] if kind == "none" else ["--mode", *kind.split("+")]
    limits = {
        "--max_total_token_num": 2 * a.window + len(QUESTIONS) * (LONGEST + a.out),
        "--max_req_total_len": a.window + LONGEST + a.out,
        "--running_max_req_size": len(QUESTIONS),
        "--chunked_prefill_size": a.chunk,
        "--batch_max_tokens": max(a.chunk, len(QUESTIONS)),
    }
    words = [str(word) for name, value in limits.items() for word in (name, value)]
    loaded = load(engine_config([*words, *names, *rest]))
    try:
        return measure(a, loaded)
    finally:
        assert loaded.device is not None
        loaded.device.close()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    p.add_argument(
        "--modes", nargs="+", default=MODES, metavar="MODE", help="the first is the base"
    )
    p.add_argument(
        "--quant_types",
        nargs="+",
        metavar="TYPE",
        help="in the place of modes; the first is the base",
    )
    p.add_argument("--text", type=Path, metavar="FILE", help="default: Python's language reference")
    p.add_argument("--window", type=int, default=1024, help="tokens of a window")
    p.add_argument("--windows", type=int, default=8, help="as many of them, from the beginning")
    p.add_argument("--chunk", type=int, default=128, help="tokens of a step")
    p.add_argument("--out", type=int, default=16, help="tokens of a greedy answer")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    a, rest = parser().parse_known_args(given)
    try:
        if a.child:
            print(json.dumps(child(a, rest)))
            return 0
        names = [WEIGHTS + kind for kind in a.quant_types] if a.quant_types else a.modes
        found = {name.removeprefix(WEIGHTS): in_a_child(name, given) for name in names}
    except StartupError as error:
        sys.stderr.write(f"perplexity.py: {error}\n")
        return 2
    print(table(found, a.out))
    if a.json:
        a.json.write_text(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
