"""Which source fills which row of which batch: pure arithmetic on whole numbers.

The weights become whole parts m_1 + ... + m_S = M; source s owns m_s neighbouring places of a circle of M.
The B rows of a batch stand on it at equal distances, and from batch to batch all of them move on by the same
step g, which is coprime to M. So

    in every batch    source s has floor(B m_s / M) or ceil(B m_s / M) rows: what an arc of equal points holds
    in M batches      each row has been on every place once, and has taken exactly m_s samples of source s
    in any batches    how many samples a row took of a source is a difference of two look-ups

The rows of a batch are cut into as many equal spans as a source has lanes; a span takes its samples from its
own lane, one after the other, and goes over to the next epoch of the source where the lane ends. That is the
same for every number of ranks and workers, and any batch can be the first. Lanes end within a few batches of
each other; only in those can a batch hold a sample twice.

The step g is near M / phi, so that the sources of a row alternate as evenly as can be (Kronecker sequence of
the golden ratio), and neighbouring rows stand far apart, so that every rank gets its part of every source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from clipkit.data.order import Ids, divisors, hash_key
from clipkit.types import ConfigError

MIXTURE_VERSION = 1
SAMPLES = "samples"  # samples/SOURCE counts those of a source
MAX_PARTS = 1_000_000
# Samples of a lane where a source has enough of them: the last ones of a lane wait for an epoch.
MIN_LANE = 16
_GOLDEN_SHARE = (math.sqrt(5) - 1) / 2


def parts_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Returns the smallest whole numbers in the ratio of the weights, as those are written in decimals.

    Where their sum would exceed a million: millionths, rounded by largest remainder. Raises ConfigError for a
    weight below half a millionth of all.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    whole = math.lcm(*(share.denominator for share in shares))
    if whole <= MAX_PARTS:
        return tuple(int(share * whole) for share in shares)
    parts = [math.floor(share * MAX_PARTS) for share in shares]
    remainders = [share * MAX_PARTS - part for share, part in zip(shares, parts, strict=True)]
    most = sorted(range(len(parts)), key=lambda at: (-remainders[at], at))
    for at in most[: MAX_PARTS - sum(parts)]:
        parts[at] += 1
    if not all(parts):
        weight = weights[parts.index(0)]
        raise ConfigError(
            f"a source of data.train has the weight {weight:g}, less than a millionth of all weights",
            "raise it or leave the source out",
        )
    return tuple(parts)


def source_lanes(num_samples: int, lanes: int) -> int:
    """Returns the lanes of a source: the most that divide those of the run and hold 16 samples each."""
    return max(each for each in divisors(lanes) if each == 1 or num_samples // each >= MIN_LANE)


class Draws(NamedTuple):
    """Rows of a batch that take a sample of one source: (k,) each.

    rows    numbers of the rows, ascending
    lanes   lane of the source
    counts  samples that were taken from that lane before, in all batches and rows
    least   of all lanes of these rows, the fewest samples that were taken from one before this batch
    """

    rows: Ids
    lanes: Ids
    counts: Ids
    least: int


@dataclass(frozen=True, eq=False)
class Mixture:
    """The pattern of a mixture. `parts` as `parts_of` returns them, `seed` turns the circle."""

    batch_size: int
    parts: tuple[int, ...]
    seed: int

    @cached_property
    def whole(self) -> int:
        return sum(self.parts)

    @cached_property
    def _pattern(self) -> Ids:
        """(M,), source at time t of a row that stood on place 0 at time 0."""
        places = np.arange(self.whole, dtype=np.int64) * _stride(self.whole) % self.whole
        return np.searchsorted(np.cumsum(self.parts), places, side="right").astype(np.int64)

    @cached_property
    def _times(self) -> list[Ids]:
        """For each source the times at which it has its turn, ascending, (m_s,)."""
        return [np.flatnonzero(self._pattern == source) for source in range(len(self.parts))]

    @cached_property
    def _starts(self) -> Ids:
        """(B,), the time of every row at batch 0."""
        turned = np.arange(self.batch_size, dtype=np.int64) * _stride(self.batch_size) % self.batch_size
        places = turned * self.whole // self.batch_size + hash_key(self.seed, "mixture") % self.whole
        found: Ids = places * pow(_stride(self.whole), -1, self.whole) % self.whole
        return found

    def sources(self, step: int, first: int, end: int) -> Ids:
        """Returns the source of rows first..end of batch `step`, (end - first,)."""
        found: Ids = self._pattern[(self._starts[first:end] + step % self.whole) % self.whole]
        return found

    def taken(self, source: int, steps: int, first: int, end: int) -> Ids:
        """Returns how many samples of a source each of these rows takes in batches 0..steps-1."""
        turns, rest = divmod(steps, self.whole)
        starts = self._starts[first:end]
        times, part = self._times[source], self.parts[source]
        wrapped, stops = np.divmod(starts + rest, self.whole)
        found: Ids = np.searchsorted(times, stops) - np.searchsorted(times, starts)
        found += (turns + wrapped) * part
        return found

    def totals(self, steps: int) -> tuple[int, ...]:
        """Returns how many samples of each source batches 0..steps-1 hold."""
        return tuple(
            int(self.taken(source, steps, 0, self.batch_size).sum()) for source in range(len(self.parts))
        )

    def share(self, source: int) -> tuple[int, int]:
        """Returns the least and the most rows of a batch that a source has."""
        rows = Fraction(self.batch_size * self.parts[source], self.whole)
        return math.floor(rows), math.ceil(rows)

    def draws(self, source: int, lanes: int, step: int, first: int, end: int) -> Draws:
        """Returns what rows first..end of batch `step` take of a source with so many lanes."""
        span = self.batch_size // lanes
        # Whole spans: rows before `first` in a span come first in its lane as well.
        begin, stop = first // span * span, -(-end // span) * span
        before = self.taken(source, step, begin, stop).reshape(-1, span).sum(axis=1)
        own = (self.sources(step, begin, stop) == source).reshape(-1, span)
        counts = before[:, None] + np.cumsum(own, axis=1) - own
        rows = begin + np.flatnonzero(own)
        here = (rows >= first) & (rows < end)
        rows = rows[here]
        return Draws(rows, rows // span, counts.reshape(-1)[rows - begin], int(before.min()))


def _stride(count: int) -> int:
    """A number coprime to `count` near count / phi, of the nearest 64 the one whose multiples spread best."""
    middle = round(count * _GOLDEN_SHARE)
    near = [each for each in range(middle - 100, middle + 101) if 0 < each <= count]
    coprime = [each for each in near if math.gcd(each, count) == 1]
    nearest = sorted(coprime, key=lambda each: abs(each - middle))[:64]
    return min(nearest, key=lambda each: _largest_quotient(each, count))


def _largest_quotient(numerator: int, denominator: int) -> int:
    """Of the continued fraction: the smaller it is, the more evenly multiples fill a circle (Khinchin)."""
    largest = 0
    while numerator:
        quotient, rest = divmod(denominator, numerator)
        largest = max(largest, quotient)
        denominator, numerator = numerator, rest
    return largest
