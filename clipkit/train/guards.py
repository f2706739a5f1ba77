"""What keeps a bad step out of the weights: all ranks skip it, the log names it, too many end the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipkit import dist
from clipkit.log import RunLog
from clipkit.train.setup import Run
from clipkit.train.spikes import WINDOW, Spike, spike_of
from clipkit.train.state import TrainState
from clipkit.train.step import StepResult
from clipkit.types import Batch, ClipkitError

MAX_SKIPPED_STEPS = 10
# A loss scale that starts at 2^16 may halve some twenty times before the first gradient fits into fp16.
MAX_SKIPPED_STEPS_FP16 = 50
KEYS = 5  # that are named per rank
RANKS = 4  # that are named in a line; the log has them all

Keys = dict[int, list[str]]


@dataclass
class Guard:
    """Judges the steps of a run; counts, reports and limits those whose update was not applied.

    spike: of the step at hand. warned: whether the step before was a spike that was announced.
    """

    run: Run
    state: TrainState
    log: RunLog
    spike: Spike | None = None
    warned: bool = False

    def accept(self, loss: float) -> bool:
        """Returns whether a step with this finite loss, the mean over ranks, may change the weights."""
        mode = self.run.config.run.on_spike
        self.spike = None if mode == "off" else spike_of(loss, self.state.losses)
        return self.spike is None or mode == "warn"

    def settle(self, result: StepResult, batch: Batch) -> Spike | None:
        """Counts the step that has just ended and reports it if it leapt or was skipped; all ranks call it.

        Returns the spike that asks for a rollback. Raises ClipkitError at the last one of
        `run.max_skipped_steps` skipped steps in a row.
        """
        spike, self.spike = self.spike, None
        if spike is not None and self.run.config.run.on_spike == "rollback":
            return spike
        if result.taken:
            self.state.skipped_in_a_row = 0
            self.state.losses = [*self.state.losses, result.loss][-WINDOW:]
            self._warn(spike, batch)
        else:
            self._skip(spike, result, batch)
        return None

    def _warn(self, spike: Spike | None, batch: Batch) -> None:
        if spike is not None:
            cause, keys = self._leap(spike, batch)
            self.log.append({"event": "spike", "step": self.state.step, "cause": cause, "keys": keys})
            if not self.warned:
                self.log.note(f"warning: {cause}")
        # Once per leap: a loss that stays up is a new level and not fifty spikes.
        self.warned = spike is not None

    def _skip(self, spike: Spike | None, result: StepResult, batch: Batch) -> None:
        state, terms = self.state, list[str]()
        state.skipped += 1
        state.skipped_in_a_row += 1
        if spike is None:
            cause, terms, keys = self._not_finite(result, batch)
        else:
            cause, keys = self._leap(spike, batch)
        record = {"step": state.step, "cause": cause, "terms": terms, "keys": keys}
        self.log.append({"event": "skipped", **record, "in_a_row": state.skipped_in_a_row})
        if state.skipped_in_a_row >= self._most():
            raise self._too_many(cause, spike)
        # Under fp16 a gradient that overflows is the loss scale finding its place.
        if spike is not None or terms or self.run.accelerator.scaler is None:
            self.log.note(f"warning: {cause}; the step is skipped on all ranks")

    def _most(self) -> int:
        default = MAX_SKIPPED_STEPS if self.run.accelerator.scaler is None else MAX_SKIPPED_STEPS_FP16
        return self.run.config.run.max_skipped_steps or default

    def _leap(self, spike: Spike, batch: Batch) -> tuple[str, Keys]:
        keys = dict(enumerate(dist.gather_objects(list(batch.keys[:KEYS]))))
        return f"{spike} at step {self.state.step} ({_samples(keys)})", keys

    def _not_finite(self, result: StepResult, batch: Batch) -> tuple[str, list[str], Keys]:
        """Returns the cause, the terms that are not finite, and keys of the ranks that they stand on."""
        bad = [
            name
            for name, value in result.terms.items()
            if name.startswith("loss") and not math.isfinite(float(value))
        ]
        found: list[tuple[list[str], list[str]]] = dist.gather_objects((bad, list(batch.keys[:KEYS])))
        terms = list(dict.fromkeys(name for names, _ in found for name in names))
        # The total says nothing beside the term that spoils it.
        terms = [name for name in terms if name != "loss"] or terms
        # Every rank has the same gradient: where it went wrong is not known.
        keys = {rank: keys for rank, (names, keys) in enumerate(found) if names or not terms}
        named = f"{', '.join(terms)} {'are' if len(terms) > 1 else 'is'}" if terms else "the gradient is"
        return f"{named} not finite at step {self.state.step} ({_samples(keys)})", terms, keys

    def _too_many(self, cause: str, spike: Spike | None) -> ClipkitError:
        if spike is not None:
            cure = "set run.on_spike: warn to train through it, or "
        elif self.run.accelerator.scaler is not None:
            cure = "set run.precision to bf16 or fp32, "
        else:
            cure = ""
        return ClipkitError(
            f"{cause}; no weights were changed in the last {self.state.skipped_in_a_row} steps",
            f"{cure}lower optim.lr or lengthen optim.warmup, in another run.dir: "
            "the last checkpoint of this one is intact",
        )


def _samples(keys: Keys) -> str:
    parts = [f"samples {', '.join(found)}, ... of rank {rank}" for rank, found in keys.items()]
    return "; ".join(parts if len(parts) <= RANKS else [*parts[:RANKS], f"{len(parts) - RANKS} more ranks"])
