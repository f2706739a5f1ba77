"""Losses over prototypes: swapped prediction of codes (SwAV) and cluster contrast (PCL).

Shapes: B rows on this rank, K prototypes, D width. Values are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipkit.losses.contrastive import Reduce, alone, contrastive_loss, log_mean_over_ranks


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    epsilon: float = 0.05,
    iterations: int = 3,
    reduce: Reduce = alone,
    rows: int | None = None,
) -> Tensor:
    """Returns codes (B, K): rows sum to 1, and columns tend to equal shares of the batch of all ranks.

    scores (B, K): cosines to the prototypes; epsilon: entropy of the codes; `reduce` is the mean over ranks,
    which counts a rank by its `rows` of the batch (None: B). SwAV, arXiv:2006.09882 eq. 3-5. In the log
    domain: exp(1 / epsilon) leaves half precision.
    """
    logits = scores / epsilon
    # A sum over all rows is wanted, up to a factor: the mean over ranks of sums per row of the batch.
    log_rows = math.log(scores.shape[0] if rows is None else rows)
    for _ in range(iterations):
        logits = logits - log_mean_over_ranks(logits.logsumexp(0) - log_rows, reduce)
        logits = logits.log_softmax(1)
    return logits.exp()


def swav_loss(
    scores: Sequence[Tensor],
    reduce: Reduce = alone,
    *,
    assigned: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    extra: Sequence[Tensor] = (),
) -> Tensor:
    """Returns the mean over assigned crops and other crops of the cross-entropy of codes and scores, ().

    scores: per crop (B, K), cosines to the prototypes. Codes come from the crops numbered in `assigned`
    alone and carry no gradient; each is predicted by all OTHER crops. SwAV, arXiv:2006.09882 eq. 2 and
    sec. 3.2. extra: per assigned crop scores (Q, K) of queued features that only steady the codes; a queue
    that all ranks share must be split among them (rank r passes rows r::W), or it counts W times.
    Raises ValueError for fewer than two crops.
    """
    if len(scores) < 2:
        raise ValueError("a code is predicted by the other crops: pass the scores of at least two crops")
    total = scores[0].new_zeros(())
    for place, crop in enumerate(assigned):
        rows = scores[crop].detach()
        pooled = torch.cat([rows, extra[place].detach()]) if extra else rows
        codes = sinkhorn(pooled, epsilon, iterations, reduce, len(rows))[: len(rows)]
        for number, other in enumerate(scores):
            if number != crop:
                total = total + contrastive_loss(other / temperature, codes)
    return total / (len(assigned) * (len(scores) - 1))


@torch.no_grad()
def concentrations(
    features: Tensor, prototypes: Tensor, assignment: Tensor, temperature: float, alpha: float = 10.0
) -> Tensor:
    """Returns the spread phi of each cluster, (K,), positive with mean `temperature`.

    features (M, D) in clusters `assignment` int64 (M,) around prototypes (K, D). PCL, arXiv:2005.04966
    sec. 3.3: phi = mean distance / log(members + alpha). As in the authors' code clusters of fewer than
    two members get the largest value, then values are clipped to their 10th and 90th percentile and scaled.
    """
    distance = (features - prototypes[assignment]).norm(dim=1)
    sums = distance.new_zeros(prototypes.shape[0]).index_add(0, assignment, distance)
    members = torch.bincount(assignment, minlength=prototypes.shape[0]).to(distance.dtype)
    spread = sums / members.clamp_min(1) / (members + alpha).log()
    spread = torch.where(members > 1, spread, spread.masked_fill(members <= 1, 0).max())
    low, high = torch.quantile(spread, torch.tensor([0.1, 0.9], dtype=spread.dtype, device=spread.device))
    spread = spread.clamp(low, high)
    # Clusters of copies have no spread at all.
    mean = spread.mean()
    return torch.where(mean > 0, temperature * spread / mean, temperature)


def proto_nce_loss(
    anchors: Tensor,
    prototypes: Sequence[Tensor],
    assignments: Sequence[Tensor],
    spreads: Sequence[Tensor],
) -> Tensor:
    """Returns the mean over clusterings and anchors of -log softmax(<anchor, c_j> / phi_j) at its own, ().

    anchors (B, D) L2-normalised; per clustering prototypes (K, D), L2-normalised, the cluster of each anchor
    int64 (B,), and phi (K,) from `concentrations`. The second term of ProtoNCE, PCL, arXiv:2005.04966
    eq. 11, over all prototypes instead of a sample of them; the first term is `moco_loss`.
    """
    costs = [
        contrastive_loss(anchors @ centres.T / phi, assignment)
        for centres, assignment, phi in zip(prototypes, assignments, spreads, strict=True)
    ]
    return torch.stack(costs).mean()
