"""Binary losses: every pair, or every sample of data and noise, is its own problem. Values are in nats."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, arange

from clipkit.losses.contrastive import Gather, Scale, alone


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Scale, bias: Scale, first: int = 0, gather: Gather = alone
) -> Tensor:
    """Returns -1/B sum_ij log sigmoid(y_ij (scale <image_i, text_j> + bias)) over gathered texts, ().

    image, text (B, D) L2-normalised, y = +1 for a pair and -1 otherwise. SigLIP, arXiv:2303.15343 eq. 1:
    the sum over pairs is divided by the number of images, not of pairs.
    """
    texts = gather(text)
    logits = scale * image @ texts.T + bias
    signs = -logits.new_ones(logits.shape)
    rows = arange(image.shape[0], device=image.device)
    signs[rows, rows + first] = 1.0
    return -F.logsigmoid(signs * logits).sum() / image.shape[0]


def sgns_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Returns the mean over rows of -log sigmoid(positive) - sum_v log sigmoid(-negative_v), ().

    positive (B,): scores of observed pairs; negative (B, V): scores of V noise samples each, which for
    words are drawn in proportion to count^0.75. word2vec, arXiv:1310.4546 eq. 4. Every rank draws its own
    noise: the mean is local.
    """
    return -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(1)).mean()


def nce_loss(
    positive: Tensor, negative: Tensor, log_noise_positive: Tensor, log_noise_negative: Tensor
) -> Tensor:
    """Returns the noise-contrastive loss of unnormalised log-probabilities, mean over the data, ().

    positive (B,): scores of data; negative (B, V): scores of V noise samples per datum; log_noise_*: the
    log-probability of each under the noise, same shapes. Gutmann and Hyvarinen, AISTATS 2010, JMLR 2012:
    logistic regression on score - log(V p_noise), so that the scores become normalised by themselves.
    With V p_noise = 1 this is `sgns_loss`.
    """
    log_ratio = math.log(negative.shape[1])
    return sgns_loss(positive - log_noise_positive - log_ratio, negative - log_noise_negative - log_ratio)
