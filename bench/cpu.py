"""The embedded model on this machine's CPU: our server beside transformers, in one run.

    python bench/cpu.py [--tokens 64] [--rounds 3] [--model_dir DIR]

Both use the same threads and bfloat16. The server is asked over HTTP, transformers in a process of
its own after the server has ended, so that they do not compete. Each figure is the best of some
rounds. Prefill is the time to the first token of prompts that share nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from asyncllm.demo import ensure_demo_model
from asyncllm.environment import cache_dir, cpu_count, python_command
from bench.common import free_port

PREFILLS = (512, 1500)
PROMPT_LEN = 16


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1000, 40000) for _ in range(length)]


class Ours:
    """A server in a process of its own."""

    def __init__(self, model_dir: Path, extra: list[str]) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.process = subprocess.Popen(
            python_command(
                "-m", "asyncllm", "--device", "cpu", "--model_dir", str(model_dir),
                "--port", str(port), "--log_level", "warning", *extra,
            ),
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert b"ready" in self.process.stdout.readline()

    def generate(self, ids: list[int], num: int) -> tuple[float, float]:
        """Seconds to the first and to the last token."""
        body = {"prompt": ids, "max_tokens": num, "ignore_eos": True, "stream": True, "temperature": 0}  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )  # fmt: skip
        begin, first, last = time.perf_counter(), 0.0, 0.0
        with urllib.request.urlopen(request) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    last = time.perf_counter() - begin
                    first = first or last
        return first, last

    def decode(self, rng: random.Random, num_streams: int, num: int) -> float:
        """Tokens per second of all streams while all of them decode."""
        barrier = threading.Barrier(num_streams)

        def one(ids: list[int]) -> float:
            barrier.wait()
            return self.generate(ids, num)[1]

        with ThreadPoolExecutor(num_streams) as pool:
            begin = time.perf_counter()
            list(pool.map(one, [prompt(rng, PROMPT_LEN) for _ in range(num_streams)]))
        return num_streams * num / (time.perf_counter() - begin)


class Theirs:
    """transformers' generate."""

    def __init__(self, model_dir: Path) -> None:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModelForCausalLM

            torch.set_num_threads(cpu_count())
            self.torch = torch
            model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        self.model = model.eval()

    def generate(self, ids: list[int], num: int) -> float:
        """Seconds for ``num`` tokens."""
        box = self.torch.tensor([ids])
        begin = time.perf_counter()
        out = self.model.generate(
            box, attention_mask=box.ne(-1), max_new_tokens=num, min_new_tokens=num, do_sample=False
        )
        assert out.shape[1] == len(ids) + num
        return time.perf_counter() - begin


def ours(args: argparse.Namespace, model_dir: Path) -> dict[str, float]:
    rng, server = random.Random(0), Ours(model_dir, args.server_args)
    try:
        server.decode(rng, 8, 8)
        found = {
            f"decode, {n} stream{'s' * (n > 1)}": max(
                server.decode(rng, n, args.tokens) for _ in range(args.rounds)
            )
            for n in (1, 8)
        }
        for size in PREFILLS:
            seconds = [server.generate(prompt(rng, size), 1)[0] for _ in range(args.rounds)]
            found[f"prefill, {size} tokens"] = size / min(seconds)
    finally:
        server.process.terminate()
        server.process.communicate()
    return found


def theirs(args: argparse.Namespace, model_dir: Path) -> dict[str, float]:
    rng, model = random.Random(0), Theirs(model_dir)
    model.generate(prompt(rng, PROMPT_LEN), 4)
    seconds = [model.generate(prompt(rng, PROMPT_LEN), args.tokens) for _ in range(args.rounds)]
    found = {"decode, 1 stream": args.tokens / min(seconds)}
    for size in PREFILLS:
        seconds = [model.generate(prompt(rng, size), 1) for _ in range(args.rounds)]
        found[f"prefill, {size} tokens"] = size / min(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model_dir", type=Path)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    args, args.server_args = parser.parse_known_args()
    model_dir = args.model_dir or ensure_demo_model(cache_dir())
    if args.theirs:
        print(json.dumps(theirs(args, model_dir)))
        return
    mine = ours(args, model_dir)
    command = [sys.executable, __file__, "--theirs", "--model_dir", str(model_dir)]
    command += ["--tokens", str(args.tokens), "--rounds", str(args.rounds)]
    other = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{'tokens per second, bf16, ' + str(cpu_count()) + ' threads':<40}{'ours':>9}{'transformers':>14}{'ratio':>8}")  # fmt: skip
    for name, value in mine.items():
        there = other.get(name)
        beside = f"{there:14.1f}{value / there:8.2f}" if there else ""
        print(f"{name:<40}{value:9.1f}{beside}")
    one, eight = mine["decode, 1 stream"], mine["decode, 8 streams"]
    print(
        f"8 streams give {eight / one:.2f} times what 1 gives; load average {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    main()
