"""The secret that the nodes of one server share, and the CURVE keys derived from it.

Whoever knows the secret may join; everyone else is ignored. Knows files and keys, not sockets.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
import stat
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import zmq
from zmq.utils import z85

from asyncllm.actors.transport import CurveKeys
from asyncllm.config import Config
from asyncllm.errors import StartupError

SECRET_BYTES = 32
MOST_SECRETS = 2  # while one is being replaced by another
NO_SECRET = bytes(SECRET_BYTES)  # on the loopback interface: anyone on the machine may join
# each purpose of a secret has separate keys
NODES = b"asyncllm-nodes-1"  # where the nodes of a server meet
CHANNEL = b"asyncllm-servers"  # between the servers of a cluster
TRANSFER = b"asyncllm-kv"  # for K/V between their ranks
_SECRET = re.compile(f"[0-9a-f]{{{2 * SECRET_BYTES}}}")


def make_key_file(path: Path) -> None:
    """Write a new secret into a new file that only its owner can read.

    Raises:
        StartupError: the file exists, or cannot be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise StartupError(f"--make_cluster_key {path}: {error.strerror}") from None
    with os.fdopen(fd, "w") as file:
        file.write(f"{secrets.token_hex(SECRET_BYTES)}\n")


def cluster_keys(
    config: Config,
    purpose: bytes = NODES,
    hosts: Sequence[str] = ("nccl_host", "advertise_host"),
) -> tuple[CurveKeys, ...]:
    """Key pairs of --cluster_key_file, in its order; without a file, those for loopback.

    Args:
        purpose: what they are for; ``NODES``, ``CHANNEL`` or ``TRANSFER``.
        hosts: options that say where this process listens, or connects to, with these keys.

    Raises:
        StartupError: the file cannot be used, or is missing for hosts that others can reach.
    """
    if config.cluster_key_file is not None:
        return tuple(derive(each, purpose) for each in _read(Path(config.cluster_key_file)))
    for name in hosts:
        host = getattr(config, name)
        if host is not None and not is_loopback(host):
            raise StartupError(
                f"--{name} {host} can be reached from other machines: that needs a secret that all "
                "nodes have (asyncllm --make_cluster_key FILE, copy it, --cluster_key_file FILE)"
            )
    return (derive(NO_SECRET, purpose),)


def derive(secret: bytes, purpose: bytes = NODES) -> CurveKeys:
    """The key pair of a secret for one purpose; the same everywhere."""
    key = blake2b(key=secret, person=purpose, digest_size=32).digest()
    text = z85.encode(key)
    return CurveKeys(zmq.curve_public(text).decode(), text.decode())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``. Raises StartupError: it has no address."""
    try:
        found = socket.getaddrinfo(host, 1, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartupError(f"{host} has no address: {reason}") from None
    return all(ipaddress.ip_address(str(f[4][0]).partition("%")[0]).is_loopback for f in found)


def _read(path: Path) -> list[bytes]:
    source = f"--cluster_key_file {path}"
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise StartupError(f"{source}: not a regular file")
            if about.st_uid != os.geteuid():
                raise StartupError(f"{source} belongs to another user (uid {about.st_uid})")
            if about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = stat.S_IMODE(about.st_mode)
                raise StartupError(f"{source} may be used by others (mode {mode:03o}); chmod 600")
            text = file.read(1 << 16).decode("ascii", "replace")
    except OSError as error:
        raise StartupError(f"{source}: {error.strerror}") from None
    lines = [line.strip() for line in text.splitlines()]
    words = [line for line in lines if line and not line.startswith("#")]
    if not 1 <= len(words) <= MOST_SECRETS:
        raise StartupError(
            f"{source} has {len(words)} secrets: it must have one, or two while one "
            "replaces the other"
        )
    if not all(map(_SECRET.fullmatch, words)):
        raise StartupError(
            f"{source}: a secret is {2 * SECRET_BYTES} digits 0-9 a-f "
            "(asyncllm --make_cluster_key FILE writes one)"
        )
    return [bytes.fromhex(word) for word in words]
