"""Where samples and captions of a run came from: counted on every rank, summed, kept in checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from clipkit import dist
from clipkit.data.captions import COUNTED, FELL_BACK
from clipkit.data.mixture import SAMPLES
from clipkit.types import Batch


class Contributions:
    """What this rank's batches were made of since it was last asked. names: what `Batch.counts` may hold."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._since: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        """Counts a batch that was trained on."""
        self._since.update(batch.counts)

    def settle(self, totals: dict[str, int]) -> None:
        """Adds what all ranks have counted since to `totals`; called by all ranks at the same steps."""
        if not self.names:
            return
        found = dist.agree([float(self._since[name]) for name in self.names], "sum")
        for name, count in zip(self.names, found, strict=True):
            totals[name] = totals.get(name, 0) + int(count)
        self._since.clear()


def describe_counts(totals: Mapping[str, int]) -> Iterator[str]:
    """Yields the lines about sources and caption fields that a run ends with, where there were several."""
    for kind in (SAMPLES, COUNTED):
        counts = {name.partition("/")[2]: n for name, n in totals.items() if name.startswith(f"{kind}/")}
        if not counts:
            continue
        whole = max(1, sum(counts.values()))
        parts = []
        for name, count in counts.items():
            instead = totals.get(f"{FELL_BACK}/{name}", 0) if kind == COUNTED else 0
            taken = f", {instead:,} of them where another field was drawn and missing" if instead else ""
            parts.append(f"{name} {count:,} ({count / whole:.1%}{taken})")
        yield f"{kind}: {'; '.join(parts)}"
