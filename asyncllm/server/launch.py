"""Starts and ends the processes of one server, and holds what each of them is given.

Rank 0 starts the others and watches them; no child outlives it. Knows processes, ports and folders;
does not know actors.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import select
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asyncllm.actors.transport import tcp
from asyncllm.codec import protocol
from asyncllm.config import Config, ResolvedConfig
from asyncllm.errors import Mismatch, StartupError
from asyncllm.server import early_ranks
from asyncllm.server.early_ranks import EarlyRanks, spawn
from asyncllm.topology import Contract, Endpoint, Topology

EXIT_GRACE_S = 5.0
EXIT_FAILED = 1  # of a process that ends because something in it failed, e.g. a collective
FOLDERS = Path("/tmp")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """Everything an endpoint needs to start; rank 0 makes one for each child."""

    endpoint: int
    topology: Topology  # with the addresses known so far; its own is where it must listen
    keys: tuple[str, str] = field(repr=False)  # see ``CurveKeys``
    config: Config
    resolved: ResolvedConfig
    model_dir: str
    rendezvous: tuple[str, int] | None  # address and port of torch.distributed; None for one rank
    listen_fd: int  # the HTTP socket, bound but not listening; -1 if there is no frontend
    parent: int  # pid; 0 for rank 0
    store_fd: int = -1  # of rank 0: the listening socket behind ``rendezvous``
    heartbeats_fd: int = -1  # see ``Heartbeats``; -1: no other processes
    interface: str = ""  # that NCCL and gloo use; "": there is one rank
    advertised: str = ""  # host at which other nodes reach this one; "": no other nodes
    cluster_host: str = ""  # host for other servers of the cluster; "": not in a cluster
    incarnation: str = ""  # the id of this server in its cluster; different after each start

    @property
    def name(self) -> str:
        """Name of this process in logs and errors."""
        return self.topology.name(self.endpoint)

    @property
    def me(self) -> Endpoint:
        return self.topology[self.endpoint]

    @property
    def coordinates(self) -> bool:
        """Whether it is the server's first process, which waits for the others and ends them."""
        return self.me == self.topology.coordinator

    @property
    def heads(self) -> bool:
        """Whether the user started this process; it starts the others on its node."""
        return self.me == self.topology.on(self.me.node)[0]

    @property
    def group(self) -> tuple[Endpoint, ...]:
        """The ranks of its group."""
        return self.topology.group(self.me.group)

    @property
    def contract(self) -> Contract:
        """What must be equal in all processes of the server."""
        config = self.config
        return Contract(protocol=protocol(), options=config.digest(), shared=config.shared())

    def to_json(self) -> str:
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["topology"] = self.topology.to_plain()
        fields["config"] = self.config.to_json()
        fields["resolved"] = asdict(self.resolved)
        return json.dumps({"protocol": protocol(), **fields})

    @classmethod
    def from_json(cls, text: str) -> Boot:
        """The inverse of ``to_json``. Raises StartupError if another version wrote it."""
        try:
            fields = json.loads(text)
            if (theirs := fields.pop("protocol")) != protocol():
                raise Mismatch(
                    "rank 0 has a different version from this process: "
                    f"its protocol is {theirs}, here it is {protocol()}"
                )
            fields["topology"] = Topology.from_plain(fields["topology"])
            fields["config"] = Config.from_json(fields["config"])
            fields["resolved"] = ResolvedConfig(
                **{k: _tuple(v) for k, v in fields["resolved"].items()}
            )
            return cls(**{k: _tuple(v) for k, v in fields.items()})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise StartupError(f"this version cannot read what rank 0 wrote: {error!r}") from error


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Children:
    """The child processes of rank 0.

    Args:
        on_death: called with a child's boot, pid and exit code when it ends unexpectedly.
        early: ranks that have been started already; None: there are none.
    """

    def __init__(
        self, on_death: Callable[[Boot, int, int], None], early: EarlyRanks | None = None
    ) -> None:
        self._on_death, self._early = on_death, early
        self._workers: deque[subprocess.Popen[bytes]] = deque()  # that wait for their boot
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, tuple[Boot, subprocess.Popen[bytes]]] = {}  # by pidfd
        self._leaving = False
        self._empty = asyncio.Event()
        self._empty.set()

    def prepare_workers(self, num: int, boot: Boot, num_threads: int) -> None:
        """Start ``num`` HTTP workers, which import while rank 0 loads; ``boot``: of rank 0."""
        fds = [boot.listen_fd, boot.heartbeats_fd]
        self._workers += [spawn(num_threads, fds) for _ in range(num)]

    def start(self, boot: Boot, num_threads: int) -> None:
        """Start a child, if it has not been, and pass it ``boot`` on its standard input."""
        process = None
        if boot.me.replaceable:
            process = self._workers.popleft() if self._workers else None
        elif self._early is not None:
            process = self._early.take()
        if process is None:
            fds = [fd for fd in (boot.listen_fd, boot.heartbeats_fd) if fd >= 0]
            # an HTTP worker ends its requests when rank 0 dies, and then itself
            words = () if boot.me.replaceable else (str(boot.parent),)
            process = spawn(num_threads, fds, *words)
        # in a thread: it reads when it has imported, and a pipe does not hold many API keys
        text = boot.to_json().encode()
        threading.Thread(target=_give, args=(process, text), name="boot", daemon=True).start()
        self.adopt(boot, process)

    def adopt(self, boot: Boot, process: subprocess.Popen[bytes]) -> None:
        """Watch a child that has been started."""
        pidfd = os.pidfd_open(process.pid)
        self._running[pidfd] = boot, process
        self._empty.clear()
        self._loop.add_reader(pidfd, self._ended, pidfd)

    def _ended(self, _: int) -> None:
        """Report all that have ended; first those whose end made collectives of the others fail."""
        ended = []
        for pidfd, (boot, process) in [*self._running.items()]:
            if (code := process.poll()) is not None:
                del self._running[pidfd]
                self._loop.remove_reader(pidfd)
                os.close(pidfd)
                ended.append((boot, process.pid, code))
        if not self._running:
            self._empty.set()
        for boot, pid, code in sorted(ended, key=lambda end: end[2] == EXIT_FAILED):
            if not self._leaving:
                self._on_death(boot, pid, code)

    async def close(self, grace_s: float = EXIT_GRACE_S) -> None:
        """Wait for the children to end; kill those that do not."""
        self._leaving = True
        await self.wait(grace_s)
        for boot, _ in self._running.values():
            log.warning("%s did not end by itself; killing it", boot.name)
        self.kill()

    async def wait(self, seconds: float) -> None:
        """Wait until all have ended, at most ``seconds``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty.wait()

    def signal(self, number: int) -> None:
        """Send a signal to every child. Thread-safe."""
        for _, process in [*self._running.values()]:
            process.send_signal(number)

    def kill_one(self, endpoint: int) -> None:
        """Kill one child; its death is reported like any other."""
        for boot, process in self._running.values():
            if boot.endpoint == endpoint:
                process.kill()

    def kill(self) -> None:
        """Kill every child. Thread-safe; works even if the loop hangs."""
        self._leaving = True
        processes = [*(process for _, process in [*self._running.values()]), *self._workers]
        early_ranks.kill(processes)


def _give(process: subprocess.Popen[bytes], text: bytes) -> None:
    """All that a child reads on its standard input."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # its death is noticed elsewhere
        process.stdin.write(text)


def watch_parent(parent: int, orphaned: Callable[[], object]) -> None:
    """Call ``orphaned``, in a thread, when ``parent`` has died.

    Replaces :func:`die_with_parent` in processes that must still report something.
    """

    def wait() -> None:
        try:
            pidfd = os.pidfd_open(parent)
        except ProcessLookupError:
            pidfd = -1
        if pidfd >= 0 and os.getppid() == parent:
            select.select([pidfd], [], [])
        orphaned()

    threading.Thread(target=wait, name="parent", daemon=True).start()


def bind_http(host: str, port: int) -> socket.socket:
    """The HTTP socket, bound but not listening yet, so that a busy port is an error early."""
    try:
        return bound(host, port, socket.AI_PASSIVE)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on {host}:{port}: {reason} (--host, --port)") from None


def resolve(
    host: str, port: int, kind: int = socket.SOCK_STREAM, flags: int = 0
) -> tuple[int, tuple[object, ...]]:
    """(family, address) of the first address of a host. Raises OSError: it has none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=kind, flags=flags)[0]
    except UnicodeError:
        raise OSError(errno.EINVAL, "not a host name") from None
    return family, address


def address_of(host: str, option: str) -> str:
    """The first address of a host, which ``option`` gives. Raises StartupError: it has none."""
    try:
        return str(resolve(host, 1)[1][0])
    except OSError as error:
        raise StartupError(f"{host} has no address: {error.strerror} ({option})") from None


def bound(host: str, port: int, flags: int = 0) -> socket.socket:
    """A socket that is bound and not yet listening. Raises OSError."""
    family, address = resolve(host, port, flags=flags)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def tls_context(config: Config) -> ssl.SSLContext | None:
    """The TLS context for --ssl_certfile and --ssl_keyfile; None: plain HTTP.

    Raises:
        StartupError: a file cannot be read, or the two do not match.
    """
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # the password keeps OpenSSL from prompting for one on the terminal
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        if isinstance(error, ssl.SSLError):
            reason = f"no PEM certificate chain with its private key (--ssl_keyfile): {reason}"
        raise StartupError(f"--ssl_certfile {config.ssl_certfile}: {reason}") from None
    return context


def _sweep(parent: Path) -> None:
    """Remove folders left over by servers that were killed."""
    for folder in parent.glob("asyncllm-*-*"):
        pid = folder.name.split("-")[1]
        with contextlib.suppress(OSError):  # removed meanwhile
            ours = folder.stat().st_uid == os.getuid()
            if ours and pid.isdigit() and not Path(f"/proc/{pid}").exists():
                # one of another container that shares /tmp may live: it holds a lock
                os.close(_locked(folder))
                shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: str | Path) -> int:
    """A descriptor that holds a lock on a folder. Raises OSError: another one does."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


class ZmqAddresses:
    """Where the endpoints listen for messages: sockets in a private folder, or loopback ports.

    Args:
        zmq_mode: the option's value.
        alone: there is only one process, so nobody listens.
    """

    def __init__(self, zmq_mode: str, *, alone: bool) -> None:
        self._alone, self._folder, self._lock = alone, "", -1
        if alone or zmq_mode == "tcp://":
            return
        _sweep(FOLDERS)
        # mkdtemp makes it 0700: other users of this machine cannot reach the sockets
        self._folder = tempfile.mkdtemp(prefix=f"asyncllm-{os.getpid()}-", dir=FOLDERS)
        with contextlib.suppress(OSError):  # a file system without locks
            self._lock = _locked(self._folder)

    def address(self, endpoint: int) -> str:
        """The address an endpoint binds; "" if it is alone. The endpoint itself picks a free port:
        none is guessed here."""
        if self._alone:
            return ""
        return f"ipc://{self._folder}/{endpoint}" if self._folder else "tcp://127.0.0.1:*"

    def close(self) -> None:
        """Remove the folder."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@dataclass(frozen=True, slots=True)
class NodeWires:
    """Where the endpoints of one of several nodes listen: ranks on fixed ports, others on any.

    Args:
        host: address of this node.
        port: rank 0's port.
        ranks: number of ranks on all nodes, 0 to ``ranks`` - 1.
    """

    host: str
    port: int
    ranks: int

    def address(self, endpoint: int) -> str:
        """The address an endpoint binds."""
        return tcp(self.host, self.port + endpoint if endpoint < self.ranks else "*")

    def close(self) -> None:
        """Nothing to remove."""
