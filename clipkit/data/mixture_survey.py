"""How often captions repeat in the batches of a mixture, within its sources and between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from clipkit.data.caption_survey import CaptionSurvey, none_of, survey_captions
from clipkit.data.captions import CaptionRules
from clipkit.data.kept import Kept
from clipkit.data.remote import ShardBytes


@dataclass(frozen=True)
class MixtureSurvey:
    """The surveys of all sources, and their parts of a batch."""

    sources: tuple[CaptionSurvey, ...]
    parts: tuple[int, ...]

    @cached_property
    def repeats(self) -> NDArray[np.int64]:
        """(distinct captions, S), how many of the pairs read of each source have each."""
        labels = np.unique(np.concatenate([source.labels for source in self.sources]))
        found = np.zeros((len(labels), len(self.sources)), dtype=np.int64)
        for number, source in enumerate(self.sources):
            found[np.searchsorted(labels, source.labels), number] = source.repeats
        return found

    def duplicate_share(self, batch_size: int) -> float:
        """Returns the expected share of the rows of a batch whose caption another row of it has, 0..1.

        As of one set: the rows of a source are taken for random ones of its pairs. With fewer pairs of a
        source than rows it is an upper bound, from how often two pairs agree.
        """
        pairs = [source.read for source in self.sources]
        rows = self._rows(batch_size)
        if self._bounded(batch_size):
            return self._bound(np.array(rows), np.array(pairs))
        kinds, times = np.unique(self.repeats, axis=0, return_counts=True)
        found = 0.0
        for held, often in zip(kinds.tolist(), times.tolist(), strict=True):
            absent = [_absent(*place) for place in zip(held, rows, pairs, strict=True)]
            for own, count in enumerate(held):
                if not count or not rows[own]:
                    continue
                alone = prod(absent[:own] + absent[own + 1 :])
                alone *= _absent(count - 1, rows[own] - 1, pairs[own] - 1)
                found += often * rows[own] * count / pairs[own] * (1 - alone)
        return found / max(1, sum(rows))

    def _rows(self, batch_size: int) -> list[int]:
        return [
            round(batch_size * part / sum(self.parts)) if source.read else 0
            for part, source in zip(self.parts, self.sources, strict=True)
        ]

    def _bounded(self, batch_size: int) -> bool:
        rows = self._rows(batch_size)
        return any(count > source.read for count, source in zip(rows, self.sources, strict=True))

    def _bound(self, rows: NDArray[np.int64], pairs: NDArray[np.int64]) -> float:
        held = self.repeats.astype(np.float64)
        # Of two pairs of sources s and t: how often they have one caption; a pair is no twin of itself.
        agree = (held.T @ held - np.diag(pairs)) / np.maximum(1, np.outer(pairs, pairs) - np.diag(pairs))
        others = np.maximum(0, rows - np.eye(len(rows)))
        alone = np.prod((1 - agree) ** others, axis=1)
        return float((rows * (1 - alone)).sum() / max(1, rows.sum()))

    def describe(self, batch_size: int) -> str:
        """Returns a line for the banner."""
        read, distinct = sum(source.read for source in self.sources), len(self.repeats)
        if not read:
            return "none could be read"
        sampled = any(source.sampled for source in self.sources)
        among = f"a sample of {read:,} pairs" if sampled else f"{read:,} pairs"
        share = self.duplicate_share(batch_size)
        bound = "at most " * self._bounded(batch_size)
        return (
            f"{distinct:,} distinct ({distinct / read:.1%}) in {among} of all sources; expected in a batch "
            f"of {batch_size:,}: {bound}{share:.1%} of the rows with the caption of another row"
        )


def survey_mixture(
    sources: Sequence[tuple[Kept, ShardBytes, CaptionRules]], parts: tuple[int, ...], seed: int
) -> MixtureSurvey:
    """Returns how often the captions of a mixture repeat, from as many pairs of each source as of a set."""
    return MixtureSurvey(tuple(survey_captions(*source, seed) for source in sources), parts)


def _absent(held: int, rows: int, pairs: int) -> float:
    """The probability that none of `held` of `pairs` is among so many rows drawn from them."""
    return none_of(held, rows, pairs) if held and rows > 0 else 1.0
