"""What a making job found and wrote, added up part by part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from clipkit.data.shards import ShardRecord
from clipkit.data.tables import RowReject
from clipkit.types import DataError


@dataclass
class Made:
    """What a job found and wrote. empty: shards that are left out, because no row of theirs is usable."""

    records: list[ShardRecord] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)
    first: RowReject | None = None
    rows: int = 0
    rotated: int = 0
    encoded: int = 0
    resumed: int = 0
    empty: int = 0

    def add(self, outcome: dict[str, Any]) -> None:
        """Takes in the outcome of one part."""
        if outcome["record"] is None:
            self.empty += 1
        else:
            self.records.append(ShardRecord(**outcome["record"]))
        for reject in outcome["rejects"]:
            self.first = self.first or RowReject(**reject)
            self.rejects[reject["reason"]] += 1
        self.rows += outcome["rows"]
        self.rotated += outcome["rotated"]
        self.encoded += outcome["encoded"]

    @property
    def usable(self) -> int:
        """Rows that are samples."""
        return self.rows - self.rejects.total()

    def refuse_too_many(self, source: str, rows: int, max_fraction: float) -> None:
        """Raises DataError when more than `max_fraction` of `rows` are unusable, naming the first."""
        if self.first is not None and self.rejects.total() > max_fraction * rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejects.most_common())
            detail = f" ({self.first.detail})" if self.first.detail else ""
            first = f"row {self.first.row}, {self.first.image}: {self.first.reason}{detail}"
            raise DataError(
                f"{source}: {self.rejects.total():,} of the first {self.rows:,} rows are unusable "
                f"({reasons}); first: {first}",
                "check --images and the columns, or allow more with --max-reject-fraction",
            )
