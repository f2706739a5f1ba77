"""An objective of one's own in one file: clip that does not push apart what has nearly the same caption.

    clipkit test-objective examples/own_objective.py:TolerantClip threshold=0.9
    clipkit pretrain CONFIG 'objectives=[{name: "examples/own_objective.py:TolerantClip"}]'

The first line checks gradients, the order of rows, saved state, and that 2 and 3 processes train exactly
what one would. What makes the last one hold: each rank returns the mean over ITS anchors, against the
candidates of ALL ranks, which `gather` brings with their gradient and among which its own begin at
`first_row` (ranks may hold unequal shares of a batch).
"""

from __future__ import annotations

import torch
from torch import Tensor

import clipkit
from clipkit.dist import first_row, gather
from clipkit.losses import contrastive_loss
from clipkit.objectives import Scale
from clipkit.types import IMAGE, TEXT, ConfigError, Needs


class TolerantClip(clipkit.Objective):
    """The loss of CLIP without the negatives whose captions are closer than `threshold` (a cosine)."""

    needs = Needs(views=(IMAGE, TEXT))
    scale = Scale()

    def __init__(self, threshold: float = 0.9) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ConfigError(f"threshold is {threshold}", "give a cosine between 0 and 1")
        self.threshold = threshold

    def forward(self, e: clipkit.Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered pairs, and the share of negatives that were spared."""
        image, text = e.joint["image"], e.joint["text"]
        images, texts = gather(image), gather(text)
        rows = torch.arange(len(image), device=image.device)
        own = rows + first_row(image)
        alike = (text @ texts.T).detach() > self.threshold
        alike[rows, own] = False
        to_text = contrastive_loss(e.logit_scale * image @ texts.T, own, keep=~alike)
        to_image = contrastive_loss(e.logit_scale * text @ images.T, own, keep=~alike)
        return {"loss": (to_text + to_image) / 2, "spared": alike.double().mean()}
