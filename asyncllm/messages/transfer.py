"""K/V on their way from a rank of a prefill node, the sender, to one of a decode node, the taker.

Two ranks are connected for as long as requests move between them. The sender connects and says
``Caller``; what it has is announced in portions (``Ready``), and travels when the taker has room
for it (``Pull``). So nothing that either side holds for the other grows with what it asks for. A
portion's number is the sender's, never given twice in a connection.
"""

from __future__ import annotations

from asyncllm.codec import Message, message
from asyncllm.messages.checks import are_counts, is_rid
from asyncllm.records import KvWire

MOST_WAYS = 8
MOST_TEXT = 4096  # characters of a host's name, a reason, a key


@message(100)
class Caller(Message):
    """sender -> taker, first: who calls whom."""

    node: str  # the id of the server that is wanted
    name: str  # how the caller is called in logs
    wire: KvWire
    rank: int  # the caller's, in its group
    ways: tuple[str, ...]  # of moving the bytes, those it likes best first
    machine: str  # the same for all processes of one machine, and for no others
    memory: str = ""  # where processes of the same machine find its pages

    def valid(self) -> bool:
        texts = (self.node, self.name, self.machine, self.memory, *self.ways)
        return (
            self.wire.valid
            and 0 <= self.rank < self.wire.tp
            and 0 < len(self.ways) <= MOST_WAYS
            and all(len(text) <= MOST_TEXT for text in texts)
        )


@message(101)
class Admitted(Message):
    """taker -> sender: so it goes."""

    way: str
    tokens: int  # that a portion has at most

    def valid(self) -> bool:
        return are_counts(self.tokens) and self.tokens > 0


@message(102)
class Sending(Message):
    """sender -> taker: K/V of this epoch will come on this connection, or ``Over``."""

    epoch: int

    def valid(self) -> bool:
        return is_rid(self.epoch)


@message(103)
class Ready(Message):
    """sender -> taker: these positions can be pulled."""

    number: int
    epoch: int
    first: int
    count: int

    def valid(self) -> bool:
        return is_rid(self.number) and is_rid(self.epoch) and are_counts(self.first, self.count)


@message(104)
class Pull(Message):
    """taker -> sender: there is room for this portion."""

    number: int

    def valid(self) -> bool:
        return is_rid(self.number)


@message(105)
class Filled(Message):
    """sender -> taker: the portion is in this page of the sender's; it comes, or can be fetched."""

    number: int
    page: int
    nbytes: int

    def valid(self) -> bool:
        return is_rid(self.number) and are_counts(self.page) and self.nbytes > 0


@message(106)
class Piece(Message):
    """sender -> taker, way tcp: bytes of a portion, in the frame behind this one."""

    number: int
    offset: int

    def valid(self) -> bool:
        return is_rid(self.number) and self.offset >= 0


@message(107)
class Taken(Message):
    """taker -> sender: it has the bytes of this portion, or has had them; the page is free."""

    number: int

    def valid(self) -> bool:
        return is_rid(self.number)


@message(108)
class Kept(Message):
    """sender -> taker, where pages are fetched: until ``Taken`` the page was this portion's."""

    number: int

    def valid(self) -> bool:
        return is_rid(self.number)


@message(109)
class Over(Message):
    """Either -> the other: nothing more of this epoch."""

    epoch: int
    why: str = ""  # "": all has been taken

    def valid(self) -> bool:
        return is_rid(self.epoch) and len(self.why) <= MOST_TEXT


@message(110)
class Alive(Message):
    """Either -> the other, often: it is there."""


@message(111)
class Refused(Message):
    """Either -> the other, last: it does not listen any more."""

    why: str

    def valid(self) -> bool:
        return len(self.why) <= MOST_TEXT


@message(112)
class Known(Message):
    """Either -> the other, way nccl: what a communicator asks about."""

    key: str
    value: bytes

    def valid(self) -> bool:
        return len(self.key) <= MOST_TEXT and len(self.value) <= 1 << 16


@message(113)
class Listening(Message):
    """kv_transfer -> agent@coordinator: where this rank of a decode node takes K/V."""

    endpoint: int
    address: str
    wire: KvWire

    def valid(self) -> bool:
        return are_counts(self.endpoint) and self.wire.valid


@message(114)
class TransferStats(Message):
    """kv_transfer -> coordinator: of this rank, since the start."""

    query: int = 0
    endpoint: int = 0
    sent_bytes: int = 0
    taken_bytes: int = 0
    sent_pages: int = 0
    taken_pages: int = 0
    taken_tokens: int = 0  # positions of requests that have come as a whole
    transfers: int = 0  # of these requests
    transfer_ms: int = 0  # of these, from the first sign of the sender to the last byte
    lapsed: int = 0  # transfers that have failed, at this end
    waiting: int = 0  # now: portions that could travel and wait for a page
    refused: int = 0  # connections that were ended for what came on them
