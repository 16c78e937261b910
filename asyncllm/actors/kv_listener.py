"""The socket on which a rank of a decode node listens for ranks of prefill nodes."""

from __future__ import annotations

import zmq

from asyncllm.actors.kv_thread import bounds
from asyncllm.actors.transport import CurveKeys, Socket, ipv6, protected, tcp


class KvListener:
    """The listening socket of a rank; created first, so that a busy port fails the start early.

    Args:
        keys: of the cluster.
        host, port: an address of this machine; port 0: any.

    Attributes:
        port: which it is.

    Raises:
        zmq.ZMQError: it cannot listen there.
    """

    def __init__(self, keys: CurveKeys, host: str, port: int) -> None:
        self.ctx: zmq.Context[Socket] = zmq.Context()
        self.sock = self.ctx.socket(zmq.ROUTER)
        self.sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        address = tcp(host, port or "*")
        bounds(self.sock)
        self.sock.setsockopt(zmq.IPV6, ipv6(address))
        self.failed_handshakes = protected(self.sock, keys)
        try:
            self.sock.bind(address)
        except zmq.ZMQError:
            self.close()
            raise
        self.port = int(self.sock.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])

    def close(self) -> None:
        """Stop listening."""
        self.failed_handshakes.close()
        self.ctx.destroy(0)
