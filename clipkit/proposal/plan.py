"""Batch, length, learning rate and cadences for a model whose speed was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clipkit.proposal.machine import Machine, Speed
from clipkit.proposal.model import Chosen
from clipkit.proposal.survey import DataFacts

Section = dict[str, tuple[Any, str]]

_TRAINING = 0.9  # of the time: the rest goes to evaluation and checkpoints
_PASSES, _PASSES_OF_TRAINED = 32, 8
_MEMORY = {"cuda": 0.9, "mps": 0.5, "cpu": 0.7}  # of it a run may take
_STEPS = 5000  # below so many a run is far from converged
_SMALLEST_BATCH = 256
_LARGEST_BATCH = {"cuda": 16_384, "mps": 256, "cpu": 256}
_STRONG_CROPS_BELOW = 15_000_000
_MANY_REJECTS = 0.01  # what data.max_reject_fraction allows by itself


@dataclass(frozen=True)
class Pace:
    """Two measurements of the same model, the second with the larger batch, None when it did not fit."""

    small: Speed
    large: Speed | None

    @property
    def samples_per_s(self) -> float:
        """The speed with the larger batch that fitted."""
        return (self.large or self.small).samples_per_s

    def fitting(self, memory: int | None) -> int | None:
        """Returns how many samples fit into so much memory at a time, None where that is not known."""
        if self.large is None:
            return self.small.rows
        each = (self.large.memory - self.small.memory) / (self.large.rows - self.small.rows)
        if memory is None or each <= 0:
            return None
        return max(1, int((memory - self.large.memory) / each) + self.large.rows)


def power_of_two(number: float) -> int:
    """Returns the largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)


def held_out(pairs: int) -> int:
    """Returns how many pairs to keep for evaluation: 5 % up to 1,000, of a million pairs and more 5,000."""
    if pairs < 1000:
        return 0
    return 5000 if pairs >= 1_000_000 else min(1000, pairs // 20)


def plan_data(
    source: dict[str, Any] | str, data: DataFacts, chosen: Chosen, machine: Machine, pace: Pace, seen: float
) -> Section:
    """Returns the data section; `seen`: samples that the run will see. There are at least two pairs."""
    held = held_out(data.pairs)
    train = data.pairs - held
    usable = power_of_two(train / (8 if train >= 64 else 2))
    batch = min(
        max(2, usable), _LARGEST_BATCH[machine.device], max(_SMALLEST_BATCH, power_of_two(seen / _STEPS))
    )
    section: Section = {"train": (source, _about_pairs(data))}
    if held:
        section["holdout"] = (held, "pairs that are never trained on; retrieval among them is the evaluation")
    section["batch_size"] = (batch, _about_batch(batch, train))
    memory = None if machine.memory is None else int(machine.memory * _MEMORY[machine.device])
    fitting = pace.fitting(memory)
    if fitting is not None and fitting < batch:
        micro = power_of_two(fitting)
        section["micro_batch"] = (
            micro,
            f"what fits at a time into {_gigabytes(memory)}, from measured steps",
        )
    workers = max(0, min(8 if machine.device == "cuda" else 2, machine.processors - 1))
    section["workers"] = (workers, f"{machine.processors} processor(s); one is left to the training itself")
    crop = [0.5, 1.0] if chosen.learns and data.pairs < _STRONG_CROPS_BELOW else [0.9, 1.0]
    section["crop_scale"] = (crop, _about_crops(chosen, data.pairs))
    share = data.unusable.total() / max(1, data.looked)
    if share > _MANY_REJECTS:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in data.unusable.most_common(3))
        allowed = min(1.0, round(1.5 * share + 0.005, 2))
        section["max_reject_fraction"] = (
            allowed,
            f"of {data.looked:,} looked at: {reasons}; better mend them",
        )
    return section


def seen_samples(data: DataFacts, chosen: Chosen, pace: Pace, budget_s: float | None) -> float:
    """Returns how many samples the run may see: so many passes, or what the budget allows."""
    passes = (_PASSES if chosen.learns else _PASSES_OF_TRAINED) * (data.pairs - held_out(data.pairs))
    return passes if budget_s is None else min(passes, pace.samples_per_s * budget_s * _TRAINING)


def plan_run(
    data: DataFacts, chosen: Chosen, machine: Machine, pace: Pace, seen: float, batch: int, budget: str | None
) -> tuple[Section, int]:
    """Returns the run section, and the samples that the run will see."""
    train = data.pairs - held_out(data.pairs)
    per_epoch = train // batch * batch
    most = _PASSES if chosen.learns else _PASSES_OF_TRAINED
    epochs = int(seen // per_epoch)
    section: Section = {}
    samples = epochs * per_epoch if epochs else max(batch, int(seen) // batch * batch)
    seconds = samples / pace.samples_per_s / _TRAINING
    steps = f"{samples // batch:,} steps"
    cost = f"{steps}, about {_time(seconds)} at {pace.samples_per_s:,.0f} samples/s (measured)"
    if epochs >= most:
        limit = "CLIP's number (arXiv:2103.00020)" if chosen.learns else "more would overfit (assumed)"
        section["epochs"] = (epochs, f"{limit}; {cost}")
    elif epochs:
        section["epochs"] = (epochs, f"as many as fit into {budget}: {cost}")
    else:
        section["samples"] = (samples, f"{samples / train:.0%} of one pass, what fits into {budget}: {cost}")
    section["precision"] = (machine.precision, machine.why_precision)
    section["checkpoint_every"] = (
        ("25%", "a short run") if seconds < 1200 else ("10min", "what a crash may cost at most")
    )
    if held_out(data.pairs):
        section["evaluate_every"] = ("10%", "ten times in the run, on the pairs held out")
    return section, samples


def plan_optimizer(chosen: Chosen, batch: int, steps: float) -> Section:
    """Returns the optim section."""
    section: Section = {}
    if chosen.learns:
        rate = 5e-4 if batch >= 16_384 else 1e-3
        section["lr"] = (rate, "clipkit's default: 1e-3 up to batches of 8 k, 5e-4 from 16 k on")
        section["weight_decay"] = (0.2, "CLIP's (arXiv:2103.00020)")
    else:
        section["lr"] = (1e-5, "trained weights move little: usual for fine-tuning CLIP (arXiv:2212.00638)")
        section["weight_decay"] = (0.1, "milder than CLIP's 0.2: it pulls away from the trained weights")
    many = 0.05 * steps > 2000
    section["warmup"] = (
        2000 if many else "5%",
        "CLIP's 2,000 steps" if many else "CLIP's 2,000 steps are too many",
    )
    return section


def _about_pairs(data: DataFacts) -> str:
    distinct, compared = data.distinct
    how = "" if data.exact else "about "
    return f"{how}{data.pairs:,} pairs; {distinct:,} distinct captions in {compared:,} compared"


def _about_batch(batch: int, pairs: int) -> str:
    if batch < _SMALLEST_BATCH:
        return f"the set of negatives; {pairs:,} pairs give no larger one"
    if batch == _SMALLEST_BATCH:
        return "the set of negatives; smaller ones learn little, larger ones leave too few steps"
    return f"the set of negatives; the largest that leaves {_STEPS:,} steps, or that pairs and device bear"


def _about_crops(chosen: Chosen, pairs: int) -> str:
    if not chosen.learns:
        return "weak crops, as the weights were trained with"
    return f"{pairs:,} pairs: " + ("strong crops below 15 M" if pairs < _STRONG_CROPS_BELOW else "weak crops")


def _gigabytes(count: int | None) -> str:
    return "memory" if count is None else f"{count / 1e9:.1f} GB"


def _time(seconds: float) -> str:
    for limit, length, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86_400:,.3g} days"
