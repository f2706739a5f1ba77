"""The sigmoid loss: every pair of an image and a text is its own binary problem."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, arange

from clipkit.losses.softmax import Gather, alone


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, rank: int = 0, gather: Gather = alone
) -> Tensor:
    """Returns -1/B sum_ij log sigmoid(y_ij (scale <image_i, text_j> + bias)) over gathered texts, ().

    image, text (B, D) L2-normalised, y = +1 for a pair and -1 otherwise. SigLIP, arXiv:2303.15343 eq. 1:
    the sum over pairs is divided by the number of images, not of pairs.
    """
    texts = gather(text)
    logits = scale * image @ texts.T + bias
    signs = -logits.new_ones(logits.shape)
    rows = arange(image.shape[0], device=image.device)
    signs[rows, rows + rank * image.shape[0]] = 1.0
    return -F.logsigmoid(signs * logits).sum() / image.shape[0]
