"""Ranks and collectives: the one gather, the one all-reduce, and agreement across ranks.

Everything here is the identity on one process, so callers never ask whether they are distributed.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from clipkit.types import ConfigError

# Rows of the batch at hand on every rank, where ranks differ.
_shares: ContextVar[tuple[int, ...]] = ContextVar("shares", default=())


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


@contextmanager
def uneven(shares: tuple[int, ...]) -> Iterator[None]:
    """Inside, rank r holds `shares[r]` rows of the batch; () says that all hold equally many.

    The sizes come from the order of the data, so that no collective has to ask for them.
    """
    token = _shares.set(shares)
    try:
        yield
    finally:
        _shares.reset(token)


def row_weight() -> float:
    """Returns W * B / N: what a mean over this rank's rows counts in a mean over ranks; 1 on even ranks."""
    shares = _shares.get()
    return len(shares) * shares[World.current().rank] / sum(shares) if shares else 1.0


def rows_of_ranks(x: Tensor) -> tuple[int, ...]:
    """Returns how many rows `gather(x)` brings from every rank, in rank order; their sum is N.

    Raises ConfigError when ranks hold unequal parts of a batch and `x` is not made of rows of it.
    """
    world, shares, rows = World.current(), _shares.get(), x.shape[0]
    if not shares:
        return (rows,) * world.size
    times, rest = divmod(rows, shares[world.rank])
    if rest:
        raise ConfigError(
            f"{rows} rows to gather on a rank with {shares[world.rank]} rows of the batch: what other ranks "
            "bring is unknown",
            "gather rows of the batch, or use a number of processes that divides the lanes",
        )
    return tuple(times * share for share in shares)


def first_row(x: Tensor) -> int:
    """Returns the place of this rank's first row among those of `gather(x)`."""
    return sum(rows_of_ranks(x)[: World.current().rank])


class _Gather(torch.autograd.Function):
    """All-gather along dim 0 whose backward sums the cotangents of all ranks.

    With the loss of rank r being the mean over ITS anchors, this sum followed by DDP's mean over ranks
    is exactly the gradient of the full batch; a gather without it is wrong by 1/W or in direction.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        ctx.rows = rows
        # Padded to the largest: gloo reports success on unequal sizes and fills a part of the buffer.
        missing = max(rows) - x.shape[0]
        padded = torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x.contiguous()
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.rows)[dist.get_rank()], None


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

    Every rank must hold equally many rows, or the rows that `uneven` says.
    """
    return x if World.current().size == 1 else _Gather.apply(x, rows_of_ranks(x))


def all_reduce_sum(x: Tensor) -> Tensor:
    """Returns the sum of `x` over ranks; differentiable."""
    return x if World.current().size == 1 else _AllReduceSum.apply(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Returns the mean of `x` over ranks, each counting by its rows (`row_weight`); differentiable."""
    weight = row_weight()
    return all_reduce_sum(x if weight == 1 else weight * x) / World.current().size


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


def first_own_row(x: Tensor) -> int:
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
