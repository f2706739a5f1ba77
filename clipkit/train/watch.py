"""What a run says about itself while it trains: diagnostics every n steps, and alarms that name a cure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit import dist
from clipkit.evaluation import diagnostics
from clipkit.evaluation.embed import gather_rows
from clipkit.learner import Learner, Pair
from clipkit.log import RunLog
from clipkit.losses import alignment, uniformity
from clipkit.types import Batch

PATIENCE = 3  # log lines in a row below the collapse limit: one bad batch is no collapse
STUCK_STEPS = 500
STUCK_SHARE = 0.02  # a loss this close to chance, relatively, has learned nothing
PINNED_STEPS = 1000
DUPLICATES = 0.01
APART = 0.5  # mean cosine of other couples from which near means alike: at the start all rows are near
ROWS = 512  # of a batch that are looked at: products of rows stay small
BUDGET = 0.01  # of the time spent training that the main rank may look around
SKIPPED = "looking has cost more than 1 % of the training so far"
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed number

CURES = {
    "collapsed": "usual causes: no predictor, a learning rate too high, BatchNorm in evaluation mode",
    "stuck": "usual causes: the learning rate (too high or too low), captions that do not belong to their "
    "pictures, a batch full of duplicates",
    "pinned": "the temperature has reached its limit of 100: more duplicates in the data than it bears, or a "
    "learning rate too high",
    "duplicates": "objectives: [{name: unicl}] does not push pairs with equal captions apart",
    "near duplicates": "the objective pushes them apart; remove the copies, or name them by a field: "
    "objectives: [{name: unicl, label: json.FIELD}]",
}


@dataclass
class Watch:
    """Looks at log records and, now and then, at the embeddings of a batch; never changes the training.

    Counts start anew in a resumed run. Every alarm sounds once. spent: seconds of the main rank so far.
    """

    learner: Learner
    rows: int  # of the global batch
    log: RunLog
    clock: Callable[[], float] = time.perf_counter
    spent: float = 0.0
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

    def look(
        self,
        step: int,
        batch: Batch,
        seen: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        trained: float,
    ) -> None:
        """Writes the diagnostics of a batch; all ranks call it, the main one writes.

        Similarities and the like are of at most 512 rows of the main rank, duplicates of the global batch.
        trained: seconds of training so far. What the main rank does alone is left out, and the record says
        `skipped`, while it has cost more than 1 % of them; what ranks do together is cheap and always done.
        """
        values = gradient_shares(terms)
        pairs = distinct(self.learner.pairs)
        self._count_captions(step, batch, pairs, values, next(iter(seen.values())).device)
        if not dist.World.current().is_main:
            return
        record: dict[str, Any] = {"event": "diagnostics", "step": step, "values": values}
        if self.spent > BUDGET * trained:
            record["skipped"] = SKIPPED
        else:
            began = self.clock()
            self._describe(record, pairs, {name: x[:ROWS].float().cpu() for name, x in seen.items()})
            self.spent += self.clock() - began
        self.log.append(record)

    def _count_captions(
        self, step: int, batch: Batch, pairs: Mapping[str, Pair], values: dict[str, float], device: Any
    ) -> None:
        """Adds the share of rows with the caption of another row, once per caption that pairs read."""
        counted: dict[str, float] = {}
        for suffix, pair in pairs.items():
            if pair.text not in batch.texts:
                continue
            if pair.text not in counted:
                hashes = text_hashes(batch.texts[pair.text], self.learner.towers.tokenizer.pad_id)
                # Hashed where the batch lies, gathered where the group of ranks can.
                with dist.uneven(batch.shares):
                    everyone = gather_rows(hashes.to(device)).cpu()
                counted[pair.text] = diagnostics.duplicate_share(everyone)
                values[f"duplicate_captions{suffix}"] = counted[pair.text]
            share = counted[pair.text]
            if pair.repels and share > DUPLICATES:
                cause = (
                    f"{100 * share:.0f} % of the batch share a caption, and {pair.label} pushes them apart"
                )
                self._sound(step, "duplicates", pair.label, cause)

    def _describe(self, record: dict[str, Any], pairs: Mapping[str, Pair], rows: dict[str, Tensor]) -> None:
        """Adds what takes products of rows (N, D) to the record."""
        values, step = record["values"], record["step"]
        for name, x in rows.items():
            part, _, view = name.partition(".")
            if part == "trunk":
                values[f"effective_rank/{view}"] = diagnostics.effective_rank(x)
        for suffix, pair in pairs.items():
            image, text = rows[f"joint.{pair.image}"], rows[f"joint.{pair.text}"]
            found = diagnostics.describe_pairs(image, text)
            values.update({f"{name}{suffix}": value for name, value in found.items()})
            near, others = found["near_duplicates"], found["negative_similarity"]
            if near > DUPLICATES and others < APART and pair.repels:
                cause = f"{100 * near:.0f} % of the rows have a neighbour alike in picture and caption"
                self._sound(step, "near duplicates", pair.label, cause)
            record[f"similarity{suffix}"] = diagnostics.similarity_histogram(image, text)
        for couple in self.learner.couples:
            a, b = (normalize(rows[f"{couple.part}.{view}"], dim=1) for view in (couple.first, couple.second))
            values[f"alignment/{couple.label}"] = float(alignment(a, b))
            if len(a) > 1:
                values[f"uniformity/{couple.label}"] = float(uniformity(a))


def distinct(pairs: Iterable[Pair]) -> dict[str, Pair]:
    """Returns pairs of views by the ending of their numbers: "" for the first, "/<label>" for the others.

    Of several objectives on the same views one stands for all: the first one that pushes duplicates apart.
    """
    found: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        known = found.setdefault((pair.image, pair.text), pair)
        if pair.repels and not known.repels:
            found[pair.image, pair.text] = pair
    return {f"/{pair.label}" if number else "": pair for number, pair in enumerate(found.values())}


def gradient_shares(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns {"gradient_share/<label>"} of every term, 0..1, means over ranks."""
    labels = [name for name in terms if name.startswith("gradient/")]
    norms = dist.agree([float(terms[name]) for name in labels], "sum") if labels else []
    shares = diagnostics.gradient_shares(norms)
    return {f"gradient_share/{label[9:]}": share for label, share in zip(labels, shares, strict=True)}


def text_hashes(tokens: Tensor, pad: int = 0) -> Tensor:
    """Returns int64 (B,): equal for rows with equal tokens, however much padding (the id `pad`) follows.

    tokens int64 (B, T). A polynomial modulo 2^64; ranks may have trimmed to different T.
    """
    powers = torch.full((tokens.shape[1],), _ODD, dtype=torch.int64, device=tokens.device).cumprod(0)
    return ((tokens - pad) * powers).sum(dim=1)
