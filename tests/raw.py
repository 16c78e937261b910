"""ZeroMQ sockets of somebody who sends what he likes; none of their calls can block for ever."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Self

import zmq

from asyncllm.actors.transport import CurveKeys, ipv6

LIMIT_MS = 20_000
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(47)  # how ZMTP 3.1 begins


class Sockets:
    """Any number of sockets, closed at the end."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close(0)
        self._context.term()

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A new one, not connected."""
        sock = self._context.socket(kind)
        sock.sndtimeo = sock.rcvtimeo = LIMIT_MS
        self._sockets.append(sock)
        return sock


@contextmanager
def raw(
    address: str, keys: CurveKeys | None, kind: int = zmq.PUSH, linger_ms: int = 0
) -> Iterator[zmq.Socket[bytes]]:
    """A socket connected to ``address`` under ``keys``, which may be wrong ones or None.

    Who speaks to a CURVE socket without any key loses the connection for good: to libzmq that is
    an error of the protocol, after which it neither connects again nor keeps a queue, and a
    blocking send waits for ever if the refusal comes first. So such a socket sends by ``offer``.
    """
    with zmq.Context() as ctx, ctx.socket(kind) as sock:
        sock.sndtimeo = sock.rcvtimeo = LIMIT_MS
        sock.linger = linger_ms
        sock.ipv6 = ipv6(address)
        if keys is not None:
            sock.curve_serverkey = sock.curve_publickey = keys.public.encode()
            sock.curve_secretkey = keys.secret.encode()
        sock.connect(address)
        yield sock


def offer(sock: zmq.Socket[bytes], *frames: bytes) -> bool:
    """Send one message of these frames, now or not at all; False: nobody takes it."""
    try:
        sock.send_multipart(frames, zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


def push(address: str, keys: CurveKeys, messages: Sequence[bytes]) -> None:
    """Send these as one of the server's own processes."""
    with raw(address, keys, linger_ms=LIMIT_MS) as sock:
        for message in messages:
            sock.send(message)


def mutated(draw: random.Random, frames: list[bytes]) -> list[bytes]:
    """With a few bytes changed, cut or added, or a frame left out or doubled."""
    found = [bytearray(frame) for frame in frames]
    for _ in range(draw.randint(1, 4)):
        frame = draw.choice(found)
        if not frame:
            continue
        at = draw.randrange(len(frame))
        match draw.randrange(4):
            case 0:
                frame[at] = draw.randrange(256)
            case 1:
                del frame[at:]
            case 2:
                frame[at:at] = draw.randbytes(draw.randint(1, 40))
            case _:
                found.append(bytearray(draw.randbytes(8)))
    return [bytes(frame) for frame in found]


def scream(host: str, port: int, draw: random.Random, times: int) -> None:
    """Connect as often, each time with random bytes, or with what begins like ZeroMQ."""
    for i in range(times):
        with socket.create_connection((host, port), timeout=20) as sock:
            blob = draw.randbytes(draw.randint(1, 300))
            (greeting,) = mutated(draw, [GREETING + blob])[:1]
            with suppress(OSError):  # it has hung up already
                sock.sendall((blob, greeting, GREETING + blob)[i % 3])
