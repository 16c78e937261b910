"""How long a server takes to start, and with what: with an empty Triton cache, then with a warm one.

    python bench/mkmodel.py llama31_8b /tmp/m8b
    python bench/start.py --model_dir /tmp/m8b --json start.json
    python bench/start.py --model_dir DIR --options "--device cpu" --runs 1

The clock begins with the command and ends with the first 200 from /health. Phases are those of the
server's log; each has its length and when it ended. The checkpoint is read once before, so that it
lies in the page cache; the first start still reads libraries from the disk, so there are several
with an empty cache. Where libraries have no bytecode (some images are made so, and forbid to write
it), it is written into a folder first, as an installation by pip does: without it imports take
three times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import cache_from_source
from pathlib import Path

import torch

from asyncllm.environment import python_command

READY_S, STOP_S, POLL_S = 300.0, 60.0, 0.02
HELPER = "compiler"  # what its log lines begin with
PHASE = re.compile(
    r"(\d\d):(\d\d):(\d\d\.\d+) INFO (\S+) (?:start|asyncllm.start): (.+): ([\d.]+) s$"
)
# imported by the helper that compiles
HELPERS = ("asyncllm.server.compile_kernels", "torch._dynamo", "torch._refs")


@dataclass(slots=True)
class Phase:
    """One line of the log."""

    who: str
    name: str
    seconds: float
    ended: float  # after the command


@dataclass(slots=True)
class Start:
    """One start of a server; seconds."""

    cache: str
    ready: float = 0.0
    phases: list[Phase] = field(default_factory=list)
    late: list[str] = field(default_factory=list)  # compiled after the helper had ended


def with_bytecode(folder: Path) -> dict[str, str]:
    """The environment of a server that finds bytecode of all it imports, if need be in ``folder``;
    prints how long imports take without and with it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    first = imports("asyncllm.rank", env=os.environ)
    if not Path(cache_from_source(torch.__file__)).exists():
        env["PYTHONPYCACHEPREFIX"] = str(folder)
    imports("asyncllm.rank", *HELPERS, env=env)
    later = imports("asyncllm.rank", env=env)
    print(f"imports of rank 0: {first:.1f} s as it is, {later:.1f} s with bytecode", flush=True)
    return env


def imports(*names: str, env: Mapping[str, str]) -> float:
    """Seconds that a process takes to import these modules."""
    begin = time.time()
    subprocess.run(python_command("-c", f"import {', '.join(names)}"), env=env, check=True)
    return time.time() - begin


def start_once(
    words: Sequence[str], env: Mapping[str, str], cache: str, folder: str, log: Path
) -> Start:
    """Start a server, wait for it and stop it.

    Raises:
        SystemExit: it ended, or was not ready in time; its log is printed.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = python_command("-m", "asyncllm", *words, "--port", str(port))
    env = {**env, "TRITON_CACHE_DIR": folder}
    day = time.localtime()
    midnight = time.time() - (day.tm_hour * 3600 + day.tm_min * 60 + day.tm_sec + time.time() % 1)
    with log.open("w") as out:
        begin = time.time()
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
        try:
            while not healthy(port):
                if process.poll() is not None or time.time() - begin > READY_S:
                    raise SystemExit(f"the server is not ready:\n{log.read_text()[-4000:]}")
                time.sleep(POLL_S)
            done = Start(cache, time.time() - begin)
        finally:
            process.terminate()
            process.wait(STOP_S)
    done.phases = list(phases(log.read_text(), begin - midnight))
    ahead = [begin + phase.ended for phase in done.phases if phase.who == HELPER]
    done.late = compiled_after(max(ahead, default=begin), Path(folder))
    return done


def compiled_after(moment: float, folder: Path) -> list[str]:
    """Kernels, and what launches them, that came into a Triton cache later than ``moment``."""
    made = [path for end in ("cubin", "so") for path in folder.rglob(f"*.{end}")]
    times = sorted((path.stat().st_mtime, path.name) for path in made)
    before = Counter(name for at, name in times if at <= moment)
    return [
        f"{name} +{at - moment:.1f} ({before[name]} before)" for at, name in times if at > moment
    ]


def healthy(port: int) -> bool:
    """Whether /health answers 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def phases(text: str, begin: float) -> list[Phase]:
    """Those of a log, by their ends; ``begin``: of the command, in seconds of its day."""
    found = []
    for line in text.splitlines():
        if match := PHASE.match(line):
            hours, minutes, seconds, who, name, took = match.groups()
            at = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
            found.append(Phase(who, name, float(took), (at - begin) % 86400))
    return found


def table(starts: Sequence[Start]) -> str:
    """All starts, one after the other."""
    lines = []
    for start in starts:
        lines += ["", f"Triton cache {start.cache}: ready after {start.ready:.1f} s", ""]
        lines += ["| who | phase | takes, s | ends at, s |", "|---|---|---|---|"]
        lines += [f"| {p.who} | {p.name} | {p.seconds:.1f} | {p.ended:.1f} |" for p in start.phases]
        lines += ["", f"compiled while the server waited: {', '.join(start.late) or 'nothing'}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--options", default="", help="more options of the server")
    parser.add_argument("--empty", type=int, default=2, help="starts with an empty cache")
    parser.add_argument("--runs", type=int, default=2, help="starts with a warm cache")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--log", type=Path, help="keep the logs in this folder")
    args = parser.parse_args(argv)
    for path in args.model_dir.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 26):
                    pass
    words = ["--model_dir", str(args.model_dir), *shlex.split(args.options)]
    with tempfile.TemporaryDirectory(prefix="start.") as temp:
        logs = args.log or Path(temp)
        logs.mkdir(parents=True, exist_ok=True)
        folders = [f"{temp}/triton{i}" for i in range(args.empty)]
        runs = [("empty", folder) for folder in folders] + [("warm", folders[-1])] * args.runs
        env = with_bytecode(Path(temp) / "bytecode")
        starts = [
            start_once(words, env, cache, folder, logs / f"start{i}.log")
            for i, (cache, folder) in enumerate(runs)
        ]
    print(table(starts))
    if args.json:
        args.json.write_text(json.dumps([asdict(start) for start in starts], indent=1))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    sys.exit(main())
