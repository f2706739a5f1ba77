"""Redundancy reduction: the correlation of two views' dimensions should be the identity."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkit.losses.contrastive import Reduce, alone


def standardised(x: Tensor, reduce: Reduce = alone, eps: float = 1e-5) -> Tensor:
    """Returns `x` (B, D) with mean 0 and biased variance 1 per dimension over the global batch.

    `reduce` is the mean over ranks with autograd. A constant dimension becomes 0.
    """
    centred = x - reduce(x.mean(0))
    return centred * (reduce(centred.square().mean(0)) + eps).rsqrt()


def barlow_twins_loss(
    a: Tensor, b: Tensor, reduce: Reduce = alone, *, off_diagonal: float = 0.0051, eps: float = 1e-5
) -> Tensor:
    """Returns sum_d (C_dd - 1)^2 + off_diagonal * sum_{d != e} C_de^2, the same on every rank, ().

    a, b (B, D): projections of two views, not normalised; C (D, D) is their cross-correlation over the
    global batch. Barlow Twins, arXiv:2103.03230 eq. 1-2. A sum over dimensions, about D at the start: weigh
    it by 1 / D beside other losses. A smaller D wants a larger `off_diagonal` (about 1 / D). Statistics
    per rank, or a reduction without gradient, train something else.
    """
    product = standardised(a, reduce, eps).T @ standardised(b, reduce, eps)
    error = reduce(product / a.shape[0]) - torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    return off_diagonal * error.square().sum() + (1 - off_diagonal) * error.diagonal().square().sum()
