"""Intervals as people write them: `500` (steps), `30min` (wall time), `5%` (of the run), `1epoch`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|[a-z]+)?\s*")


@dataclass(frozen=True)
class Interval:
    """How often something happens; exactly one of the four is set.

    steps     optimizer steps
    seconds   wall time
    fraction  of the whole run, above 0 and at most 1
    epochs    passes over the data
    """

    steps: int | None = None
    seconds: float | None = None
    fraction: float | None = None
    epochs: float | None = None

    def in_steps(self, total_steps: int) -> int | None:
        """Returns the interval in steps (rounded, at least 1) of such a run, None for time and epochs."""
        if self.fraction is not None:
            return max(1, round(self.fraction * total_steps))
        return self.steps

    def due(
        self, step: int, total_steps: int, seconds: float = 0.0, steps_per_epoch: int | None = None
    ) -> bool:
        """Returns whether it is time after `step` finished steps, `seconds` after it last happened.

        Fractions and epochs are counted from the start of the run, so that 10% happens exactly ten times
        whatever the rounding, and a resumed run keeps the same steps. Wall time differs between ranks: agree
        on it. Never due are epochs of a length that is not known.
        """
        if self.seconds is not None:
            return seconds >= self.seconds
        if self.fraction is not None:
            return _reached(step, self.fraction * total_steps)
        if self.epochs is not None:
            return steps_per_epoch is not None and _reached(step, self.epochs * steps_per_epoch)
        return self.steps is not None and step % self.steps == 0


def _reached(step: int, period: float) -> bool:
    """Whether a multiple of `period` lies behind `step` and not behind the step before it."""
    # 1e-9: 0.1 * 30 is 3.0000000000000004, which must still be reached at step 3.
    done, before = (math.floor(count / period + 1e-9) for count in (step, step - 1))
    return done > before


def parse_interval(value: int | str) -> Interval:
    """Returns the interval that `value` writes: 500 or "500" steps, "90s", "30min", "2h", "1d", "5%" or
    "1epoch".

    Raises ValueError with a sentence that names the accepted forms.
    """
    problem = f"expected a number of steps, a time (30min), a share (5%) or epochs (1epoch), not {value!r}"
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(problem)
    form = _FORM.fullmatch(str(value).lower())
    if form is None:
        raise ValueError(problem)
    number, unit = float(form[1]), form[2]
    if number <= 0:
        raise ValueError(f"an interval is above 0, not {value!r}")
    if unit == "%":
        if number > 100:
            raise ValueError(f"a share of the run is at most 100%, not {value!r}")
        return Interval(fraction=number / 100)
    if unit in ("epoch", "epochs"):
        return Interval(epochs=number)
    if unit is not None:
        if unit not in _UNITS:
            raise ValueError(f"the unit of {value!r} is none of %, epochs, {', '.join(_UNITS)}")
        return Interval(seconds=number * _UNITS[unit])
    if not number.is_integer():
        raise ValueError(f"a number of steps is whole, not {value!r}")
    return Interval(steps=int(number))
