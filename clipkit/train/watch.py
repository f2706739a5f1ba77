"""What a run says about itself while it trains: diagnostics every n steps, and alarms that name a cure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipkit import dist
from clipkit.evaluation import diagnostics
from clipkit.learner import Learner
from clipkit.log import RunLog
from clipkit.types import Batch

PATIENCE = 3  # log lines in a row below the collapse limit: one bad batch is no collapse
STUCK_STEPS = 500
STUCK_SHARE = 0.02  # a loss this close to chance, relatively, has learned nothing
PINNED_STEPS = 1000
DUPLICATES = 0.01
APART = 0.5  # mean cosine of other couples from which near means alike: at the start all rows are near
ROWS = 512  # of a batch that are looked at: products of rows stay small
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed number

CURES = {
    "collapsed": "usual causes: no predictor, a learning rate too high, BatchNorm in evaluation mode",
    "stuck": "usual causes: the learning rate (too high or too low), captions that do not belong to their "
    "pictures, a batch full of duplicates",
    "pinned": "the temperature has reached its limit of 100: more duplicates in the data than it bears, or a "
    "learning rate too high",
    "duplicates": "clip pushes pairs with equal captions apart; objectives: [{name: unicl}] does not",
    "near duplicates": "clip pushes them apart; remove the copies, or name them by a field of their samples: "
    "objectives: [{name: unicl, label: json.FIELD}]",
}


@dataclass
class Watch:
    """Looks at log records and, now and then, at the embeddings of a batch; never changes the training.

    Counts start anew in a resumed run. Every alarm sounds once.
    """

    learner: Learner
    rows: int  # of the global batch
    log: RunLog
    weak: dict[str, int] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    sounded: set[str] = field(default_factory=set)

    def record(self, step: int, record: Mapping[str, float | int | str]) -> None:
        """Looks at the record of a logged step for collapse, a loss at chance, and a pinned temperature."""
        for name, value in record.items():
            kind, _, label = name.partition("/")
            if kind == "spread":
                self.weak[label] = self.weak.get(label, 0) + 1 if float(value) < diagnostics.COLLAPSED else 0
                if self.weak[label] >= PATIENCE:
                    cause = f"{label} has collapsed: its embeddings spread by {float(value):.3f} (healthy: 1)"
                    self._sound(step, "collapsed", label, cause)
            elif kind == "loss" and label:
                chance = self.learner.chance(label, self.rows)
                near = chance is not None and abs(float(value) - chance) < STUCK_SHARE * abs(chance)
                if self._lasts(f"stuck/{label}", near, step, STUCK_STEPS):
                    cause = (
                        f"{label} has stayed at {chance:.3f}, the loss of guessing, for {STUCK_STEPS} steps"
                    )
                    self._sound(step, "stuck", label, cause)
        pinned = float(record.get("logit_scale", 0.0)) > 99.9
        if self._lasts("pinned", pinned, step, PINNED_STEPS):
            self._sound(step, "pinned", "", f"the temperature stood at its limit for {PINNED_STEPS} steps")

    def _lasts(self, name: str, holds: bool, step: int, steps: int) -> bool:
        if not holds:
            self.since.pop(name, None)
            return False
        return step - self.since.setdefault(name, step) >= steps

    def _sound(self, step: int, kind: str, label: str, cause: str) -> None:
        if (key := f"{kind}/{label}") in self.sounded:
            return
        self.sounded.add(key)
        self.log.append({"event": "alarm", "step": step, "alarm": kind, "term": label, "cause": cause})
        self.log.note(f"warning: step {step}: {cause} ({CURES[kind]})")

    def look(self, step: int, batch: Batch, seen: Mapping[str, Tensor], terms: Mapping[str, Tensor]) -> None:
        """Writes the diagnostics of a batch; all ranks call it, the main one writes.

        Similarities and the like are of at most 512 rows of the main rank, duplicates of the global batch.
        """
        values = gradient_shares(terms)
        if "text" in batch.texts:
            hashes = dist.gather(text_hashes(batch.texts["text"]))
            values["duplicate_captions"] = diagnostics.duplicate_share(hashes)
            if values["duplicate_captions"] > DUPLICATES and "clip" in self.learner.weights:
                share = f"{100 * values['duplicate_captions']:.0f} % of the batch"
                self._sound(step, "duplicates", "", f"{share} share a caption with another pair")
        if not dist.World.current().is_main:
            return
        rows = {name: x[:ROWS].float().cpu() for name, x in seen.items()}
        for name, x in rows.items():
            part, _, view = name.partition(".")
            if part == "trunk":
                values[f"effective_rank/{view}"] = diagnostics.effective_rank(x)
        record: dict[str, object] = {"event": "diagnostics", "step": step, "values": values}
        image, text = rows.get("joint.image"), rows.get("joint.text")
        if image is not None and text is not None:
            values |= diagnostics.describe_pairs(image, text)
            near, others = values["near_duplicates"], values["negative_similarity"]
            if near > DUPLICATES and others < APART and "clip" in self.learner.weights:
                cause = f"{100 * near:.0f} % of the rows have a neighbour alike in picture and caption"
                self._sound(step, "near duplicates", "", cause)
            record["similarity"] = diagnostics.similarity_histogram(image, text)
        self.log.append(record)


def gradient_shares(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns {"gradient_share/<label>"} of every term, 0..1, means over ranks."""
    labels = [name for name in terms if name.startswith("gradient/")]
    norms = dist.agree([float(terms[name]) for name in labels], "sum") if labels else []
    shares = diagnostics.gradient_shares(norms)
    return {f"gradient_share/{label[9:]}": share for label, share in zip(labels, shares, strict=True)}


def text_hashes(tokens: Tensor) -> Tensor:
    """Returns int64 (B,): equal for rows with equal tokens, whatever padding of zeros follows.

    tokens int64 (B, T). A polynomial modulo 2^64; ranks may have trimmed to different T.
    """
    powers = torch.full((tokens.shape[1],), _ODD, dtype=torch.int64, device=tokens.device).cumprod(0)
    return (tokens * powers).sum(dim=1)
