"""The softmax family: cross-entropy of each anchor over all gathered candidates.

Shapes: B anchors on this rank, N = B * W candidates, D width. Values are in nats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, arange

Gather = Callable[[Tensor], Tensor]


def alone(x: Tensor) -> Tensor:
    """Returns `x`: the gather of a single process."""
    return x


def info_nce(anchors: Tensor, candidates: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
    """Returns the mean over anchors of -log softmax(scale * <anchor, candidate>) at the positive, ().

    anchors (B, D) and candidates (N, D) are L2-normalised, scale is 1 / temperature, positives (B,)
    indexes the candidate of each anchor. CPC, arXiv:1807.03748 eq. 4 with cosine similarity.
    """
    return F.cross_entropy(scale * anchors @ candidates.T, positives)


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, rank: int = 0, gather: Gather = alone) -> Tensor:
    """Returns the symmetric contrastive loss of this rank's pairs against all gathered pairs, ().

    image, text (B, D) L2-normalised; scale (1,) or () is exp(log-scale). CLIP, arXiv:2103.00020 figure 3:
    the mean of image-to-text and text-to-image InfoNCE. Each rank returns the mean over ITS anchors, so
    that the mean over ranks is the loss of the global batch.
    """
    images, texts = gather(image), gather(text)
    positives = arange(image.shape[0], device=image.device) + rank * image.shape[0]
    image_to_text = info_nce(image, texts, scale, positives)
    text_to_image = info_nce(text, images, scale, positives)
    return (image_to_text + text_to_image) / 2
