"""Messages about the cluster between the processes of a master or of a node."""

from __future__ import annotations

from asyncllm.codec import Message, message
from asyncllm.messages.checks import are_counts


@message(90, urgent=True)
class AskServing(Message):
    """frontend -> director or agent: send me ``Serving``, now and whenever it changes."""

    endpoint: int

    def valid(self) -> bool:
        return are_counts(self.endpoint)


@message(91, urgent=True)
class Serving(Message):
    """director or agent -> frontend: whether requests can be served."""

    lacks: str  # what is missing; "": nothing


@message(92, urgent=True)
class AskNodes(Message):
    """frontend -> director: which nodes are connected?"""

    query: int
    endpoint: int

    def valid(self) -> bool:
        return are_counts(self.endpoint)


@message(93, urgent=True)
class NodesAnswer(Message):
    """director -> frontend: the answer to ``AskNodes``."""

    query: int
    body: bytes  # JSON


@message(94)
class DirectorStats(Message):
    """director -> coordinator: its counters."""

    query: int = 0
    endpoint: int = 0
    requests: int = 0  # unfinished
    prefill_nodes: int = 0
    decode_nodes: int = 0
    used: int = 0  # K/V slots of decode nodes that requests hold
    total: int = 0  # K/V slots of decode nodes in total
    attempts: int = 0  # since the start, like those below
    retries: int = 0
    failed: int = 0
    lost_nodes: int = 0
    handovers: int = 0
    reserve_ms: int = 0
    handover_ms: int = 0
    # of all nodes, including those that have left; see ``TransferTotals``
    kv_sent_bytes: int = 0
    kv_tokens: int = 0
    kv_transfers: int = 0
    kv_ms: int = 0
    kv_lapses: int = 0
    kv_waiting: int = 0
