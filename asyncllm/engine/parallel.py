"""The tensor-parallel group of a rank: rendezvous and the collectives a step needs."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from asyncllm.models.ops import Linear

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
SYMMETRIC_ROWS = 2560  # larger sums go through NCCL
CHECK_TOLERANCE = 0.02

# its name since torch 2.13, where the older one warns
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

log = logging.getLogger(__name__)


class Alone:
    """tp == 1: nothing to add, gather or tell."""

    rank, size = 0, 1

    def linear_reduce(self, linear: Linear, x: Tensor) -> Tensor:
        return linear(x)

    def gather_last(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Make ``x`` on every rank what it is on rank 0, in place."""
        return x

    def minimum(self, value: int) -> int:
        """Smallest of the ranks' values; start-up only, it waits for all."""
        return value

    def use_symmetric_memory(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Nothing to add, so nothing to speed up."""

    def close(self) -> None:
        """Leave the group."""


class TensorParallel:
    """``size`` ranks over NCCL (CUDA) or gloo (CPU).

    Args:
        rank: this rank; it uses CUDA device ``rank`` where ``device`` is CUDA.
        address: host and port of the rendezvous, which rank 0 serves.
        listen_fd: of rank 0: a socket that listens there. It belongs to the group from now on.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: tuple[str, int],
        device: torch.device,
        listen_fd: int | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._symmetric: SymmetricSum | None = None
        cuda = device.type == "cuda"
        # left to itself the store would listen on every address of this machine
        store = TCPStore(
            *address,
            world_size=size,
            is_master=rank == 0,
            timeout=RENDEZVOUS_TIMEOUT,
            master_listen_fd=listen_fd,
        )
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=RENDEZVOUS_TIMEOUT,
            device_id=device if cuda else None,
        )

    def linear_reduce(self, linear: Linear, x: Tensor) -> Tensor:
        """``linear(x)`` summed over ranks; valid until the call after the next one."""
        if self._symmetric is not None and len(x) <= SYMMETRIC_ROWS:
            return self._symmetric.linear(linear, x)
        out = linear(x)
        dist.all_reduce(out)
        return out

    def gather_last(self, x: Tensor) -> Tensor:
        """[n, v] of each rank -> [n, size * v]."""
        num_rows, width = x.shape
        out = x.new_empty(self.size * num_rows, width)  # gloo knows no third dimension
        _all_gather(out, x.contiguous())
        return out.view(self.size, num_rows, width).transpose(0, 1).reshape(num_rows, -1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Make ``x`` on every rank what it is on rank 0, in place."""
        dist.broadcast(x, 0)
        return x

    def minimum(self, value: int) -> int:
        """Smallest of the ranks' values; start-up only, it waits for all."""
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MIN)
        return int(box.item())

    def use_symmetric_memory(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Sum through peer-mapped memory where that works; every rank must call this.

        Two H200 on NVLink: 6.0 / 13 / 32 us at 1 / 256 / 1024 rows of 4096 bf16, NCCL 17 / 38 / 56.
        """
        if self.device.type != "cuda":
            return
        found: SymmetricSum | None = None
        try:
            found = SymmetricSum(self.rank, hidden_size, dtype, self.device)
            works = found.check()
        except (RuntimeError, AttributeError, ImportError) as error:
            log.info("no symmetric memory, sums go through NCCL: %s", error)
            works = False
        # all ranks or none: a rank alone in a collective would wait for ever
        if self.minimum(int(works)):
            self._symmetric = found
            log.info("sums of up to %d rows go through symmetric memory", SYMMETRIC_ROWS)

    def close(self) -> None:
        """Leave the group; must come after CUDA graphs that hold its collectives are gone."""
        self._symmetric = None
        dist.destroy_process_group()


class SymmetricSum:
    """Two-shot all-reduce in memory that every rank has mapped (torch symmetric memory).

    Products are written straight into it. Two buffers take turns, because a rank may finish a sum
    while a peer still reads its part of the buffer; the next sum, in the other buffer, begins with
    all ranks waiting for each other.
    """

    def __init__(
        self, rank: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        import torch.distributed._symmetric_memory as symm

        self._rank = rank
        world = dist.group.WORLD
        assert world is not None
        self._group = world.group_name
        self._buffers: list[Tensor] = []
        for _ in range(2):
            buffer = symm.empty(SYMMETRIC_ROWS, hidden_size, dtype=dtype, device=device)
            symm.rendezvous(buffer, self._group)
            self._buffers.append(buffer)
        self._turn = 0

    def linear(self, linear: Linear, x: Tensor) -> Tensor:
        """``linear(x)`` summed over ranks: [n, hidden] in one of the buffers."""
        self._turn ^= 1
        return self._sum(linear(x, self._buffers[self._turn][: len(x)]))

    def _sum(self, x: Tensor) -> Tensor:
        summed: Tensor = torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self._group)
        return summed

    def check(self) -> bool:
        """Compare with NCCL on a few sizes; a wrong sum must never serve.

        Every rank goes through all of it, whatever it finds: the others wait for it.
        """
        worst = 0.0
        noise = torch.Generator(self._buffers[0].device).manual_seed(self._rank)
        for num_rows in (1, 33, SYMMETRIC_ROWS):
            self._turn ^= 1
            ours = self._buffers[self._turn][:num_rows]
            ours.normal_(generator=noise)
            want = ours.float()
            dist.all_reduce(want)
            got = self._sum(ours).float()
            worst = max(worst, ((got - want).norm() / want.norm()).item())
            dist.barrier()  # a peer may still be reading our part of this buffer
        if worst >= CHECK_TOLERANCE:
            log.warning("symmetric memory sums are off by %g: not used", worst)
        return worst < CHECK_TOLERANCE


Group = Alone | TensorParallel
