"""Margin objectives on joint embeddings: image-text pairs, or one tower with labels."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from clipkit import dist
from clipkit.losses import pair_margin_loss, triplet_loss
from clipkit.losses.contrastive import same_label
from clipkit.losses.margin import Average, Distance, Miner, distances
from clipkit.objectives.base import Objective, check_choice, check_number, check_text
from clipkit.objectives.declare import check_tower
from clipkit.types import IMAGE, TEXT, ConfigError, Embeddings, Needs


class Margin(Objective):
    """What margin objectives share.

    tower   null: image against text; image or text: rows of that tower among themselves, which needs `label`
    label   rows of equal label belong together, besides the own pair: a field such as cls, or "caption"
    margin  in units of the distance
    """

    fewest_rows = 2

    def __init__(self, tower: str | None, label: str | None, margin: float) -> None:
        super().__init__()
        if label is None and tower is not None:
            raise ConfigError(
                f"the {check_tower(tower)} tower alone has no positives without labels",
                "set label: cls (or another field, or caption), or leave tower out to use pairs",
            )
        views = (IMAGE, TEXT) if tower is None else (IMAGE if check_tower(tower) == "image" else TEXT,)
        self.names = [view.name for view in views]
        self.label = None if label is None else check_text("label", label, "cls")
        self.margin = check_number("margin", margin, 0.0)
        self.needs = Needs(views=views, labels=() if self.label is None else (self.label,))

    def rows(self, e: Embeddings) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the anchors (B, D), what they are paired with or None, and labels (B,) or None."""
        anchors = e.joint[self.names[0]]
        others = e.joint[self.names[1]] if len(self.names) > 1 else None
        return anchors, others, None if self.label is None else e.labels[self.label]


class Triplet(Margin):
    """Triplets mined among all gathered rows; arXiv:1503.03832, on pairs VSE++ (arXiv:1707.05612).

    miner     all, semi_hard or hard; hard collapses from a random start: begin with another one
    distance  squared_euclidean, euclidean or cosine
    average   over all mined triplets, or over those with a nonzero loss
    """

    def __init__(
        self,
        tower: str | None = None,
        label: str | None = None,
        margin: float = 0.2,
        miner: str = "semi_hard",
        distance: str = "squared_euclidean",
        average: str = "all",
    ) -> None:
        super().__init__(tower, label, margin)
        self.miner: Miner = check_choice("miner", miner, get_args(Miner))
        self.distance: Distance = check_choice("distance", distance, get_args(Distance))
        self.average: Average = check_choice("average", average, get_args(Average))

    def forward(self, e: Embeddings) -> Tensor:
        """Returns the mean hinge over mined triplets."""
        anchors, others, labels = self.rows(e)
        return triplet_loss(
            anchors,
            others,
            labels,
            self.margin,
            dist.first_row(anchors),
            dist.gather,
            dist.all_reduce_mean,
            miner=self.miner,
            distance=self.distance,
            average=self.average,
        )


class PairMargin(Margin):
    """The contrastive loss of Siamese networks, Hadsell et al. 2006: together, or a margin apart.

    All gathered couples count; the means over similar and over dissimilar couples are added, because
    nearly all couples are dissimilar. The distance is Euclidean, so that the margin is at most 2.
    """

    def __init__(self, tower: str | None = None, label: str | None = None, margin: float = 1.0) -> None:
        super().__init__(tower, label, margin)

    def forward(self, e: Embeddings) -> Tensor:
        """Returns half the squared distance of similar couples plus half the squared hinge of the others."""
        anchors, others, labels = self.rows(e)
        if labels is None:
            labels = anchors.new_full((len(anchors),), -1).long()
        first = dist.first_row(anchors)
        matrix = distances(anchors, dist.gather(anchors if others is None else others), "euclidean")
        similar = same_label(labels, first, dist.gather)
        keep = similar.new_ones(similar.shape)
        if others is None:
            keep.diagonal(first).fill_(False)
        return pair_margin_loss(matrix, similar, self.margin, dist.all_reduce_mean, keep=keep, balanced=True)
