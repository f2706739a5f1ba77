"""Ranks and collectives: the one gather, the one all-reduce, and agreement across ranks.

Everything here is the identity on one process, so callers never ask whether they are distributed.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class World:
    """The coordinates of this process: global rank, number of ranks, rank within its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> World:
        """Returns the coordinates of the initialised process group, or of a single process."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _device() -> torch.device:
    """The device whose tensors the default process group can move."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class _Gather(torch.autograd.Function):
    """All-gather along dim 0 whose backward sums the cotangents of all ranks.

    With the loss of rank r being the mean over ITS anchors, this sum followed by DDP's mean over ranks
    is exactly the gradient of the full batch; a gather without it is wrong by 1/W or in direction.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        rows = total.shape[0] // dist.get_world_size()
        return total[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; the backward sums the cotangents, because every rank uses the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def gather(x: Tensor) -> Tensor:
    """Returns the rows of all ranks in rank order, (B, ...) -> (N, ...); differentiable.

    Every rank must hold equally many rows (the loader guarantees it).
    """
    return x if World.current().size == 1 else _Gather.apply(x)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Returns the sum of `x` over ranks; differentiable."""
    return x if World.current().size == 1 else _AllReduceSum.apply(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Returns the mean of `x` over ranks; differentiable."""
    return all_reduce_sum(x) / World.current().size


def is_sharded(x: Tensor) -> bool:
    """Returns whether `x` is spread over the ranks by rows; raises TypeError when it is in any other way."""
    if not isinstance(x, DTensor):
        return False
    if tuple(x.placements) != (Shard(0),):
        raise TypeError(f"a tensor that lies as {x.placements} over the ranks, which is not by rows")
    return True


@torch.no_grad()
def own_rows(x: Tensor) -> Tensor:
    """Returns the rows of a sharded tensor that lie on this rank, sharing its memory; others as they are."""
    return x.to_local() if isinstance(x, DTensor) and is_sharded(x) else x


def first_row(x: Tensor) -> int:
    """Returns the number of the first of `own_rows`, or the count of rows where this rank has none."""
    if not is_sharded(x):
        return 0
    world = World.current()
    # As torch.chunk cuts: ceil(n / W) rows each, the last ranks fewer or none.
    return min(world.rank * -(-x.shape[0] // world.size), x.shape[0])


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """Returns a sharded tensor with the rows of all ranks, others as they are; all ranks must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def agree(values: Sequence[float], how: str = "max") -> list[float]:
    """Returns the element-wise max, min or sum of `values` over ranks, the same list on every rank."""
    if World.current().size == 1:
        return list(values)
    operation = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN, "sum": dist.ReduceOp.SUM}[how]
    tensor = torch.tensor(list(values), dtype=torch.float64, device=_device())
    dist.all_reduce(tensor, operation)
    return [float(value) for value in tensor]


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """Returns the values of all ranks in rank order (small picklable metadata between our own processes)."""
    world = World.current()
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def background_group(timeout_s: float) -> Any:
    """Returns a group of all ranks for a thread beside the training, None on one process; all ranks call it.

    Collectives of one group must come in one order on all ranks, which two threads cannot promise.
    """
    if World.current().size == 1:
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))


def barrier() -> None:
    """Returns when every rank has arrived."""
    if World.current().size > 1:
        dist.barrier()
