"""Objectives on image-text pairs: no state of their own beyond the shared temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipkit import dist
from clipkit.losses import clip_loss, sigmoid_loss
from clipkit.objectives.base import Objective, Scale
from clipkit.types import Embeddings, Needs

PAIR = Needs(image_views=("image",), text_views=("text",))


@torch.no_grad()
def pair_accuracy(image: Tensor, text: Tensor) -> Tensor:
    """Returns the fraction of this rank's images whose nearest gathered text is their own, ()."""
    rank = dist.World.current().rank
    nearest = (image @ dist.gather(text).T).argmax(dim=1)
    own = torch.arange(image.shape[0], device=image.device) + rank * image.shape[0]
    return (nearest == own).float().mean()


class Clip(Objective):
    """The symmetric contrastive loss of CLIP, arXiv:2103.00020 figure 3."""

    needs = PAIR
    scale = Scale(math.log(1 / 0.07))

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered pairs and the in-batch accuracy."""
        image, text = e.joint["image"], e.joint["text"]
        loss = clip_loss(image, text, e.logit_scale, dist.World.current().rank, dist.gather)
        return {"loss": loss, "accuracy": pair_accuracy(image, text)}


class SigLip(Objective):
    """The pairwise sigmoid loss of SigLIP, arXiv:2303.15343 eq. 1, started at scale 10 and bias -10."""

    needs = PAIR
    scale = Scale(math.log(10.0), -10.0)

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered pairs and the in-batch accuracy."""
        image, text = e.joint["image"], e.joint["text"]
        assert e.logit_bias is not None, "the towers were built without the bias that siglip declares"
        rank = dist.World.current().rank
        loss = sigmoid_loss(image, text, e.logit_scale, e.logit_bias, rank, dist.gather)
        return {"loss": loss, "accuracy": pair_accuracy(image, text)}
