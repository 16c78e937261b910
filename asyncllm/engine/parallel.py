"""The tensor-parallel group of a rank: rendezvous and the collectives a step needs."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from asyncllm.models.layers import Ops

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)

# its name since torch 2.13, where the older one warns
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Alone:
    """tp == 1: nothing to add, gather or tell."""

    rank, size = 0, 1

    def linear_reduce(self, ops: Ops, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(x, weight, bias)

    def gather_last(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Make ``x`` on every rank what it is on rank 0, in place."""
        return x

    def minimum(self, value: int) -> int:
        """Smallest of the ranks' values; start-up only, it waits for all."""
        return value

    def close(self) -> None:
        """Leave the group."""


class TensorParallel:
    """``size`` ranks over NCCL (CUDA) or gloo (CPU).

    Args:
        rank: this rank; it uses CUDA device ``rank`` where ``device`` is CUDA.
        address: ``host:port`` of the rendezvous, which rank 0 serves.
    """

    def __init__(self, rank: int, size: int, address: str, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=size,
            timeout=RENDEZVOUS_TIMEOUT,
            device_id=device if cuda else None,
        )

    def linear_reduce(self, ops: Ops, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias, summed over ranks."""
        out = ops.linear(x, weight, bias)
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

    def close(self) -> None:
        """Leave the group; must come after CUDA graphs that hold its collectives are gone."""
        dist.destroy_process_group()


Group = Alone | TensorParallel
