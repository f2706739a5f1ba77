"""Every loss as a function of rows that can be split over ranks: what the generic tests run through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.losses import (
    alignment,
    barlow_twins_loss,
    byol_loss,
    clip_loss,
    contrastive_loss,
    cyclip_terms,
    dcl_loss,
    distillation_loss,
    hard_clip_loss,
    hcl_loss,
    info_nce,
    moco_loss,
    nt_xent_loss,
    pair_margin_loss,
    sigmoid_loss,
    supcon_loss,
    swav_loss,
    triplet_loss,
    unicl_loss,
    uniformity,
)
from clipkit.losses.affinity import TeacherPair
from clipkit.losses.contrastive import (
    Form,
    graded_targets,
    own_columns,
    same_label,
    scaled_similarity,
    similarity,
)
from clipkit.losses.hard_negatives import hard_info_nce
from clipkit.losses.margin import Average, Distance, Miner, distances, row_distances
from clipkit.losses.prototypes import proto_nce_loss
from clipkit.losses.regression import feature_distillation_loss, simsiam_loss
from clipkit.losses.sigmoid import nce_loss, sgns_loss
from clipkit.losses.softmax import soft_clip_loss
from tests.losses.inputs import Collective, Loss, pairs, unit_rows

N, D = 12, 5
A, B = pairs(N, D)
# Anchors with and without a partner, unevenly over two and three ranks; -1 is unlabelled.
LABELS = torch.tensor([3, 3, 3, 0, -1, 7, 8, 0, 3, 9, -1, 3])
HARD = unit_rows(N * 2, D, 5).view(N, 2, D)
PRESENT = torch.tensor([[True, i % 3 > 0] for i in range(N)])
SCALES = torch.linspace(0.6, 1.4, N, dtype=torch.float64)[:, None]
MINERS: tuple[Miner, ...] = ("all", "semi_hard", "hard")
AVERAGES: tuple[Average, ...] = ("all", "nonzero")
QUEUE, PROTOTYPES = unit_rows(9, D, 6), unit_rows(8, D, 7)


@dataclass(frozen=True)
class Case:
    """A loss with its rows. `smooth` names those whose finite differences are its gradient (no stop)."""

    name: str
    rows: dict[str, Tensor]
    loss: Loss
    smooth: tuple[str, ...] = ("a", "b")
    # What leaves the value alone: a rotation common to all rows, exchanging a and b, longer rows.
    rotates: bool = True
    swaps: bool = True
    positive_scaling: bool = False

    def whole(self, rows: Mapping[str, Tensor] | None = None) -> Tensor:
        """The value on one process."""
        return self.loss(self.rows if rows is None else rows, 0, lambda x: x, lambda x: x)


Rows = Mapping[str, Tensor]
VIEWS = {"a": A, "b": B}
LABELLED = {**VIEWS, "labels": LABELS}


def _soft_clip(r: Rows, first: int, gather: Collective, reduce: Collective) -> Tensor:
    targets = graded_targets(similarity(r["c"], gather(r["c"])), 0.2)
    # Rows of zeros, unevenly over ranks, are left out.
    targets = targets * (r["labels"] != 3)[:, None]
    return soft_clip_loss(r["a"], r["b"], 4.0, targets, targets, gather, reduce)


def _kernel(form: Form) -> Loss:
    def loss(r: Rows, first: int, gather: Collective, reduce: Collective) -> Tensor:
        logits = scaled_similarity(r["a"], gather(r["b"]), 4.0)
        positives = same_label(r["labels"], first, gather)
        keep = (r["labels"][:, None] + gather(r["labels"])) % 5 > 0
        weights = gather(r["labels"]).to(logits.dtype) / 9 * ~positives
        return contrastive_loss(logits, positives, keep=keep, log_weights=weights, form=form, reduce=reduce)

    return loss


def _sampled(r: Rows) -> tuple[Tensor, Tensor]:
    """Scores of pairs, and of each anchor with two noise vectors of its own."""
    return 3 * (r["a"] * r["b"]).sum(1), 3 * torch.einsum("bd,bmd->bm", r["a"], r["hard"])


def _nce(r: Rows, first: int, gather: Collective, reduce: Collective) -> Tensor:
    return nce_loss(*_sampled(r), r["noise"][:, 0], r["noise"][:, 1:])


def _triplets(miner: Miner, average: Average) -> Loss:
    def loss(r: Rows, first: int, gather: Collective, reduce: Collective) -> Tensor:
        return triplet_loss(
            r["a"], r["b"], r["labels"], 0.3, first, gather, reduce, miner=miner, average=average
        )

    return loss


def _one_view(distance: Distance) -> Loss:
    def loss(r: Rows, first: int, gather: Collective, reduce: Collective) -> Tensor:
        return triplet_loss(r["a"], None, r["labels"], 0.3, first, gather, reduce, distance=distance)

    return loss


def _teachers(r: Rows) -> list[TeacherPair]:
    return [TeacherPair(r["c"], r["d"], 7.0), TeacherPair(r["wide_c"], r["wide_d"], 3.0)]


TAUGHT = {
    **VIEWS,
    "c": unit_rows(N, D, 3),
    "d": unit_rows(N, D, 4),
    "wide_c": unit_rows(N, D + 3, 3),
    "wide_d": unit_rows(N, D + 3, 4),
}
CASES = [
    Case(
        "info_nce",
        VIEWS,
        lambda r, first, g, m: info_nce(r["a"], g(r["b"]), 4.0, own_columns(r["a"], first)),
        swaps=False,
    ),
    Case("clip", VIEWS, lambda r, first, g, m: clip_loss(r["a"], r["b"], 4.0, first, g)),
    Case(
        "clip_euclidean",
        {"a": A * SCALES, "b": B / SCALES},
        lambda r, first, g, m: clip_loss(r["a"], r["b"], 4.0, first, g, "negative_euclidean"),
    ),
    Case(
        "clip_squared",
        {"a": A * SCALES, "b": B / SCALES},
        lambda r, first, g, m: clip_loss(r["a"], r["b"], 4.0, first, g, "negative_squared_euclidean"),
    ),
    Case(
        "clip_cosine",
        {"a": A * SCALES, "b": B / SCALES},
        lambda r, first, g, m: clip_loss(r["a"], r["b"], 4.0, first, g, "cosine"),
        positive_scaling=True,
    ),
    Case("soft_clip", {**LABELLED, "c": unit_rows(N, D, 3)}, _soft_clip),
    Case("unicl", LABELLED, lambda r, first, g, m: unicl_loss(r["a"], r["b"], r["labels"], 4.0, first, g)),
    Case("kernel_out", LABELLED, _kernel("out"), swaps=False),
    Case("kernel_in", LABELLED, _kernel("in"), swaps=False),
    Case("kernel_decoupled", LABELLED, _kernel("decoupled"), swaps=False),
    Case("nt_xent", VIEWS, lambda r, first, g, m: nt_xent_loss(r["a"], r["b"], 4.0, first, g)),
    Case("dcl", VIEWS, lambda r, first, g, m: dcl_loss(r["a"], r["b"], 4.0, first, g)),
    Case("dclw", VIEWS, lambda r, first, g, m: dcl_loss(r["a"], r["b"], 4.0, first, g, sigma=0.5), smooth=()),
    Case("infoloob", VIEWS, lambda r, first, g, m: dcl_loss(r["a"], r["b"], 4.0, first, g, within=False)),
    Case(
        "supcon", LABELLED, lambda r, first, g, m: supcon_loss(r["a"], r["b"], r["labels"], 4.0, first, g, m)
    ),
    Case(
        "supcon_in",
        LABELLED,
        lambda r, first, g, m: supcon_loss(r["a"], r["b"], r["labels"], 4.0, first, g, m, form="in"),
    ),
    Case(
        "supcon_one_view",
        LABELLED,
        lambda r, first, g, m: supcon_loss(r["a"], None, r["labels"], 4.0, first, g, m),
        smooth=("a",),
        swaps=False,
    ),
    Case(
        "moco",
        VIEWS,
        lambda r, first, g, m: moco_loss(r["a"], r["b"], QUEUE.to(r["a"]), 4.0, 7),
        ("a",),
        rotates=False,
        swaps=False,
    ),
    Case(
        "hcl",
        VIEWS,
        lambda r, first, g, m: hcl_loss(r["a"], r["b"], 2.0, first, g, beta=0.7, tau_plus=0.1).loss,
    ),
    Case(
        "hcl_detached",
        VIEWS,
        lambda r, first, g, m: hcl_loss(r["a"], r["b"], 2.0, first, g, detach=True).loss,
        smooth=(),
    ),
    Case(
        "hard_captions",
        {**VIEWS, "hard": HARD, "present": PRESENT},
        lambda r, first, g, m: (
            hard_clip_loss(r["a"], r["b"], 4.0, first, g, hard=r["hard"], present=r["present"]).loss
        ),
        smooth=("a", "b", "hard"),
        swaps=False,
    ),
    Case(
        "hard_captions_weighed",
        {**VIEWS, "hard": HARD, "present": PRESENT},
        lambda r, first, g, m: (
            hard_clip_loss(
                r["a"], r["b"], 2.0, first, g, hard=r["hard"], present=r["present"], beta=0.5, tau_plus=0.05
            ).loss
        ),
        smooth=("a", "b", "hard"),
        swaps=False,
    ),
    Case(
        "hard_info_nce",
        {**VIEWS, "hard": HARD, "present": PRESENT},
        lambda r, first, g, m: hard_info_nce(
            r["a"], r["b"], r["hard"], 4.0, first, g, present=r["present"], own_bonus=0.5
        ),
        smooth=("a", "b", "hard"),
        swaps=False,
    ),
    Case(
        "sigmoid",
        VIEWS,
        lambda r, first, g, m: sigmoid_loss(r["a"], r["b"], 4.0, -2.0, first, g),
    ),
    Case(
        "sgns",
        {**VIEWS, "hard": HARD},
        lambda r, first, g, m: sgns_loss(*_sampled(r)),
        smooth=("a", "b", "hard"),
        swaps=False,
    ),
    Case(
        "nce",
        {**VIEWS, "hard": HARD, "noise": -2 - unit_rows(N, 3, 8)},
        _nce,
        smooth=("a", "b", "hard"),
        rotates=False,
        swaps=False,
    ),
    Case(
        "pair_margin",
        LABELLED,
        lambda r, first, g, m: pair_margin_loss(
            row_distances(r["a"], r["b"]), r["labels"] == 3, 1.5, m, keep=r["labels"] != 8
        ),
    ),
    Case(
        "pair_margin_matrix",
        LABELLED,
        lambda r, first, g, m: pair_margin_loss(
            distances(r["a"], g(r["b"]), "euclidean"),
            same_label(r["labels"], first, g),
            1.5,
            m,
            balanced=True,
        ),
    ),
    *(
        Case(f"triplet_{miner}_{average}", LABELLED, _triplets(miner, average))
        for miner in MINERS
        for average in AVERAGES
    ),
    Case("triplet_euclidean_one_view", LABELLED, _one_view("euclidean"), smooth=("a",), swaps=False),
    Case(
        "triplet_cosine_one_view",
        LABELLED,
        _one_view("cosine"),
        smooth=("a",),
        swaps=False,
        positive_scaling=True,
    ),
    Case(
        "barlow_twins",
        {"a": 3 * A + 1, "b": B},
        lambda r, first, g, m: barlow_twins_loss(r["a"], r["b"], m, off_diagonal=0.2),
        rotates=False,
    ),
    Case(
        "swav",
        {**VIEWS, "c": unit_rows(N, D, 3), "queued": unit_rows(N, D, 4)},
        lambda r, first, g, m: swav_loss(
            [r[name] @ PROTOTYPES.to(r["a"]).T for name in "abc"],
            m,
            extra=[r["queued"] @ PROTOTYPES.to(r["a"]).T] * 2,
        ),
        smooth=("c",),
        rotates=False,
    ),
    Case(
        "proto_nce",
        {"a": A, "labels": LABELS.clamp_min(0) % 8},
        lambda r, first, g, m: proto_nce_loss(
            r["a"],
            [PROTOTYPES.to(r["a"]), PROTOTYPES.to(r["a"]).flip(0)],
            [r["labels"], r["labels"]],
            [torch.linspace(0.2, 0.5, 8).to(r["a"])] * 2,
        ),
        smooth=("a",),
        rotates=False,
        swaps=False,
    ),
    Case(
        "byol",
        {"a": A * SCALES, "b": B, "c": unit_rows(N, D, 3), "d": unit_rows(N, D, 4) * SCALES},
        lambda r, first, g, m: byol_loss(r["a"], r["b"], r["c"], r["d"]),
        swaps=False,
        positive_scaling=True,
    ),
    Case(
        "simsiam",
        {"a": A * SCALES, "b": B, "c": unit_rows(N, D, 3), "d": unit_rows(N, D, 4) * SCALES},
        lambda r, first, g, m: simsiam_loss(r["a"], r["b"], r["c"], r["d"]),
        swaps=False,
        positive_scaling=True,
    ),
    Case(
        "feature_distillation",
        VIEWS,
        lambda r, first, g, m: feature_distillation_loss(r["a"], r["b"]),
        smooth=("a",),
    ),
    Case(
        "distillation",
        TAUGHT,
        lambda r, first, g, m: distillation_loss(r["a"], r["b"], 4.0, _teachers(r), g),
        swaps=False,
    ),
    Case("cyclip_in", VIEWS, lambda r, first, g, m: cyclip_terms(r["a"], r["b"], g).in_modal),
    Case("cyclip_cross", VIEWS, lambda r, first, g, m: cyclip_terms(r["a"], r["b"], g).cross_modal),
    Case("alignment", VIEWS, lambda r, first, g, m: alignment(r["a"], r["b"], 1.5)),
    Case("uniformity", {"a": A}, lambda r, first, g, m: uniformity(r["a"], first, g, m), ("a",), swaps=False),
]
