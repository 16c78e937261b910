"""Transports of a page from a rank of one server to a rank of another: sockets, memory that both
can access, or a communicator of the two.

Knows pages; knows neither whose they are nor the sockets.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import platform
import re
import stat
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgpack
import numpy as np
import torch
from torch import Tensor

from asyncllm.engine.kv_pages import (
    STAMP,
    CpuPages,
    CudaCopy,
    CudaPages,
    FinishedCopy,
    QueuedCopy,
    recorded,
    row_bytes,
    stamps,
)
from asyncllm.engine.kv_pair import RankPair, nccl_pair
from asyncllm.errors import StartupError

TCP, NCCL, P2P, AUTO = "tcp", "nccl", "p2p", "auto"
ORDERED = ("x86_64", "AMD64")  # architectures whose stores are seen in order
log = logging.getLogger(__name__)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Before and after a copy between two devices torch has a stream of each wait for one of the other;
# with several pairs of streams, one copy runs meanwhile.
STREAMS = 3
_MEMORY = re.compile(r"cpu:(\d{1,9}):(\d{1,6}):(\d{1,19}):(\d{1,9}):(\d{1,18})")


def machine_id() -> str:
    """Identifies the machine; changes when it restarts."""
    return _BOOT_ID.read_text().strip()


class PeerMemory(Protocol):
    """The pages of a process of the same machine, to read."""

    num: int

    def has(self, page: int, nbytes: int) -> bool:
        """Whether the page exists and has this many bytes."""

    def fetch(self, page: int, here: Tensor, stamp: Tensor) -> QueuedCopy:
        """Queue a copy of the start of a remote page to ``here``, and then one of its stamp to
        ``stamp``, [1] int64 in host memory."""

    def close(self) -> None:
        """Unmap the memory."""


class PeerUnreachable(Exception):
    """The memory of another process is not accessible from here."""


@dataclass(slots=True)
class KvTransports:
    """The transports of a rank's pages.

    Attributes:
        names: the transports it offers, best first.
        machine: see :func:`machine_id`.
        memory: where others find its pages; "": it only receives, or they are not accessible.
        device: of its K/V.
        timeout_s: for a page to go through a communicator.
        backend: that makes communicators for a place (0 or 1) in a pair.
    """

    names: tuple[str, ...]
    device: torch.device
    memory: str = ""
    machine: str = ""
    timeout_s: float = 4.0
    backend: Callable[[int, torch.device, float, Callable[[], None]], RankPair] = nccl_pair

    def choose(
        self, theirs: Sequence[str], machine: str, memory: str
    ) -> tuple[str | None, PeerMemory | None]:
        """The way that a caller likes best of those that both have; None: there is none."""
        for name in theirs:
            if name not in self.names:
                continue
            if name != P2P:
                return name, None
            if machine != self.machine:
                continue
            with contextlib.suppress(PeerUnreachable):
                return name, open_window(memory, self.device)
        return None, None

    def nothing_in_common(self, theirs: Sequence[str]) -> str:
        """Why there is no common transport."""
        ours = ", ".join(self.names)
        return (
            f"K/V cannot travel between these two: one has {', '.join(theirs)}, the other {ours} "
            "(--pd_trans_mode; p2p is for processes of one machine that see each other's memory)"
        )

    def pair(self, place: int, wake: Callable[[], None]) -> RankPair:
        """A communicator with one other rank; nobody waits for it here. ``wake`` is called in
        threads of its own when there is something to look at."""
        return self.backend(place, self.device, self.timeout_s, wake)


def refuse(mode: str, device: torch.device) -> None:
    """Raises StartupError: this machine has not got what ``--pd_trans_mode`` asks for.

    Between two processes on CPUs, a page and its stamp are plain memory. That who sees new bytes
    sees the new stamp as well takes stores, and loads, that are seen in order, as on x86.
    """
    if mode == NCCL and device.type != "cuda":
        raise StartupError(
            "--pd_trans_mode nccl moves K/V between GPUs, and this server computes on the CPU "
            "(tcp, or p2p between processes of one machine)"
        )
    if mode == P2P and device.type == "cpu" and platform.machine() not in ORDERED:
        raise StartupError(
            f"--pd_trans_mode p2p between CPUs relies on the order of memory accesses of x86, and "
            f"this is {platform.machine()} (tcp)"
        )


def make_ways(
    mode: str, num: int, size: int, device: torch.device
) -> tuple[CpuPages | CudaPages, KvTransports]:
    """Create the pages and their transports according to ``--pd_trans_mode``.

    Args:
        num, size: pages, and bytes of each.
        device: that holds the K/V.

    Raises:
        StartupError: this machine has not got it.
    """
    refuse(mode, device)
    if device.type == "cuda":
        pages = CudaPages(num, size, device)
        names: tuple[str, ...] = (P2P, NCCL, TCP) if mode == AUTO else (mode,)
        if mode == TCP:
            pages.host(0)  # pinned now, which takes a while
        memory = ""
        if P2P in names:
            try:
                memory = _exported(pages.all)
            except RuntimeError as error:
                if mode == P2P:
                    raise StartupError(f"--pd_trans_mode p2p: {error}") from None
                log.info("others cannot see the memory of this GPU: %s", error)
        return pages, KvTransports(names, device, memory, machine_id())
    if mode == P2P:
        shared = SharedPages(num, row_bytes(size))
        made = CpuPages(num, size, shared.tensor)
        return made, KvTransports((P2P,), device, shared.text, machine_id())
    return CpuPages(num, size), KvTransports((TCP,), device, "", machine_id())


# -- memory that two processes of a machine see ----------------------------------------------------


class SharedPages:
    """Main memory that other processes of this user may map, for as long as this one lives.

    Its size cannot change, so that a process that has mapped it never reads beyond its end.
    """

    def __init__(self, num: int, size: int) -> None:
        self.num, self.size = num, size
        self._fd = os.memfd_create("asyncllm-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, num * size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals)
        self._map = mmap.mmap(self._fd, num * size)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8).view(num, size)

    @property
    def text(self) -> str:
        """Where others find it."""
        inode = os.fstat(self._fd).st_ino
        return f"cpu:{os.getpid()}:{self._fd}:{inode}:{self.num}:{self.size}"


def open_window(memory: str, device: torch.device) -> PeerMemory:
    """Pages of another process. Raises PeerUnreachable."""
    if memory.startswith("cuda:") and device.type == "cuda":
        return CudaPeerMemory(memory, device)
    if (found := _MEMORY.fullmatch(memory)) and device.type == "cpu":
        return CpuPeerMemory(*map(int, found.groups()))
    raise PeerUnreachable(f"pages that lie elsewhere than on {device.type}")


class CpuPeerMemory:
    """See :class:`SharedPages`, mapped so that nothing can be written.

    Raises:
        PeerUnreachable: they are not what they are said to be.
    """

    def __init__(self, pid: int, fd: int, inode: int, num: int, size: int) -> None:
        self.num, self._size = num, size
        try:
            # whatever else it may be, opening it does not wait
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            file = os.open(f"/proc/{pid}/fd/{fd}", flags)
        except OSError as error:
            raise PeerUnreachable(str(error)) from None
        try:
            about = os.fstat(file)
            same = stat.S_ISREG(about.st_mode) and about.st_ino == inode
            if not (same and about.st_size == num * size > 0):
                raise PeerUnreachable(f"descriptor {fd} of process {pid} is something else")
            if not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise PeerUnreachable("its size may change")
            self._map = mmap.mmap(file, num * size, prot=mmap.PROT_READ)
        except OSError as error:
            raise PeerUnreachable(str(error)) from None
        finally:
            os.close(file)

    def has(self, page: int, nbytes: int) -> bool:
        return 0 <= page < self.num and nbytes <= self._size - STAMP

    def fetch(self, page: int, here: Tensor, stamp: Tensor) -> FinishedCopy:
        for to, at in ((here, 0), (stamp.view(torch.uint8), self._size - STAMP)):
            source = np.frombuffer(self._map, np.uint8, len(to), page * self._size + at)
            np.copyto(to.numpy(), source)
        return FinishedCopy()

    def close(self) -> None:
        self._map.close()


def _exported(pages: Tensor) -> str:
    """A handle of device memory, for other processes of this machine."""
    shared = pages.untyped_storage()._share_cuda_()
    index = pages.device.index
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    at = pages.storage_offset() * pages.element_size()
    packed: bytes = msgpack.packb((uuid, at, *pages.shape, *shared[1:]))
    return f"cuda:{b64encode(packed).decode()}"


class CudaPeerMemory:
    """Device memory of another process, by the handle that CUDA gives for it.

    Raises:
        PeerUnreachable: this process does not see that device, or cannot read from it.
    """

    def __init__(self, memory: str, device: torch.device) -> None:
        try:
            uuid, at, num, size, *shared = msgpack.unpackb(b64decode(memory[5:]))
            known = range(torch.cuda.device_count())
            theirs = [i for i in known if str(torch.cuda.get_device_properties(i).uuid) == uuid]
            if not theirs:
                raise PeerUnreachable(f"GPU {uuid} is not visible here (CUDA_VISIBLE_DEVICES)")
            there = theirs[0]
            if there != device.index and not torch.cuda.can_device_access_peer(device, there):
                raise PeerUnreachable(f"GPU {device.index} cannot read from GPU {there}")
            storage = torch.UntypedStorage._new_shared_cuda(there, *shared)
        except (ValueError, TypeError, RuntimeError) as error:
            raise PeerUnreachable(str(error)) from None
        whole = torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", there))
        self.num, self._size = int(num), int(size)
        self._pages = whole.set_(storage, at, (num, size))  # type: ignore[call-overload]
        self._stamps = stamps(self._pages)
        self._device, self._turn = device, 0
        near = [torch.cuda.Stream(device) for _ in range(STREAMS)]
        same = there == device.index
        far = near if same else [torch.cuda.Stream(whole.device) for _ in range(STREAMS)]
        self._streams = [*zip(near, far, strict=True)]

    def has(self, page: int, nbytes: int) -> bool:
        return page < self.num and nbytes <= self._size - STAMP

    def fetch(self, page: int, here: Tensor, stamp: Tensor) -> CudaCopy:
        source = self._pages[page, : len(here)]
        near, far = self._streams[self._turn]
        self._turn = (self._turn + 1) % STREAMS
        # torch copies on the stream of the source's device
        with torch.cuda.device(self._device), torch.cuda.stream(far), torch.cuda.stream(near):
            here.copy_(source, non_blocking=True)
            stamp.copy_(self._stamps[page], non_blocking=True)
            return recorded(far, source)  # who holds the source keeps the memory mapped

    def close(self) -> None:
        """The memory is let go of with the last copy that reads it."""
        del self._pages, self._stamps
