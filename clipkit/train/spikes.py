"""When a loss has leapt: further above the losses of late than their own spread explains."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 100  # losses of taken steps that are remembered
ENOUGH = 50  # of them before anything is judged: the loss falls fastest at the start
THRESHOLD = 10.0  # deviations above the median
MAD_TO_DEVIATION = 1.4826  # of a normal distribution
# Of the median: a loss that hardly varies may rise by a tenth before it counts as a leap.
LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class Spike:
    """A loss, the median it leapt from, and the height of the leap in deviations."""

    loss: float
    median: float
    deviations: float

    def __str__(self) -> str:
        return f"the loss leapt from {self.median:.4g} to {self.loss:.4g} ({self.deviations:.0f} deviations)"


def spike_of(loss: float, losses: Sequence[float]) -> Spike | None:
    """Returns what is wrong with `loss` after `losses`, those of the last taken steps; None: nothing is.

    A spike lies more than 10 deviations above their median. The deviation is 1.4826 times the median absolute
    one (robust against the spikes among them), at least 1 % of the median. Fewer than 50 losses: None.
    """
    if len(losses) < ENOUGH:
        return None
    median = statistics.median(losses)
    spread = MAD_TO_DEVIATION * statistics.median(abs(value - median) for value in losses)
    deviation = max(spread, LEAST_DEVIATION * abs(median), 1e-12)
    deviations = (loss - median) / deviation
    return Spike(loss, median, deviations) if deviations > THRESHOLD else None
