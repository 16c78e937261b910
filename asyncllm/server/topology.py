"""Which endpoint is what, and which actors live there: data, nothing is started here."""

from __future__ import annotations

# Names in order of start; they stop in reverse, so that the frontend's last answers still find
# the others.
PLACEMENT: dict[str, tuple[str, ...]] = {
    "leader": (
        "allocator", "grammar", "scheduler", "runner", "detokenizer", "tokenizer", "frontend",
        "watchdog",
    ),
    "follower": ("runner", "watchdog"),
    "http": ("detokenizer", "tokenizer", "frontend", "watchdog"),
}  # fmt: skip

# Those of the leader that are told by others only what its own scheduler and watchdog tell them,
# which are in the same process: a message to them from another one is not ours.
SERVED_HERE = ("runner", "detokenizer", "tokenizer", "frontend")


def role(endpoint: int, tp: int) -> str:
    """The row of the placement table for an endpoint."""
    if endpoint == 0:
        return "leader"
    return "follower" if endpoint < tp else "http"
