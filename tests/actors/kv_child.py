"""Ranks that move K/V in a process of its own, which can be stopped: told by lines of JSON.

It answers in lines: ``port N`` of a receiver, ``told Type rid`` for each message to a scheduler, and
``slots HASH`` where it is asked.
"""

from __future__ import annotations

import hashlib
import json
import sys
from array import array

from asyncllm.actors.kv_receiver import KvReceiver
from asyncllm.actors.kv_thread import TransferTimeouts
from asyncllm.actors.transport import CurveKeys
from asyncllm.codec import Message
from asyncllm.messages import ExportKv, ImportKv, KvComputed, StepFinished
from asyncllm.records import KvDestination
from tests.actors.kv_rig import NODE, NUM_SLOTS, Rank, Size, receiver, sender

SEED = 77_000
ALL = array("i", range(NUM_SLOTS))
# nobody here is impatient; a sender gives no signs of life between what happens
SENDING = TransferTimeouts(alive_s=60.0, lapse_s=60.0, first_s=60.0)
TAKING = TransferTimeouts(alive_s=0.2, lapse_s=60.0, first_s=60.0)


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say(batch: list[Message]) -> None:
    for msg in batch:
        write(f"told {type(msg).__name__} {getattr(msg, 'rid', -1)}")


def make(role: str, transport: str, size: Size, keys: CurveKeys) -> Rank:
    rank = Rank(0, 1, SEED, size)
    if role == "sender":
        sender(rank, [transport], SENDING, [keys])
    else:
        receiver(rank, [transport], TAKING, keys)
    rank.thread.start(say, lambda error: write(f"failed {error!r}"))
    if isinstance(rank.thread, KvReceiver):
        write(f"port {rank.thread.port}")
    return rank


def main() -> None:
    told = json.loads(sys.stdin.readline())
    keys, size = CurveKeys(*told["keys"]), Size(*told["size"])
    rank: Rank | None = None
    for line in sys.stdin:
        match json.loads(line):
            case ["be", role, transport]:
                if rank is not None:
                    rank.thread.close()
                rank = make(role, transport, size, keys)
            case ["export", rid, epoch, port] if rank is not None:
                address, wire = f"tcp://127.0.0.1:{port}", rank.share.wire
                to = KvDestination(
                    node=NODE, epoch=epoch, hit=0, length=NUM_SLOTS, addresses=(address,), wire=wire
                )
                rank.thread.put([ExportKv(rid, to)])
                rank.thread.put([KvComputed(rid=rid, seq=0, step=1, start=0, slots=ALL)])
                rank.thread.put([StepFinished(1)])
            case ["import", epoch] if rank is not None:
                rank.thread.put([ImportKv(epoch, 0, NUM_SLOTS, ALL)])
            case "slots" if rank is not None:
                write(f"slots {hashlib.sha256(b''.join(rank.slots())).hexdigest()}")


if __name__ == "__main__":
    main()
