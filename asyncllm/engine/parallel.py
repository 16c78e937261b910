"""The ranks of a server: rendezvous, the group of each, and the collectives a step needs."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from asyncllm.models.ops import Activations, Product
from asyncllm.topology import Endpoint, Topology

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)
SYMMETRIC_ROWS = 2560  # larger sums go through NCCL
CHECK_TOLERANCE = 0.02

# the name since torch 2.13, which warns about the old one
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

log = logging.getLogger(__name__)


class SingleRank:
    """tp == 1: the collectives do nothing."""

    rank, size = 0, 1

    def linear_reduce(self, linear: Product, x: Activations) -> Tensor:
        return linear(x)

    def gather_last(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Broadcast ``x`` from rank 0, in place."""
        return x

    def gather_tokens(self, x: Tensor) -> Tensor:
        """[n, h] of each group -> [groups * n, h], group by group: there is only this one."""
        return x

    def gather_flags(self, x: Tensor) -> Tensor:
        """[n] of each group -> [groups * n], group by group: there is only this one."""
        return x

    def sum_tokens(self, product: Product, x: Tensor) -> Tensor:
        """``product(x)`` [groups * n, h] summed over all ranks -> this group's [n, h]."""
        return self.linear_reduce(product, x)

    def sum(self, x: Tensor) -> Tensor:
        """Summed over ranks, in place."""
        return x

    def use_symmetric_memory(self, hidden_size: int, dtype: torch.dtype) -> None:
        """No sums, so nothing to speed up."""


def meet(
    topology: Topology, me: Endpoint, address: tuple[str, int], listen_fd: int | None = None
) -> TCPStore:
    """Block until all ranks have joined; returns the store that they share.

    Args:
        topology, me: the ranks of the server, and this one.
        address: host and port of the rendezvous, served by the first rank or a config_server.
        listen_fd: if the first rank serves it: the listening socket, which the store takes over; by
            itself the store would listen on every address of this machine.
    """
    ranks = topology.ranks
    store = TCPStore(
        *address,
        world_size=len(ranks),
        is_master=listen_fd is not None,
        timeout=RENDEZVOUS_TIMEOUT,
        master_listen_fd=listen_fd,
    )
    store.set(f"here/{ranks.index(me)}", "")
    store.wait([f"here/{rank}" for rank in range(len(ranks))], RENDEZVOUS_TIMEOUT)
    return store


class Ranks:
    """Connects all ranks of a server that has several.

    Attributes:
        group: this rank's group, within which its layers sum and gather.
        world: those among which experts are divided: the group, or all ranks of all groups if these
            run in lockstep.

    Args:
        topology: ranks and groups of the server.
        me: this rank.
        store: from :func:`meet`.
        device: where it computes.
    """

    def __init__(
        self, topology: Topology, me: Endpoint, store: TCPStore, device: torch.device
    ) -> None:
        ranks = topology.ranks
        self._rank, self._size, self._asked = ranks.index(me), len(ranks), 0
        cuda = device.type == "cuda"
        self._store = store
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=self._store,
            rank=self._rank,
            world_size=len(ranks),
            timeout=RENDEZVOUS_TIMEOUT,
        )
        self.group: Group = SingleRank()
        for number in topology.groups:  # every rank creates all of them, in the same order
            members = topology.group(number)
            if len(members) == 1:
                continue
            made = dist.new_group(
                [ranks.index(rank) for rank in members],
                timeout=RENDEZVOUS_TIMEOUT,
                device_id=device if cuda and number == me.group else None,
            )
            if number == me.group:
                self.group = TensorParallel(made, me.group_rank, len(members), device)
        self.world: AnyWorld = self.group
        if topology.in_step:
            self.world = self._spread(topology, me, device)

    def _spread(self, topology: Topology, me: Endpoint, device: torch.device) -> ExpertParallel:
        """Create a process group per rank index: the ranks with that index in all groups."""
        ranks, groups = topology.ranks, topology.groups
        cuda = device.type == "cuda"
        columns = []
        for place in range(len(ranks) // len(groups)):
            members = [ranks.index(topology.group(group)[place]) for group in groups]
            mine = cuda and place == me.group_rank
            columns.append(
                dist.new_group(
                    members, timeout=RENDEZVOUS_TIMEOUT, device_id=device if mine else None
                )
            )
        made = dist.new_group(timeout=RENDEZVOUS_TIMEOUT, device_id=device if cuda else None)
        every = TensorParallel(made, self._rank, self._size, device)
        return ExpertParallel(self.group, every, columns[me.group_rank], len(groups))

    def minimum(self, value: int) -> int:
        """Smallest of all ranks' values; start-up only, it waits for all.

        Uses no collective: ranks of several groups need no common communicator.
        """
        self._asked += 1
        keys = [f"minimum/{self._asked}/{rank}" for rank in range(self._size)]
        self._store.set(keys[self._rank], str(value))
        return min(int(self._store.get(key)) for key in keys)

    def exchange(self, text: str) -> list[str]:
        """Gather a value from each rank, in order; start-up only, it waits for all.

        Rank 0, which holds the store, returns after all others.
        """
        self._asked += 1
        said = [f"said/{self._asked}/{rank}" for rank in range(self._size)]
        heard = [f"heard/{self._asked}/{rank}" for rank in range(self._size)]
        self._store.set(said[self._rank], text)
        texts = [self._store.get(key).decode() for key in said]
        self._store.set(heard[self._rank], "")
        for key in heard if self._rank == 0 else ():
            self._store.get(key)
        return texts

    def close(self) -> None:
        """Leave the process groups; call after freeing CUDA graphs that contain collectives."""
        self.group = self.world = SingleRank()
        dist.destroy_process_group()


class TensorParallel:
    """The ranks of one group, over NCCL (CUDA) or gloo (CPU).

    Args:
        group: the process group.
        rank, size: this rank's index in it, and its size.
        device: where this rank computes.
    """

    def __init__(
        self, group: dist.ProcessGroup, rank: int, size: int, device: torch.device
    ) -> None:
        self._group, self.rank, self.size, self.device = group, rank, size, device
        self.symmetric: SymmetricSum | None = None  # for sums of not too many rows

    def linear_reduce(self, linear: Product, x: Activations) -> Tensor:
        """``linear(x)`` summed over ranks; valid until the call after the next one."""
        if self.symmetric is not None and len(x) <= SYMMETRIC_ROWS:
            return self.symmetric.linear(linear, x)
        out = linear(x)
        dist.all_reduce(out, group=self._group)
        return out

    def gather_last(self, x: Tensor) -> Tensor:
        """[n, v] of each rank -> [n, size * v]."""
        num_rows, width = x.shape
        out = x.new_empty(self.size * num_rows, width)  # gloo knows no third dimension
        _all_gather(out, x.contiguous(), group=self._group)
        return out.view(self.size, num_rows, width).transpose(0, 1).reshape(num_rows, -1)

    def gather_tokens(self, x: Tensor) -> Tensor:
        """[n, h] of each group -> [groups * n, h], group by group: there is only this one."""
        return x

    def gather_flags(self, x: Tensor) -> Tensor:
        """[n] of each group -> [groups * n], group by group: there is only this one."""
        return x

    def sum_tokens(self, product: Product, x: Tensor) -> Tensor:
        """``product(x)`` [groups * n, h] summed over all ranks -> this group's [n, h]."""
        return self.linear_reduce(product, x)

    def sum(self, x: Tensor) -> Tensor:
        """Summed over ranks, in place."""
        dist.all_reduce(x, group=self._group)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Broadcast ``x`` from rank 0, in place."""
        dist.broadcast(x, group=self._group, group_src=0)
        return x

    def minimum(self, value: int) -> int:
        """Smallest of the ranks' values; start-up only, it waits for all."""
        box = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self._group)
        return int(box.item())

    def use_symmetric_memory(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Use peer-mapped memory for all-reduces if it works; every rank must call this.

        Two H200 on NVLink: 6.0 / 13 / 32 us at 1 / 256 / 1024 rows of 4096 bf16, NCCL 17 / 38 / 56.
        """
        if self.device.type != "cuda":
            return
        found: SymmetricSum | None = None
        try:
            found = SymmetricSum(self._group, hidden_size, dtype, self.device)
            works = found.check()
        except (RuntimeError, AttributeError, ImportError) as error:
            log.info("no symmetric memory, all-reduces use NCCL: %s", error)
            works = False
        # all ranks or none: a single rank in a collective would wait forever
        if self.minimum(int(works)):
            self.symmetric = found
            log.info("all-reduces of up to %d rows use symmetric memory", SYMMETRIC_ROWS)


class ExpertParallel:
    """All ranks of several groups in lockstep, which share the experts.

    All ranks of a group know its tokens. A column is the ranks of equal index in all groups.

    Args:
        group: this rank's.
        every: all ranks, group by group.
        column: the process group of its column, whose ranks are numbered by their groups.
        num_groups: groups, all of one size.
    """

    def __init__(
        self, group: Group, every: TensorParallel, column: dist.ProcessGroup, num_groups: int
    ) -> None:
        self._group, self._every, self._column = group, every, column
        self.rank, self.size, self._num_groups = every.rank, every.size, num_groups
        self._number = every.rank // group.size

    def gather_tokens(self, x: Tensor) -> Tensor:
        """[n, h] of each group -> [groups * n, h], group by group."""
        num, width = x.shape
        total = self._num_groups * num
        if self._every.symmetric is not None and total <= SYMMETRIC_ROWS:
            own = None if self._group.rank else x  # one rank of each group contributes its tokens
            return self._every.symmetric.gather(own, self._number * num, total)
        out = x.new_empty(total, width)
        _all_gather(out, x.contiguous(), group=self._column)
        return out

    def gather_flags(self, x: Tensor) -> Tensor:
        """[n] of each group -> [groups * n], group by group."""
        out = x.new_empty(self._num_groups * len(x))
        _all_gather(out, x.contiguous(), group=self._column)
        return out

    def sum_tokens(self, product: Product, x: Tensor) -> Tensor:
        """``product(x)`` [groups * n, h] summed over all ranks -> this group's [n, h]."""
        num = len(x) // self._num_groups
        small = self._every.symmetric is not None and len(x) <= SYMMETRIC_ROWS
        if small or x.device.type != "cuda":  # gloo does not support the other way
            return self._every.linear_reduce(product, x)[self._number * num :][:num]
        parts = product(x)
        mine = parts.new_empty(num, parts.shape[1])
        _reduce_scatter(mine, parts, group=self._column)
        return self._group.sum(mine)

    def use_symmetric_memory(self, hidden_size: int, dtype: torch.dtype) -> None:
        """As in a group; every rank must call this."""
        self._every.use_symmetric_memory(hidden_size, dtype)


class SymmetricSum:
    """Two-shot all-reduce in memory that every rank has mapped (torch symmetric memory).

    Products are written directly into it. Two buffers alternate, because a rank may finish a sum
    while a peer still reads its part of the buffer; the next sum, in the other buffer, starts with
    a barrier.
    """

    def __init__(
        self, group: dist.ProcessGroup, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        import torch.distributed._symmetric_memory as symm

        self._group, self._name = group, group.group_name
        self._buffers: list[Tensor] = []
        for _ in range(2):
            buffer = symm.empty(SYMMETRIC_ROWS, hidden_size, dtype=dtype, device=device)
            symm.rendezvous(buffer, self._name)
            self._buffers.append(buffer)
        self._turn = 0

    def linear(self, linear: Product, x: Activations) -> Tensor:
        """``linear(x)`` summed over ranks: [n, hidden] in one of the buffers."""
        self._turn ^= 1
        return self._sum(linear(x, self._buffers[self._turn][: len(x)]))

    def gather(self, x: Tensor | None, first: int, num_rows: int) -> Tensor:
        """All-gather into [num_rows, hidden] in one of the buffers; each row comes from one rank.

        Args:
            x: the rows from ``first`` on; None: this rank contributes none.
        """
        self._turn ^= 1
        ours = self._buffers[self._turn][:num_rows].zero_()
        if x is not None:
            ours[first : first + len(x)] = x
        return self._sum(ours)

    def _sum(self, x: Tensor) -> Tensor:
        summed: Tensor = torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self._name)
        return summed

    def check(self) -> bool:
        """Compare with NCCL on a few sizes; a wrong sum must never serve.

        Every rank runs all of it whatever the result, because the others wait for it.
        """
        worst = 0.0
        noise = torch.Generator(self._buffers[0].device).manual_seed(self._group.rank())
        for num_rows in (1, 33, SYMMETRIC_ROWS):
            self._turn ^= 1
            ours = self._buffers[self._turn][:num_rows]
            ours.normal_(generator=noise)
            want = ours.float()
            dist.all_reduce(want, group=self._group)
            got = self._sum(ours).float()
            worst = max(worst, ((got - want).norm() / want.norm()).item())
            dist.barrier(self._group)  # a peer may still be reading our part of this buffer
        if worst >= CHECK_TOLERANCE:
            log.warning("symmetric memory sums differ from NCCL's by %g: not used", worst)
        return worst < CHECK_TOLERANCE


Group = SingleRank | TensorParallel
AnyWorld = SingleRank | TensorParallel | ExpertParallel
