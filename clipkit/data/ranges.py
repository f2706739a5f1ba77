"""Which rows of a global batch a rank owns, and how its workers share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from clipkit.data.order import check_shares
from clipkit.dist import World


@dataclass(frozen=True)
class RowRanges:
    """Rank r owns lanes [r * L // W, (r + 1) * L // W): the same number on every rank, or one more on some.

    Raises ConfigError when W does not divide L, with `uneven` when it exceeds L.
    """

    batch_size: int
    lanes: int
    world: World
    workers: int
    uneven: bool = False

    def __post_init__(self) -> None:
        check_shares(self.world.size, self.lanes, f"the number of lanes, {self.lanes},", self.uneven)

    @property
    def quota(self) -> int:
        """Rows of each lane."""
        return self.batch_size // self.lanes

    def of_rank(self, rank: int | None = None) -> tuple[int, int]:
        """Returns (first row, end row) of a rank, by default of this one."""
        rank = self.world.rank if rank is None else rank
        first, end = (cut * self.lanes // self.world.size * self.quota for cut in (rank, rank + 1))
        return first, end

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """The number of rows of every rank, () where all hold equally many."""
        if self.lanes % self.world.size == 0:
            return ()
        return tuple(end - first for first, end in map(self.of_rank, range(self.world.size)))

    def of_workers(self) -> list[tuple[int, int]]:
        """Returns (first row, end row) per worker, in row order, none empty.

        Whole lanes when every worker gets at least one, so that a window is read once; otherwise single rows.
        """
        first, end = self.of_rank()
        unit = self.quota if (end - first) // self.quota >= self.workers else 1
        units = (end - first) // unit
        workers = max(1, min(self.workers, units))
        cuts = [first + units * worker // workers * unit for worker in range(workers + 1)]
        return list(pairwise(cuts))
