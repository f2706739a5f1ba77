"""Alignment and uniformity: the two properties that contrastive losses trade. arXiv:2005.10242."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.contrastive import (
    Gather,
    Reduce,
    alone,
    log_mean_over_ranks,
    own_columns,
    similarity,
)
from clipkit.losses.margin import row_distances


def alignment(a: Tensor, b: Tensor, alpha: float = 2.0) -> Tensor:
    """Returns the mean over pairs of |a_i - b_i|^alpha, (); 0 is best, 2 is unrelated for alpha = 2.

    a, b (B, D) L2-normalised. arXiv:2005.10242 sec. 4.1. The mean is local.
    """
    if alpha == 2:
        return row_distances(a, b, "squared_euclidean").mean()
    return row_distances(a, b, "euclidean").pow(alpha).mean()


def uniformity(
    x: Tensor, first: int = 0, gather: Gather = alone, reduce: Reduce = alone, *, t: float = 2.0
) -> Tensor:
    """Returns log of the mean over distinct pairs of exp(-t |x_i - x_j|^2), the same on every rank, ().

    x (B, D) L2-normalised; pairs are those of the global batch. 0 is a collapsed embedding; about -2 t is
    uniform in many dimensions. arXiv:2005.10242 sec. 4.1. Raises ValueError for a global batch of one row.
    """
    everyone = gather(x)
    if everyone.shape[0] < 2:
        raise ValueError("uniformity needs at least two rows in the global batch, got one")
    logits = t * similarity(x, everyone, "negative_squared_euclidean")
    logits[torch.arange(x.shape[0], device=x.device), own_columns(x, first)] = -math.inf
    local = logits.flatten().logsumexp(0) - math.log(x.shape[0] * (everyone.shape[0] - 1))
    return log_mean_over_ranks(local, reduce)


@torch.no_grad()
def spread(x: Tensor) -> Tensor:
    """Returns the mean standard deviation per dimension of normalised rows, times sqrt(D), (); no gradient.

    x (B, D), of this rank alone. About 1 for rows all over a sphere, 0 when all are equal: SimSiam,
    arXiv:2011.10566 sec. 4.1. Centred effective rank does not see such a collapse: what is left around the
    mean has a flat spectrum.
    """
    return F.normalize(x, dim=-1).std(dim=0, unbiased=False).mean() * x.shape[1] ** 0.5
