"""Entry point of the processes that rank 0 starts: imports, and then waits for a ``Boot``.

``python -m asyncllm.server.child [PARENT [GPU]]``: a rank ends at once with its parent (pid), and
opens its GPU (number, of those that are visible) while torch is imported.
"""

from __future__ import annotations

import gc
import sys

from asyncllm.server.cuda_context import open_early
from asyncllm.server.signals import die_with_parent, end, leave_to_leader


def main() -> int:
    """Run the process and return its exit code."""
    leave_to_leader()
    parent, device = (*map(int, sys.argv[1:]), None, None)[:2]
    if parent is not None:
        die_with_parent(parent)
    if device is not None:
        open_early(device)
    gc.disable()
    from asyncllm.rank import child  # takes seconds: torch

    gc.freeze()  # what is imported stays: no collection needs to look at it
    gc.enable()
    return child()


if __name__ == "__main__":
    end(main())
