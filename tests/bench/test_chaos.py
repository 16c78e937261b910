"""Masters, nodes and config_server that are killed, stopped and restarted at random."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "bench" / "chaos.py"


@pytest.mark.cluster
def test_each_request_ends_once_whatever_is_done_to_servers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(CHAOS), "--seconds", "60", "--logs", str(tmp_path)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout, done.stderr)
    told = json.loads(done.stdout)
    assert sum(told["hits"].values()) > 3
    assert told["requests"]["answered"] > 50
