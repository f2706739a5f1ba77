"""Objectives on two views of one tower: a projector at most, nothing that outlives a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit import dist
from clipkit.losses import barlow_twins_loss, dcl_loss, hcl_loss, info_nce, nt_xent_loss, supcon_loss
from clipkit.losses.contrastive import Form, Similarity, own_columns
from clipkit.losses.geometry import spread
from clipkit.losses.hard_negatives import HardNegatives, hard_info_nce, weighted_loss
from clipkit.models.heads import mlp_head
from clipkit.objectives.base import (
    Objective,
    Widths,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_text,
    read_options,
)
from clipkit.objectives.declare import check_tower, views_of
from clipkit.objectives.paired import hard_options, hard_views, stacked
from clipkit.types import ConfigError, Embeddings, Needs, View

Recipes = str | Sequence[str] | None


class TwoView(Objective):
    """What objectives on two views share: the views, and a projector on the trunk of their tower.

    tower    image or text
    views    a recipe for both views or a list of two: augmentations of an image (simclr, moco_v2, byol, ...);
             for a text dropout (the tower draws), eda (edited words) or a caption field
    hidden   width of the projector's hidden layer; dim: its output; dim 0: no projector, the joint embedding
    """

    layers = 2
    fewest_rows = 2

    def __init__(self, tower: str, views: Recipes, default: str, hidden: int, dim: int) -> None:
        super().__init__()
        self.tower = check_tower(tower)
        self.first, self.second = views_of(tower, views, default if tower == "image" else "dropout")
        self.needs = Needs(views=(self.first, self.second))
        self.hidden, self.dim = check_count("hidden", hidden, 0), check_count("dim", dim, 0)
        self.projector: torch.nn.Sequential | None = None

    def build(self, widths: Widths) -> None:
        """Creates the projector; raises ConfigError for dropout views of a tower that drops nothing."""
        check_dropout((self.first, self.second), self.tower, widths)
        if self.dim:
            self.projector = mlp_head(widths.trunk[self.tower], self.hidden, self.dim, self.layers)

    def projected(self, e: Embeddings) -> tuple[Tensor, Tensor]:
        """Returns both views, (B, dim) each and not normalised, or the joint embeddings (B, D)."""
        views = (self.first.name, self.second.name)
        if self.projector is None:
            return e.joint[views[0]], e.joint[views[1]]
        # Together: one set of BatchNorm statistics over both views, as SimCLR has it.
        both = self.projector(torch.cat([e.trunk[name] for name in views]))
        a, b = both.chunk(2)
        return a, b


@torch.no_grad()
def watched(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Returns {"accuracy", "spread"} of two views (B, D), each ().

    accuracy  share of this rank's rows of `a` whose nearest gathered row of `b` (cosine) is their own
    spread    about 1 on a sphere, 0 when all rows are equal
    """
    nearest = (normalize(a, dim=-1) @ normalize(dist.gather(b), dim=-1).T).argmax(dim=1)
    accuracy = (nearest == own_columns(a, dist.first_row(a))).to(a.dtype).mean()
    return {"accuracy": accuracy, "spread": spread(a)}


def weighted_terms(found: HardNegatives) -> dict[str, Tensor]:
    """Returns the loss and the two numbers that tell whether its weights are sound, each ()."""
    return {"loss": found.loss, "clamped": found.clamped, "effective_negatives": found.effective}


def check_dropout(views: Sequence[View], tower: str, widths: Widths) -> None:
    """Raises ConfigError when dropout is to make views differ and the tower has none that is active."""
    if any(view.recipe == "dropout" for view in views) and tower not in widths.stochastic:
        raise ConfigError(
            f"dropout views of the {tower} tower, which drops nothing while it trains",
            "use a transformers text tower whose config has hidden_dropout_prob > 0, or views: eda",
        )


class SimClr(TwoView):
    """NT-Xent of two views, arXiv:2002.05709 eq. 1; with clip beside it, this is SLIP (arXiv:2112.12750).

    temperature     0.1 as on ImageNet; small sets and batches want more (0.2 .. 0.5)
    similarity      cosine, dot, negative_euclidean or negative_squared_euclidean, of the projections
    hard_negatives  {beta, tau_plus, detach}: weights for the negatives, arXiv:2010.04592
    """

    def __init__(
        self,
        tower: str = "image",
        views: Recipes = None,
        temperature: float = 0.1,
        hidden: int = 2048,
        dim: int = 128,
        similarity: str = "cosine",
        hard_negatives: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tower, views, "simclr", hidden, dim)
        self.scale_of_logits = 1 / check_number("temperature", temperature, 1e-3)
        self.kind: Similarity = check_choice("similarity", similarity, get_args(Similarity))
        self.weights = None if hard_negatives is None else hard_options(hard_negatives)
        if self.weights is not None and self.kind != "cosine":
            raise ConfigError("hard_negatives need similarity: cosine", "leave one of the two out")

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered views and the share of anchors whose other view is nearest."""
        a, b = self.projected(e)
        kind = self.kind
        if kind == "cosine":
            a, b, kind = normalize(a, dim=-1), normalize(b, dim=-1), "dot"
        first, scale = dist.first_row(a), self.scale_of_logits
        terms = watched(a, b)
        if self.weights is None:
            return {"loss": nt_xent_loss(a, b, scale, first, dist.gather, kind), **terms}
        found = hcl_loss(a, b, scale, first, dist.gather, **self.weights)
        return {**weighted_terms(found), **terms}

    def chance(self, rows: int) -> float | None:
        """Returns log(2N - 1), or None with weighted negatives."""
        return math.log(2 * rows - 1) if self.weights is None else None


class Dcl(TwoView):
    """Decoupled contrastive loss, arXiv:2110.06848: NT-Xent without the positive in the denominator.

    sigma           of the weighted form DCLW (paper: 0.5); null: unweighted
    hard_negatives  {beta, tau_plus, detach}, as in simclr
    """

    def __init__(
        self,
        tower: str = "image",
        views: Recipes = None,
        temperature: float = 0.1,
        hidden: int = 2048,
        dim: int = 128,
        sigma: float | None = None,
        hard_negatives: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tower, views, "simclr", hidden, dim)
        self.scale_of_logits = 1 / check_number("temperature", temperature, 1e-3)
        self.sigma = None if sigma is None else check_number("sigma", sigma, 1e-3)
        self.weights = None if hard_negatives is None else hard_options(hard_negatives)
        if self.weights is not None and self.sigma is not None:
            raise ConfigError(
                "sigma weighs positives, hard_negatives negatives; both is not defined", "keep one of them"
            )
        # The weights of DCLW are constants of its value.
        self.stops_gradient = self.sigma is not None

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered views, which may be negative, and the accuracy."""
        a, b = (normalize(x, dim=-1) for x in self.projected(e))
        first, scale = dist.first_row(a), self.scale_of_logits
        if self.weights is None:
            loss = dcl_loss(a, b, scale, first, dist.gather, sigma=self.sigma)
            return {"loss": loss, **watched(a, b)}
        found = hcl_loss(a, b, scale, first, dist.gather, form="decoupled", **self.weights)
        return {**weighted_terms(found), **watched(a, b)}

    def chance(self, rows: int) -> float | None:
        """Returns log(2N - 2), or None with weighted negatives."""
        return math.log(2 * rows - 2) if self.weights is None else None


class InfoNce(TwoView):
    """One-way InfoNCE from the first view to the second; on dropout views of a text tower it is SimCSE.

    arXiv:1807.03748 eq. 4, arXiv:2104.08821 eq. 1. Works on the joint embedding unless `dim` asks for a head.
    symmetric       the mean of both directions
    hard_negatives  {beta, tau_plus, detach}, as in simclr
    hard_captions   {field, num, bonus}: hard negatives of the text tower as further candidates (supervised
                    SimCSE, eq. 5; bonus is added to the logits of the anchor's own ones)
    """

    def __init__(
        self,
        tower: str = "text",
        views: Recipes = None,
        temperature: float = 0.05,
        hidden: int = 0,
        dim: int = 0,
        symmetric: bool = False,
        similarity: str = "cosine",
        hard_negatives: Mapping[str, Any] | None = None,
        hard_captions: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tower, views, "simclr", hidden, dim)
        self.scale_of_logits = 1 / check_number("temperature", temperature, 1e-3)
        self.kind: Similarity = check_choice("similarity", similarity, get_args(Similarity))
        self.symmetric = check_flag("symmetric", symmetric)
        self.weights = None if hard_negatives is None else hard_options(hard_negatives)
        if self.weights is not None and (self.kind != "cosine" or hard_captions is not None):
            raise ConfigError(
                "hard_negatives need similarity: cosine and no hard_captions", "take the other option out"
            )
        self.hard: tuple[View, ...] = ()
        self.bonus = 0.0
        if hard_captions is not None:
            chosen = read_options(
                "hard_captions", hard_captions, {"field": "json.hard", "num": 1, "bonus": 0.0}
            )
            if tower != "text" or dim or self.kind != "cosine" or symmetric:
                raise ConfigError(
                    "hard_captions need tower: text, dim: 0, similarity: cosine and one direction",
                    "take the other options out",
                )
            self.bonus = check_number("hard_captions.bonus", chosen["bonus"])
            self.hard = hard_views(chosen["field"], chosen["num"])
            self.needs = self.needs | Needs(views=self.hard)

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss against gathered candidates, and the accuracy."""
        a, b = self.projected(e)
        kind = self.kind
        if kind == "cosine":
            a, b, kind = normalize(a, dim=-1), normalize(b, dim=-1), "dot"
        first, scale = dist.first_row(a), self.scale_of_logits
        if self.weights is not None:
            return self._weighted(a, b)
        hard, present = stacked(e, self.hard)
        if hard is not None:
            loss = hard_info_nce(a, b, hard, scale, first, dist.gather, present=present, own_bonus=self.bonus)
        else:
            loss = info_nce(a, dist.gather(b), scale, own_columns(a, first), kind)
        if self.symmetric:
            loss = (loss + info_nce(b, dist.gather(a), scale, own_columns(a, first), kind)) / 2
        return {"loss": loss, **watched(a, b)}

    def _weighted(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        positives, scale, weights = (
            own_columns(a, dist.first_row(a)),
            self.scale_of_logits,
            self.weights,
        )
        found = [weighted_loss(scale * a @ dist.gather(b).T, positives, scale, **(weights or {}))]
        if self.symmetric:
            found.append(weighted_loss(scale * b @ dist.gather(a).T, positives, scale, **(weights or {})))
        means = HardNegatives(*(torch.stack(values).mean() for values in zip(*found, strict=True)))
        return {**weighted_terms(means), **watched(a, b)}

    def chance(self, rows: int) -> float | None:
        """Returns log N, or None with hard captions or weighted negatives."""
        return None if self.hard or self.weights is not None else math.log(rows)


class SupCon(TwoView):
    """Supervised contrastive loss, arXiv:2004.11362: all rows of equal label are positives.

    label  a field such as cls or json.category, or "caption"
    form   out (eq. 2, the better one in the paper) or in (eq. 3)
    """

    def __init__(
        self,
        label: str,
        tower: str = "image",
        views: Recipes = None,
        temperature: float = 0.1,
        hidden: int = 2048,
        dim: int = 128,
        form: str = "out",
    ) -> None:
        super().__init__(tower, views, "simclr", hidden, dim)
        self.scale_of_logits = 1 / check_number("temperature", temperature, 1e-3)
        self.form: Form = check_choice("form", form, ("out", "in"))
        self.label = check_text("label", label, "cls")
        self.needs = self.needs | Needs(labels=(self.label,))

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered views, and the accuracy of finding the own other view."""
        a, b = (normalize(x, dim=-1) for x in self.projected(e))
        first, labels = dist.first_row(a), e.labels[self.label]
        loss = supcon_loss(
            a, b, labels, self.scale_of_logits, first, dist.gather, dist.all_reduce_mean, form=self.form
        )
        return {"loss": loss, **watched(a, b)}


class BarlowTwins(TwoView):
    """Redundancy reduction, arXiv:2103.03230 eq. 1: the views' cross-correlation is drawn to the identity.

    off_diagonal  weight of the off-diagonal entries; the paper's 0.0051 belongs to dim 8192, about 1 / dim
                  is a rule for others
    The value is a sum over `dim` entries: beside other objectives give it a weight of about 1 / dim.
    """

    layers = 3

    def __init__(
        self,
        tower: str = "image",
        views: Recipes = None,
        hidden: int = 8192,
        dim: int = 8192,
        off_diagonal: float = 0.0051,
    ) -> None:
        super().__init__(tower, views, "barlow", hidden, dim)
        self.off_diagonal = check_number("off_diagonal", off_diagonal, 0.0)

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss of the global batch, the same on every rank, and the accuracy."""
        a, b = self.projected(e)
        loss = barlow_twins_loss(a, b, dist.all_reduce_mean, off_diagonal=self.off_diagonal)
        return {"loss": loss, **watched(a, b)}
