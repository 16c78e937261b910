"""The rendezvous of torch.distributed's ranks, and the network interface they use.

By default torch listens on every address of the machine for the rendezvous. Here it gets a socket
that is bound only to ``--nccl_host``.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

from asyncllm.config import Config, roles
from asyncllm.errors import StartupError
from asyncllm.server.launch import bound, resolve

BACKLOG = 256  # every rank connects at about the same time


def listen(config: Config) -> socket.socket:
    """The listening socket of the rendezvous, on --nccl_host only.

    Raises:
        StartupError: --nccl_host is not an address of this machine, or an explicitly given
            --nccl_port is busy. A busy default port is replaced by a free one, so that several
            servers can coexist.
    """
    host, port = config.nccl_host, config.nccl_port
    try:
        if port == config.port and roles.same_address(config.host, host):
            raise OSError(errno.EADDRINUSE, "HTTP is served there (--port)")
        return _listen(host, port)
    except OSError as error:
        if "nccl_port" in config.explicit:
            raise StartupError(_cannot(host, port, error)) from None
    try:
        return _listen(host, 0)
    except OSError as error:
        raise StartupError(_cannot(host, 0, error)) from None


def listen_at(host: str, port: int) -> socket.socket:
    """The listening socket of a rendezvous on one address and port.

    Raises:
        StartupError: it is busy, or not of this machine.
    """
    try:
        return _listen(host, port)
    except OSError as error:
        raise StartupError(_cannot(host, port, error)) from None


def _listen(host: str, port: int) -> socket.socket:
    sock = bound(host, port)
    try:
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _cannot(host: str, port: int, error: OSError) -> str:
    flags = "--nccl_host, --nccl_port" if port else "--nccl_host"
    reason = error.strerror or str(error)
    return f"ranks cannot meet at {host}:{port or '(any port)'}: {reason} ({flags})"


def address_towards(host: str, option: str = "--nccl_host") -> str:
    """The address of this machine from which it reaches ``host``, which ``option`` gives.

    Raises:
        StartupError: there is no route to it.
    """
    try:
        family, address = resolve(host, 1, socket.SOCK_DGRAM)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing; the kernel looks up the route
            return str(probe.getsockname()[0])
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(f"no route to {host}: {reason} ({option})") from None


def interface_to(host: str) -> str:
    """Name of the network interface that leads to ``host``, e.g. "lo" or "eth0".

    Raises:
        StartupError: there is no route to it.
    """
    ours = address_towards(host)
    local = ipaddress.ip_address(ours.partition("%")[0])
    found = [(net.prefixlen, name) for name, net in _networks() if local in net]
    if not found:
        raise StartupError(f"no network interface has the address {local} (--nccl_host {host})")
    return max(found)[1]


# -- getifaddrs(3), which Python does not offer ------------------------------------------------


class _IfAddrs(ctypes.Structure):
    pass


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
    ("netmask", ctypes.c_void_p),
]

# where the address lies in struct sockaddr_in and sockaddr_in6, and its length
_PLACES = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}


def _networks() -> Iterator[tuple[str, ipaddress.IPv4Network | ipaddress.IPv6Network]]:
    """(interface, network) for every address of this machine; a whole network, since all of
    127.0.0.0/8 belongs to the loopback interface."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(first)) != 0:
        raise OSError(ctypes.get_errno(), "getifaddrs")
    try:
        entry: Any = first  # a pointer is false when it is null, which its stub does not know
        while entry:
            item = entry.contents
            entry = item.next
            if not item.address or not item.netmask:
                continue
            family = ctypes.cast(item.address, ctypes.POINTER(ctypes.c_ushort)).contents.value
            if (place := _PLACES.get(socket.AddressFamily(family))) is None:
                continue
            at, size = place
            address = ipaddress.ip_address(ctypes.string_at(item.address + at, size))
            mask = int.from_bytes(ctypes.string_at(item.netmask + at, size), "big")
            yield item.name.decode(), ipaddress.ip_network((address, mask.bit_count()), False)
    finally:
        libc.freeifaddrs(first)
