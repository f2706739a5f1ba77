"""Which rows of a global batch a rank owns, and how its workers share them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from clipkit.dist import World
from clipkit.types import ConfigError


@dataclass(frozen=True)
class RowRanges:
    """Rank r owns lanes [r * L / W, (r + 1) * L / W). Raises ConfigError when W does not divide L."""

    batch_size: int
    lanes: int
    world: World
    workers: int

    def __post_init__(self) -> None:
        if self.lanes % self.world.size:
            allowed = divisors(self.lanes)
            shown = ", ".join(map(str, allowed[:12])) + (", ..." if len(allowed) > 12 else "")
            raise ConfigError(
                f"{self.lanes} lanes cannot be shared by {self.world.size} processes",
                f"use one of these numbers of processes: {shown}",
            )

    def of_rank(self) -> tuple[int, int]:
        """Returns (first row, end row) of this rank."""
        rows = self.batch_size // self.world.size
        return self.world.rank * rows, (self.world.rank + 1) * rows

    def of_workers(self) -> list[tuple[int, int]]:
        """Returns (first row, end row) per worker, in row order, none empty.

        Whole lanes when every worker gets at least one, so that a window is read once; otherwise single rows.
        """
        first, end = self.of_rank()
        unit = self.batch_size // self.lanes if self.lanes // self.world.size >= self.workers else 1
        units = (end - first) // unit
        workers = max(1, min(self.workers, units))
        cuts = [first + units * worker // workers * unit for worker in range(workers + 1)]
        return list(pairwise(cuts))


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
