"""Requests that move between servers: their K/V inside a server, and a master and its nodes.

A request that moves is two requests, one on the prefill node and one on the decode node, each with
a rid of its own there; ``epoch`` is that of the decode node. A *ticket* is the master's number of
an attempt, never given twice; a node maps it to its rids. Between master and node ``Begin``,
``Abort``, ``StopHit``, ``Tokens`` and ``Finished`` travel too, with the ticket in the rid's place.
"""

from __future__ import annotations

from array import array
from dataclasses import field

from asyncllm.codec import INT32, Message, message
from asyncllm.core.request import SamplingParams
from asyncllm.messages.checks import are_counts, are_natural, is_rid
from asyncllm.messages.request import THOUGHTS
from asyncllm.records import Destination, KvMoved

# -- inside a node -------------------------------------------------------------------------------


@message(70)
class Placed(Message):
    """scheduler -> agent: a request that imports has its slots; K/V may come."""

    rid: int
    leader: int  # the endpoint whose group it is in
    hit: int  # tokens whose K/V the prefix cache has: those of [hit, length) are to come
    length: int  # prompt and outputs

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.leader) and 0 <= self.hit < self.length


@message(71)
class Begin(Message):
    """agent -> scheduler, urgent, on the way of ``Submit``: the first token is there, go on by it.

    It comes before or after the K/V. Master -> decode node: the same, with the ticket as rid.
    """

    rid: int
    token: int

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.token)


@message(72)
class Import(Message):
    """scheduler -> kv_transfer of every rank of the group: K/V of this request will come.

    From now on kv_transfer may write into these slots, if what comes is of this epoch (the rid).
    Each rank answers exactly once: ``Arrived`` when it has all, ``Lapsed`` when it will have
    nothing more, of its own accord or told by ``Forget``. With its answer it writes no more.
    """

    rid: int
    hit: int  # the first position to come
    length: int  # the position behind the last one
    slots: array[int]  # those of positions [hit, length)

    def valid(self) -> bool:
        return (
            is_rid(self.rid)
            and 0 <= self.hit < self.length
            and len(self.slots) == self.length - self.hit
            and are_natural(self.slots)
        )


@message(73)
class Export(Message):
    """scheduler -> kv_transfer of every rank of the group: this request's K/V go there.

    It comes when the request does, before anything is computed, so that a way there can be found.
    Over when positions [to.hit, to.length) have been sent, or by ``Forget``.
    """

    rid: int
    to: Destination

    def valid(self) -> bool:
        return is_rid(self.rid) and self.to.valid


@message(74)
class Computed(Message):
    """scheduler -> kv_transfer of every rank of the group: these K/V are to be sent.

    They are ready when the runner of the process has said ``StepOver`` of ``step`` or of a later
    one, which may have been long ago (cached ones carry the last step that was launched then). The
    slots stay as they are until every rank has answered ``Sent``. Positions ascend without a gap
    from ``to.hit`` on, over preemptions too. An unknown rid is answered at once.
    """

    rid: int
    seq: int  # 0, 1, 2, ... of this rid
    step: int
    start: int  # the position of the first slot
    slots: array[int]

    def valid(self) -> bool:
        return (
            is_rid(self.rid)
            and are_counts(self.seq, self.step, self.start)
            and len(self.slots) > 0
            and are_natural(self.slots)
        )


@message(75)
class Forget(Message):
    """scheduler -> kv_transfer of every rank of the group, urgent: this import or export is over.

    An import that has not been answered yet is answered by ``Lapsed``, every open ``Computed`` by
    ``Sent``, as soon as nothing touches the slots any more. Unknown rids are ignored.
    """

    rid: int

    def valid(self) -> bool:
        return is_rid(self.rid)


@message(76)
class Arrived(Message):
    """kv_transfer -> scheduler@leader: this rank has all K/V of an import, where any later step
    reads them. It writes no more."""

    rid: int
    rank: int  # in the group

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.rank)


@message(77)
class Lapsed(Message):
    """kv_transfer -> scheduler@leader: this rank will not have all K/V of an import, and writes
    no more."""

    rid: int
    rank: int
    why: str = ""  # "": it was told to forget

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.rank)


@message(78)
class Sent(Message):
    """kv_transfer -> scheduler@leader: this rank, and who reads from it, are done with the slots of
    a ``Computed``, whether they have been sent or not."""

    rid: int
    rank: int
    seq: int

    def valid(self) -> bool:
        return is_rid(self.rid) and are_counts(self.rank, self.seq)


@message(79)
class StepOver(Message):
    """runner -> kv_transfer (same process): this step, and all before it, have finished."""

    step: int


# -- between a master and its nodes --------------------------------------------------------------


@message(80)
class Decode(Message):
    """master -> decode node: take a request in whose K/V and next token come later.

    The node answers with ``Reserved`` or ``Finished``.
    """

    ticket: int
    prompt: array[int]
    outputs: array[int]  # tokens that the client has been sent by earlier attempts
    params: SamplingParams
    thoughts: str = ""  # this and the next two as in Submit
    healed: tuple[bytes, ...] = ()
    client: int = 0
    request_id: str = ""  # the client's X-Request-Id, for the log

    def valid(self) -> bool:
        return (
            is_rid(self.ticket)
            and self.prompt.typecode == self.outputs.typecode == INT32
            and self.thoughts in THOUGHTS
        )

    @property
    def length(self) -> int:
        """Tokens whose K/V are wanted."""
        return len(self.prompt) + len(self.outputs)


@message(81)
class Reserved(Message):
    """decode node -> master: it waits for the K/V of this attempt, there."""

    ticket: int
    to: Destination

    def valid(self) -> bool:
        return is_rid(self.ticket) and self.to.valid


@message(82)
class Prefill(Message):
    """master -> prefill node: compute a prompt and one token; send K/V where they are wanted.

    Tokens and Finished come back under the ticket. With ``to``, ``Finished`` with reason MOVED says
    that the request goes on there; without, the request is answered here to its end.
    """

    ticket: int
    prompt: array[int]
    outputs: array[int]  # as in Decode
    params: SamplingParams
    thoughts: str = ""  # this and the next two as in Submit
    healed: tuple[bytes, ...] = ()
    client: int = 0
    after: int = (
        -1
    )  # the ticket of the first attempt for this prompt at this node, if this is another
    request_id: str = ""  # as in Decode
    to: Destination | None = None

    def valid(self) -> bool:
        return (
            is_rid(self.ticket)
            and self.prompt.typecode == self.outputs.typecode == INT32
            and self.thoughts in THOUGHTS
            and (self.to is None or self.to.reaches(len(self.prompt) + len(self.outputs)))
        )


@message(83)
class NodeState(Message):
    """node -> master, twice a second: what it has to do."""

    used: int  # K/V slots held by requests; of all groups, as those below
    cached: int  # slots kept for their prefix only
    total: int
    running: int
    waiting: int
    draining: bool = False  # it takes no new requests
    moved: KvMoved = field(default_factory=KvMoved)

    def valid(self) -> bool:
        numbers = self.used, self.cached, self.total, self.running, self.waiting
        return are_counts(*numbers)
