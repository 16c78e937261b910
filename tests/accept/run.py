"""Run a suite against a server of ours: ``run.py FOLDER [server option ...] -- COMMAND ...``

The server listens on a free port of 127.0.0.1 with the embedded model, logs into FOLDER/server.log
and is stopped afterwards. COMMAND finds it by BASE_URL (with /v1), ROOT_URL, MODEL (its name) and
MODEL_DIR. Exits with COMMAND's code, or with 1 if the server did not survive it or logged an error.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from asyncllm.demo import ensure_demo_model
from asyncllm.environment import cache_dir

STOP_S = 60
BAD = re.compile(r"^.*(?:\bERROR\b|\bCRITICAL\b|Traceback).*$", re.MULTILINE)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main() -> int:
    folder, *rest = sys.argv[1:]
    split = rest.index("--")
    options, command = rest[:split], rest[split + 1 :]
    port = free_port()
    log = Path(folder) / "server.log"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and so stop the server
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "asyncllm", "--port", str(port), *options],
            stdout=subprocess.PIPE,
            stderr=out,
        )
    try:
        assert server.stdout is not None
        # asyncllm is ready: http://127.0.0.1:8000 serves NAME
        root, _, model = server.stdout.readline().decode().rpartition(": ")[2].partition(" serves ")
        if not model:
            sys.exit(f"the server did not start:\n{log.read_text()}")
        found = {
            "ROOT_URL": root,
            "BASE_URL": f"{root}/v1",
            "MODEL": model.strip(),
            "MODEL_DIR": str(ensure_demo_model(cache_dir())),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        code = subprocess.run(command, env=os.environ | found).returncode
        alive = server.poll() is None
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_S)
        finally:
            server.kill()
    faults = BAD.findall(log.read_text(errors="replace"))
    if not alive or server.returncode or faults:
        sys.stdout.write(f"server: alive {alive}, exit code {server.returncode}; {log}\n")
        sys.stdout.write("".join(f"{line}\n" for line in faults[:20]))
        return code or 1
    return code


sys.exit(main())
