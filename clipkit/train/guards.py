"""What keeps a bad step out of the weights: all ranks skip it, the log names it, too many end the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from clipkit import dist
from clipkit.log import RunLog
from clipkit.train.setup import Run
from clipkit.train.state import TrainState
from clipkit.train.step import StepResult
from clipkit.types import Batch, ClipkitError

MAX_SKIPPED_STEPS = 10
# A loss scale that starts at 2^16 may halve some twenty times before the first gradient fits into fp16.
MAX_SKIPPED_STEPS_FP16 = 50
KEYS = 5  # that are named per rank


@dataclass
class Guard:
    """Counts, reports and limits the steps of a run whose update was not applied."""

    run: Run
    state: TrainState
    log: RunLog

    def settle(self, result: StepResult, batch: Batch) -> None:
        """Counts the step that has just ended and reports it if it was skipped; all ranks call it.

        Raises ClipkitError at the last one of `run.max_skipped_steps` skipped steps in a row.
        """
        if result.taken:
            self.state.skipped_in_a_row = 0
            return
        self.state.skipped += 1
        self.state.skipped_in_a_row += 1
        cause, terms, samples = self._describe(result, batch)
        self.log.append(
            {
                "event": "skipped",
                "step": self.state.step,
                "cause": cause,
                "terms": terms,
                "keys": samples,
                "in_a_row": self.state.skipped_in_a_row,
            }
        )
        if self.state.skipped_in_a_row >= self._most():
            raise self._too_many(cause)
        # Under fp16 a gradient that overflows is the loss scale finding its place.
        if terms or self.run.accelerator.scaler is None:
            self.log.note(f"warning: {cause}; the step is skipped on all ranks")

    def _most(self) -> int:
        default = MAX_SKIPPED_STEPS if self.run.accelerator.scaler is None else MAX_SKIPPED_STEPS_FP16
        return self.run.config.run.max_skipped_steps or default

    def _describe(self, result: StepResult, batch: Batch) -> tuple[str, list[str], dict[str, list[str]]]:
        """Returns the cause, the terms that are not finite, and rank -> keys of the ranks they stand on."""
        bad = [
            name
            for name, value in result.terms.items()
            if name.startswith("loss") and not math.isfinite(float(value))
        ]
        found: list[tuple[list[str], list[str]]] = dist.gather_objects((bad, list(batch.keys[:KEYS])))
        ranks = [rank for rank, (terms, _) in enumerate(found) if terms] or list(range(len(found)))
        terms = list(dict.fromkeys(name for names, _ in found for name in names))
        # The total says nothing beside the term that spoils it.
        terms = [name for name in terms if name != "loss"] or terms
        keys = {str(rank): found[rank][1] for rank in ranks}
        named = f"{', '.join(terms)} {'are' if len(terms) > 1 else 'is'}" if terms else "the gradient is"
        return f"{named} not finite at step {self.state.step} ({_samples(keys)})", terms, keys

    def _too_many(self, cause: str) -> ClipkitError:
        precision = "" if self.run.accelerator.scaler is None else "set run.precision to bf16 or fp32, "
        return ClipkitError(
            f"{cause}; no weights were changed in the last {self.state.skipped_in_a_row} steps",
            f"{precision}lower optim.lr or lengthen optim.warmup, in another run.dir: "
            "the last checkpoint of this one is intact",
        )


def _samples(keys: dict[str, list[Any]]) -> str:
    parts = [f"samples {', '.join(found)}, ... of rank {rank}" for rank, found in keys.items()]
    return "; ".join(parts if len(parts) <= 4 else [*parts[:4], f"{len(parts) - 4} more ranks"])
