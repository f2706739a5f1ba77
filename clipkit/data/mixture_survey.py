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

        As of one set: the rows of a source are taken for random ones of its pairs.
        """
        pairs = [source.read for source in self.sources]
        rows = [
            round(batch_size * part / sum(self.parts)) if count else 0
            for part, count in zip(self.parts, pairs, strict=True)
        ]
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

    def describe(self, batch_size: int) -> str:
        """Returns a line for the banner."""
        read, distinct = sum(source.read for source in self.sources), len(self.repeats)
        if not read:
            return "none could be read"
        sampled = any(source.sampled for source in self.sources)
        among = f"a sample of {read:,} pairs" if sampled else f"{read:,} pairs"
        share = self.duplicate_share(batch_size)
        return (
            f"{distinct:,} distinct ({distinct / read:.1%}) in {among} of all sources; expected in a batch "
            f"of {batch_size:,}: {share:.1%} of the rows with the caption of another row"
        )


def survey_mixture(
    sources: Sequence[tuple[Kept, ShardBytes, CaptionRules]], parts: tuple[int, ...], seed: int
) -> MixtureSurvey:
    """Returns how often the captions of a mixture repeat, from as many pairs of each source as of a set."""
    return MixtureSurvey(tuple(survey_captions(*source, seed) for source in sources), parts)


def _absent(held: int, rows: int, pairs: int) -> float:
    """The probability that none of `held` of `pairs` is among so many rows drawn from them."""
    if not held or rows < 1:
        return 1.0
    if rows > pairs:
        # Fewer pairs were read than a batch takes: drawn with repetition, they agree no less often.
        return float((1 - min(1.0, held / max(1, pairs))) ** rows)
    return none_of(held, rows, pairs)
