"""ZeroMQ sockets of somebody who sends what he likes; none of their calls can block for ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import zmq

from asyncllm.actors.transport import Keys, ipv6

LIMIT_MS = 20_000


@contextmanager
def raw(
    address: str, keys: Keys | None, kind: int = zmq.PUSH, linger_ms: int = 0
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


def push(address: str, keys: Keys, messages: Sequence[bytes]) -> None:
    """Send these as one of the server's own processes."""
    with raw(address, keys, linger_ms=LIMIT_MS) as sock:
        for message in messages:
            sock.send(message)
