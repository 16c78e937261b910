"""Messages between two ranks that transfer K/V: a prefill rank (sender), a decode rank (receiver).

Two ranks stay connected for as long as they transfer. The sender connects and sends
``SenderHello``; it announces its data in portions (``PageAnnounced``), and sends each when the
receiver has room and asks for it (``PullPage``). With p2p nothing is asked for: a portion is
fetched after the sender has copied it into one of its pages (``PageFilled``), and the page's stamp,
read after it, tells whether the page held it throughout. So neither side can make the other buffer
an unbounded amount. Portions are numbered by the sender; numbers are never reused in a connection.
"""

from __future__ import annotations

from asyncllm.codec import Message, message
from asyncllm.messages.checks import are_counts, is_rid
from asyncllm.records import KvWireFormat

MOST_WAYS = 8
MOST_TEXT = 4096  # characters of a host's name, a reason, a key


@message(100)
class SenderHello(Message):
    """sender -> receiver, first: identifies both sides."""

    node: str  # the id of the intended server
    name: str  # the caller's name in logs
    wire: KvWireFormat
    rank: int  # the caller's, in its group
    transports: tuple[str, ...]  # transports, the preferred first
    machine: str  # identifies the machine: equal for all its processes only
    memory: str = ""  # where processes of the same machine find its pages

    def valid(self) -> bool:
        texts = (self.node, self.name, self.machine, self.memory, *self.transports)
        return (
            self.wire.valid
            and 0 <= self.rank < self.wire.tp
            and 0 < len(self.transports) <= MOST_WAYS
            and all(len(text) <= MOST_TEXT for text in texts)
        )


@message(101)
class SenderAdmitted(Message):
    """receiver -> sender: the connection is accepted, with these settings."""

    transport: str
    tokens: int  # maximum per portion

    def valid(self) -> bool:
        return are_counts(self.tokens) and self.tokens > 0


@message(102)
class EpochOpened(Message):
    """sender -> receiver: K/V of this epoch, or ``EpochClosed``, will follow on this connection."""

    epoch: int

    def valid(self) -> bool:
        return is_rid(self.epoch)


@message(103)
class PageAnnounced(Message):
    """sender -> receiver: these positions can be pulled."""

    number: int
    epoch: int
    first: int
    count: int

    def valid(self) -> bool:
        return is_rid(self.number) and is_rid(self.epoch) and are_counts(self.first, self.count)


@message(104)
class PullPage(Message):
    """receiver -> sender, except with p2p: there is room for this portion."""

    number: int

    def valid(self) -> bool:
        return is_rid(self.number)


@message(105)
class PageFilled(Message):
    """sender -> receiver: the portion is in this page of the sender's; it follows or is fetched."""

    number: int
    page: int
    nbytes: int
    stamp: int = 0  # in the page for as long as it holds this portion, if pages are fetched

    def valid(self) -> bool:
        numbers = is_rid(self.number) and is_rid(self.stamp)  # neither ever begins again
        return numbers and are_counts(self.page) and self.nbytes > 0


@message(106)
class PageBytes(Message):
    """sender -> receiver, transport tcp: bytes of a portion, in the next frame."""

    number: int
    offset: int

    def valid(self) -> bool:
        return is_rid(self.number) and self.offset >= 0


@message(107)
class PageReceived(Message):
    """receiver -> sender: this portion was received or is not needed; its page is free."""

    number: int

    def valid(self) -> bool:
        return is_rid(self.number)


@message(109)
class EpochClosed(Message):
    """Both directions: nothing more of this epoch follows."""

    epoch: int
    why: str = ""  # "": everything was received

    def valid(self) -> bool:
        return is_rid(self.epoch) and len(self.why) <= MOST_TEXT


@message(110)
class TransferHeartbeat(Message):
    """Both directions, periodically: heartbeat."""


@message(111)
class TransferRefused(Message):
    """Both directions, last: the connection is refused and closed."""

    why: str

    def valid(self) -> bool:
        return len(self.why) <= MOST_TEXT


@message(112)
class StoreValue(Message):
    """Both directions, transport nccl: a key of the communicator's store."""

    key: str
    value: bytes

    def valid(self) -> bool:
        return len(self.key) <= MOST_TEXT and len(self.value) <= 1 << 16


@message(113)
class KvListening(Message):
    """kv_transfer -> agent@coordinator: where this rank of a decode node receives K/V."""

    endpoint: int
    address: str
    wire: KvWireFormat

    def valid(self) -> bool:
        return are_counts(self.endpoint) and self.wire.valid


@message(114)
class TransferStats(Message):
    """kv_transfer -> coordinator: counters of this rank, since the start."""

    query: int = 0
    endpoint: int = 0
    sent_bytes: int = 0
    taken_bytes: int = 0
    sent_pages: int = 0
    taken_pages: int = 0
    taken_tokens: int = 0  # positions of completely received requests
    transfers: int = 0  # of these requests
    transfer_ms: int = 0  # of these, from the sender's first frame to the last byte
    sent: int = 0  # requests whose K/V have been sent completely
    tail_ms: int = 0  # of these, from the end of the last step until all had been received
    lapsed: int = 0  # transfers that have failed at this end
    waiting: int = 0  # now: portions ready to be sent that wait for a page
    refused: int = 0  # connections closed because of invalid data
