"""The score that a fraction of all samples reaches, by DataComp's rule, without holding the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from clipkit.types import ConfigError, DataError

_DIGIT = 16  # bits that one pass over the scores settles


def top_threshold(scores: Callable[[], Iterable[NDArray[np.float64]]], fraction: float) -> float:
    """Returns the score at place int(n * fraction), counted from 0, of the n scores from high to low.

    DataComp (arXiv:2304.14108, apply_filter.py) keeps what is >= this: int(n * fraction) + 1 samples and
    those of equal score. Where its code fails (fraction = 1) everything is kept: -inf. Scores that are NaN
    do not count. `scores` is called once for the count and once for each 16 bits of a score.
    """
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"--top {fraction} is not within 0..1", "give the fraction to keep, for example 0.3"
        )
    num_scores = sum(int((~np.isnan(part)).sum()) for part in scores())
    if num_scores == 0:
        raise DataError("no sample has a score", "check the field or the model of --clip-score")
    place = int(num_scores * fraction)
    if place >= num_scores:
        return -math.inf
    left, prefix = num_scores - 1 - place, 0  # the place counted from the lowest
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        histogram = np.zeros(1 << _DIGIT, dtype=np.int64)
        for part in scores():
            bits = _ordered_bits(part)
            if shift < 64 - _DIGIT:
                bits = bits[bits >> np.uint64(shift + _DIGIT) == np.uint64(prefix)]
            digits = (bits >> np.uint64(shift)) & np.uint64((1 << _DIGIT) - 1)
            histogram += np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT)
        below = np.cumsum(histogram)
        digit = int(np.searchsorted(below, left, side="right"))
        left -= int(below[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
    return _from_bits(prefix)


def _ordered_bits(scores: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Bits that are ordered as unsigned numbers like the scores themselves."""
    kept = scores[~np.isnan(scores)] + 0.0  # -0.0 becomes 0.0
    bits = np.ascontiguousarray(kept).view(np.uint64)
    top = np.uint64(1 << 63)
    return np.where(bits & top, ~bits, bits | top)


def _from_bits(bits: int) -> float:
    top = 1 << 63
    bits = bits ^ top if bits & top else ~bits & (2 * top - 1)
    return float(np.array([bits], dtype=np.uint64).view(np.float64)[0])
