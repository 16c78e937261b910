"""Entry point of the processes that rank 0 starts: imports, and then waits on standard input.

``python -m asyncllm.server.child serve|compile [PARENT [GPU]]``: a process of the server, which
gets a ``Boot``, or the helper that compiles kernels. It ends at once with its parent (pid), if that
is given, and opens its GPU (number, of those that are visible) while torch is imported.
"""

from __future__ import annotations

import sys

from asyncllm.environment import imports_that_stay
from asyncllm.server.cuda_context import open_early
from asyncllm.server.signals import die_with_parent, end, leave_to_leader


def main() -> int:
    """Run the process and return its exit code."""
    kind, *numbers = sys.argv[1:]
    parent, device = (*map(int, numbers), None, None)[:2]
    leave_to_leader()
    if parent is not None:
        die_with_parent(parent)
    if device is not None:
        open_early(device)
    with imports_that_stay():
        if kind == "serve":  # both take seconds: torch
            from asyncllm.rank import child as work
        else:
            from asyncllm.server.compile_kernels import import_rest
            from asyncllm.server.compile_kernels import main as work

            import_rest()
    return work()


if __name__ == "__main__":
    end(main())
