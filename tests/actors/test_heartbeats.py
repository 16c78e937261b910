"""Signs of life go through memory that processes share."""

from __future__ import annotations

import os
import subprocess
import sys

from asyncllm.actors.heartbeats import PLACES, Heartbeats


def test_another_process_sees_it() -> None:
    fd = Heartbeats.create()
    pulse = Heartbeats(fd)
    source = f"from asyncllm.actors.heartbeats import Heartbeats; p = Heartbeats({fd}); p.beat(7, p.last(1) + 0.5)"
    pulse.beat(1, 3.25)
    assert pulse.last(7) == 0.0
    subprocess.run([sys.executable, "-c", source], pass_fds=[fd], check=True, timeout=60)
    pulse.note(1, 3, 4)
    pulse.note(7, 10, 20)
    assert (pulse.noted(8, but=1), pulse.noted(8, but=7), pulse.noted(7, but=2)) == (
        (10, 20),
        (3, 4),
        (3, 4),
    )
    os.close(fd)
    assert (pulse.last(7), pulse.last(7 + PLACES), pulse.last(1)) == (3.75, 3.75, 3.25)
