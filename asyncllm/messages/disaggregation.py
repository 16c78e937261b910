"""Messages for requests that move between servers: within a node, and between master and nodes.

Such a request is two requests, one on the prefill node and one on the decode node, each with its
own rid there; ``epoch`` is that of the decode node. A *ticket* is the master's number of an
attempt, never reused; a node maps it to its rids. ``BeginDecode``, ``Abort``, ``StopHit``,
``Tokens`` and ``Finished`` are also sent between master and node, with the ticket in place of the
rid.
"""

from __future__ import annotations

from array import array
from dataclasses import field

from asyncllm.codec import INT32, Message, message
from asyncllm.core.request import SamplingParams
from asyncllm.messages.checks import are_counts, are_natural, is_rid
from asyncllm.messages.request import THOUGHTS
from asyncllm.records import KvDestination, TransferTotals, int32s

# -- inside a node -------------------------------------------------------------------------------


@message(70, urgent=True)
class ImportPlaced(Message):
    """scheduler -> agent: an importing request has its slots; K/V may be sent."""

    rid: int
    leader: int  # the endpoint that leads its group
    hit: int  # tokens in the prefix cache; K/V of positions [hit, length) are needed
    length: int  # prompt and outputs

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.leader) and 0 <= self.hit < self.length


@message(71, urgent=True)
class BeginDecode(Message):
    """agent -> scheduler, by ``Submit``'s route: continue from this first token.

    It may arrive before or after the K/V. Master -> decode node: the same, with the ticket as rid.
    """

    rid: int
    token: int

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.token)


@message(72, urgent=True)
class ImportKv(Message):
    """scheduler -> kv_transfer of every rank of the group: K/V of this request will arrive.

    From now on kv_transfer may write data of this epoch (the rid), and nothing else, to these
    slots. Each rank answers exactly once: ``KvArrived`` when it has everything, ``TransferFailed``
    when it will get no more, because of a failure or of ``CancelTransfer``. After its answer it
    writes no more.
    """

    rid: int
    hit: int  # the first position needed
    length: int  # the end position
    slots: array[int]  # of positions [hit, length)

    def valid(self) -> bool:
        return (
            is_rid(self.rid)
            and 0 <= self.hit < self.length
            and len(self.slots) == self.length - self.hit
            and are_natural(self.slots)
        )


@message(73, urgent=True)
class ExportKv(Message):
    """scheduler -> kv_transfer of every rank of the group: send this request's K/V there.

    Sent when the request arrives, before anything is computed, so that a connection can be made.
    It is over when positions [to.hit, to.length) have been sent, or on ``CancelTransfer``.
    """

    rid: int
    to: KvDestination

    def valid(self) -> bool:
        return is_rid(self.rid) and self.to.valid


@message(74, urgent=True)
class KvComputed(Message):
    """scheduler -> kv_transfer of every rank of the group: send these K/V.

    They are ready when the runner of the process has sent ``StepFinished`` of ``step`` or a later
    one, which may have been long ago (prefix hits carry the last step that was launched then). The
    slots must not change until every rank has answered ``KvSent``. Positions ascend without gaps
    from ``to.hit`` on, across preemptions too. An unknown rid is answered at once.
    """

    rid: int
    seq: int  # 0, 1, 2, ... of this rid
    step: int
    start: int  # the position of the first slot
    slots: array[int]

    def valid(self) -> bool:
        return (
            is_rid(self.rid)
            and self.step >= 0
            and are_counts(self.seq, self.start)
            and len(self.slots) > 0
            and are_natural(self.slots)
        )


@message(75, urgent=True)
class CancelTransfer(Message):
    """scheduler -> kv_transfer of every rank of the group: cancel this import or export.

    An unanswered import is answered by ``TransferFailed``, every open ``KvComputed`` by ``KvSent``,
    as soon as nothing touches the slots any more. Unknown rids are ignored.
    """

    rid: int

    def valid(self) -> bool:
        return is_rid(self.rid)


@message(76, urgent=True)
class KvArrived(Message):
    """kv_transfer -> scheduler@leader: this rank has all K/V of an import, visible to any later
    step. It writes no more."""

    rid: int
    rank: int  # in the group

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.rank)


@message(77, urgent=True)
class TransferFailed(Message):
    """kv_transfer -> scheduler@leader: this rank will not get all K/V of an import, and writes
    no more."""

    rid: int
    rank: int
    why: str = ""  # "": after ``CancelTransfer``

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.rank)


@message(78, urgent=True)
class KvSent(Message):
    """kv_transfer -> scheduler@leader: this rank and its receivers are done with the slots of a
    ``KvComputed``, whether or not they were sent."""

    rid: int
    rank: int
    seq: int

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.rank, self.seq)


@message(79)
class StepFinished(Message):
    """runner -> kv_transfer (same process): this step, and all before it, have finished."""

    step: int


# -- between a master and its nodes --------------------------------------------------------------


@message(80)
class DecodeRequest(Message):
    """master -> decode node: accept a request whose K/V and next token follow later.

    The node answers with ``DecodeReserved`` or ``Finished``.
    """

    ticket: int
    prompt: array[int]
    outputs: array[int]  # tokens that the client received in earlier attempts
    params: SamplingParams
    thoughts: str = ""  # this and the next two as in Submit
    healed: tuple[bytes, ...] = ()
    client: int = 0
    request_id: str = ""  # the client's X-Request-Id, for the log
    prediction: array[int] = field(default_factory=int32s)  # as in Submit

    def valid(self) -> bool:
        return (
            is_rid(self.ticket)
            and self.prompt.typecode == self.outputs.typecode == self.prediction.typecode == INT32
            and self.thoughts in THOUGHTS
        )

    @property
    def length(self) -> int:
        """Number of tokens whose K/V are needed."""
        return len(self.prompt) + len(self.outputs)


@message(81)
class DecodeReserved(Message):
    """decode node -> master: it expects the K/V of this attempt at this destination."""

    ticket: int
    to: KvDestination

    def valid(self) -> bool:
        return is_rid(self.ticket) and self.to.valid


@message(82)
class PrefillRequest(Message):
    """master -> prefill node: compute a prompt and one token; send the K/V to ``to``.

    Tokens and Finished come back under the ticket. With ``to``, ``Finished`` with reason MOVED
    means that the request continues there; without, this node serves the request to its end.
    """

    ticket: int
    prompt: array[int]
    outputs: array[int]  # as in DecodeRequest
    params: SamplingParams
    thoughts: str = ""  # this and the next two as in Submit
    healed: tuple[bytes, ...] = ()
    client: int = 0
    request_id: str = ""  # as in DecodeRequest
    to: KvDestination | None = None

    def valid(self) -> bool:
        return (
            is_rid(self.ticket)
            and self.prompt.typecode == self.outputs.typecode == INT32
            and self.thoughts in THOUGHTS
            and (self.to is None or self.to.reaches(len(self.prompt) + len(self.outputs)))
        )


@message(83)
class NodeState(Message):
    """node -> master, twice a second: its load."""

    used: int  # K/V slots held by requests; of all groups, like those below
    cached: int  # slots kept for their prefix only
    total: int
    running: int
    waiting: int
    draining: bool = False  # it accepts no new requests
    moved: TransferTotals = field(default_factory=TransferTotals)

    def valid(self) -> bool:
        numbers = self.used, self.cached, self.total, self.running, self.waiting
        return are_counts(*numbers)
