"""Objectives on image-text pairs: no state of their own beyond a temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit import dist
from clipkit.losses import clip_loss, cyclip_terms, hard_clip_loss, sigmoid_loss, unicl_loss
from clipkit.losses.contrastive import graded_targets, own_columns, smoothed_targets
from clipkit.losses.softmax import soft_clip_loss
from clipkit.objectives.base import (
    Objective,
    OwnScale,
    Scale,
    check_count,
    check_flag,
    check_number,
    check_text,
    read_options,
)
from clipkit.objectives.declare import one_view
from clipkit.types import ConfigError, Embeddings, Needs, View

CLIP_SCALE = Scale(math.log(1 / 0.07))
SIGLIP_SCALE = Scale(math.log(10.0), -10.0)


@torch.no_grad()
def pair_accuracy(image: Tensor, text: Tensor) -> Tensor:
    """Returns the fraction of this rank's images whose nearest gathered text is their own, ()."""
    nearest = (image @ dist.gather(text).T).argmax(dim=1)
    return (nearest == own_columns(image, dist.first_row(image))).float().mean()


class Paired(Objective):
    """What objectives on pairs share: one image view, one text view, and a temperature.

    views        {image: RECIPE, text: RECIPE or FIELD}: other views than the ones that all pairs share
    own_scale    a learned temperature of its own instead of the model's, for objectives that start it
                 differently
    temperature  a fixed one, at least 0.01; null: learned
    """

    start: Scale
    fewest_rows = 2

    def __init__(
        self, views: Mapping[str, str] | None, own_scale: bool, temperature: float | None = None
    ) -> None:
        super().__init__()
        chosen = read_options("views", views, {"image": "image", "text": "text"})
        recipes = {tower: check_text(f"views.{tower}", name, tower) for tower, name in chosen.items()}
        self.image, self.text = (one_view(tower, recipes[tower]) for tower in ("image", "text"))
        self.needs = Needs(views=(self.image, self.text))
        self.own = OwnScale(self.start) if check_flag("own_scale", own_scale) else None
        self.scale = None if own_scale else self.start
        self.fixed: float | None = None
        if temperature is not None:
            if own_scale:
                raise ConfigError("own_scale is learned and temperature is fixed", "leave one of them out")
            self.fixed = 1 / check_number("temperature", temperature, 0.01)
            # The model's own temperature starts there and is not trained: exports hold it.
            self.scale = replace(self.start, log_scale=math.log(self.fixed))

    def pair(self, e: Embeddings) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns image (B, D), text (B, D), scale (1,) and bias (1,) or None."""
        scale, bias = (e.logit_scale, e.logit_bias) if self.own is None else self.own()
        if self.fixed is not None:
            scale = torch.full_like(scale, self.fixed)
        return e.joint[self.image.name], e.joint[self.text.name], scale, bias

    def after_step(self) -> None:
        """Clamps a temperature of its own as the shared one is."""
        if self.own is not None:
            self.own.clamp()


class Clip(Paired):
    """The symmetric contrastive loss of CLIP, arXiv:2103.00020 figure 3.

    label_smoothing  share of the target spread over all candidates, 0..1
    hard_negatives   {beta, tau_plus, detach}: weights for the negatives of the batch, arXiv:2010.04592. beta
                     multiplies logits: at the scales of clip anything above 0.25 is nearly the maximum
    hard_captions    {field, num}: captions that are wrong for their image, `num` of the list in `field`, as
                     further candidates of all images (NegCLIP, arXiv:2210.01936); samples may lack them
    targets          {stored, temperature}: graded targets instead of one right answer, the softmax of cosines
                     over temperature of the vectors in the member `stored` of every sample, such as what a
                     sentence encoder says of its caption. A small temperature is clip; 0.1 lets near
                     duplicates share
    """

    start = CLIP_SCALE

    def __init__(
        self,
        views: Mapping[str, str] | None = None,
        own_scale: bool = False,
        temperature: float | None = None,
        label_smoothing: float = 0.0,
        hard_negatives: Mapping[str, Any] | None = None,
        hard_captions: Mapping[str, Any] | None = None,
        targets: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(views, own_scale, temperature)
        self.smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.weights = None if hard_negatives is None else hard_options(hard_negatives)
        self.hard: tuple[View, ...] = ()
        if hard_captions is not None:
            chosen = read_options("hard_captions", hard_captions, {"field": "json.hard", "num": 1})
            self.hard = hard_views(chosen["field"], chosen["num"])
            self.needs = self.needs | Needs(views=self.hard)
        self.graded: tuple[str, float] | None = None
        if targets is not None:
            chosen = read_options("targets", targets, {"stored": "teacher_text.npy", "temperature": 0.1})
            member = check_text("targets.stored", chosen["stored"], "teacher_text.npy")
            self.graded = member, check_number("targets.temperature", chosen["temperature"], 1e-3)
            self.needs = self.needs | Needs(stored=(member,))
        changed = (self.smoothing > 0, self.graded is not None, bool(self.weights or self.hard))
        if sum(changed) > 1:
            raise ConfigError(
                "label_smoothing, targets, and hard negatives or captions exclude each other: together they "
                "are not defined",
                "keep one of them",
            )

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered pairs, the in-batch accuracy, and what tells of hard negatives."""
        image, text, scale, _ = self.pair(e)
        first, accuracy = dist.first_row(image), pair_accuracy(e.joint[self.image.name], text)
        if self.smoothing:
            return {"loss": self._smoothed(image, text, scale, first), "accuracy": accuracy}
        if self.graded is not None:
            member, temperature = self.graded
            vectors = normalize(e.stored[member], dim=-1)
            targets = graded_targets(vectors @ dist.gather(vectors).T, temperature)
            loss = soft_clip_loss(image, text, scale, targets, targets, dist.gather)
            return {"loss": loss, "accuracy": accuracy, "own_target": own_target(targets, first)}
        if self.weights is None and not self.hard:
            return {"loss": clip_loss(image, text, scale, first, dist.gather), "accuracy": accuracy}
        hard, present = stacked(e, self.hard)
        found = hard_clip_loss(
            image, text, scale, first, dist.gather, hard=hard, present=present, **(self.weights or {})
        )
        terms = {"loss": found.loss, "accuracy": accuracy}
        if self.weights is not None:
            terms |= {"clamped": found.clamped, "effective_negatives": found.effective}
        if hard is not None and present is not None:
            terms["hard_accuracy"] = hard_accuracy(image, text, hard, present)
        return terms

    def chance(self, rows: int) -> float | None:
        """Returns log N, or None where hard negatives and captions change it."""
        return math.log(rows) if self.weights is None and not self.hard else None

    def _smoothed(self, image: Tensor, text: Tensor, scale: Tensor, first: int) -> Tensor:
        count = sum(dist.rows_of_ranks(image))
        own = torch.nn.functional.one_hot(own_columns(image, first), count).to(image.dtype)
        targets = smoothed_targets(own, self.smoothing, image.dtype)
        return soft_clip_loss(image, text, scale, targets, targets, dist.gather)


def own_target(targets: Tensor, first: int) -> Tensor:
    """Returns the mean share of graded targets (B, N) that the own pair gets, (): 1 is one right answer."""
    return targets.gather(1, own_columns(targets, first)[:, None]).mean()


def hard_views(field: Any, num: Any) -> tuple[View, ...]:
    """Returns `num` optional views of the hard captions listed in `field`; raises ConfigError."""
    where = check_text("hard_captions.field", field, "json.hard")
    return tuple(
        View(f"hard_{index}", "text", "", index, where, optional=True)
        for index in range(check_count("hard_captions.num", num, 1))
    )


def stacked(e: Embeddings, views: Sequence[View]) -> tuple[Tensor | None, Tensor | None]:
    """Returns hard captions (B, M, D) and which of them exist, bool (B, M); None without any views."""
    if not views:
        return None, None
    joint = torch.stack([e.joint[view.name] for view in views], dim=1)
    return joint, torch.stack([e.present[view.name] for view in views], dim=1)


@torch.no_grad()
def hard_accuracy(image: Tensor, text: Tensor, hard: Tensor, present: Tensor) -> Tensor:
    """Returns the share of this rank's images that prefer their caption to all of their own hard ones, ().

    Images without a hard caption do not count; 0 when no image has one.
    """
    own = (image * text).sum(dim=1)
    others = (image[:, None] * hard).sum(dim=2).masked_fill(~present, -math.inf)
    some = present.any(dim=1)
    return ((own > others.amax(dim=1)) & some).sum() / some.sum().clamp(min=1)


def hard_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checked options of hard-negative weighting; raises ConfigError."""
    chosen = read_options("hard_negatives", options, {"beta": 0.1, "tau_plus": 0.0, "detach": False})
    return {
        "beta": check_number("hard_negatives.beta", chosen["beta"], 0.0),
        "tau_plus": check_number("hard_negatives.tau_plus", chosen["tau_plus"], 0.0, 0.999),
        "detach": check_flag("hard_negatives.detach", chosen["detach"]),
    }


class SigLip(Paired):
    """The pairwise sigmoid loss of SigLIP, arXiv:2303.15343 eq. 1, started at scale 10 and bias -10."""

    start = SIGLIP_SCALE
    # Every couple is a question of its own: one pair has an answer, if a dull one.
    fewest_rows = 1

    def __init__(
        self,
        views: Mapping[str, str] | None = None,
        own_scale: bool = False,
        temperature: float | None = None,
    ) -> None:
        super().__init__(views, own_scale, temperature)

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered pairs and the in-batch accuracy."""
        image, text, scale, bias = self.pair(e)
        assert bias is not None, "the towers were built without the bias that siglip declares"
        loss = sigmoid_loss(image, text, scale, bias, dist.first_row(image), dist.gather)
        return {"loss": loss, "accuracy": pair_accuracy(image, text)}


class UniCl(Paired):
    """CLIP in which every couple of equal label is a pair, arXiv:2204.03610.

    label  "caption": equal captions (of the text view), the cure for duplicates in a batch; or a field,
           such as cls or json.category
    """

    start = CLIP_SCALE

    def __init__(
        self,
        views: Mapping[str, str] | None = None,
        own_scale: bool = False,
        temperature: float | None = None,
        label: str = "caption",
    ) -> None:
        super().__init__(views, own_scale, temperature)
        self.label = check_text("label", label, "caption")
        if self.label == "caption" and self.text.field is not None:
            # Equal as this objective reads them, not as the usual text view does.
            self.label = f"caption:{self.text.field}"
        self.needs = self.needs | Needs(labels=(self.label,))

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered pairs and the in-batch accuracy."""
        image, text, scale, _ = self.pair(e)
        loss = unicl_loss(image, text, e.labels[self.label], scale, dist.first_row(image), dist.gather)
        return {"loss": loss, "accuracy": pair_accuracy(image, text)}

    def chance(self, rows: int) -> float | None:
        """Returns log N."""
        return math.log(rows)


class CyClip(Paired):
    """CLIP with cyclic consistency, arXiv:2205.14459; the two terms grow with the batch, as in its code.

    in_modal, cross_modal  weights of the consistency terms; the paper's are 0.25 each
    """

    start = CLIP_SCALE

    def __init__(
        self,
        views: Mapping[str, str] | None = None,
        own_scale: bool = False,
        temperature: float | None = None,
        in_modal: float = 0.25,
        cross_modal: float = 0.25,
    ) -> None:
        super().__init__(views, own_scale, temperature)
        self.in_modal = check_number("in_modal", in_modal, 0.0)
        self.cross_modal = check_number("cross_modal", cross_modal, 0.0)

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss with its three parts, and the in-batch accuracy."""
        image, text, scale, _ = self.pair(e)
        contrast = clip_loss(image, text, scale, dist.first_row(image), dist.gather)
        terms = cyclip_terms(image, text, dist.gather)
        loss = contrast + self.in_modal * terms.in_modal + self.cross_modal * terms.cross_modal
        return {
            "loss": loss,
            "contrast": contrast,
            "in_modal": terms.in_modal,
            "cross_modal": terms.cross_modal,
            "accuracy": pair_accuracy(image, text),
        }
