"""Margin losses: pairs (Siamese) and mined triplets.

Shapes: B anchors on this rank, N = B * W gathered rows, D width. Values are in units of the distance, for
pairs in its square.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.contrastive import (
    Gather,
    Reduce,
    alone,
    global_mean,
    mean_of_sums,
    own_columns,
    same_label,
    similarity,
)

Distance = Literal["squared_euclidean", "euclidean", "cosine"]
Miner = Literal["all", "semi_hard", "hard"]
Average = Literal["all", "nonzero"]


def distances(a: Tensor, b: Tensor, kind: Distance = "squared_euclidean") -> Tensor:
    """Returns the distance of row i of `a` (B, D) to row j of `b` (C, D), (B, C).

    "cosine" is 1 - cosine. The plain Euclidean kind has gradient 0 where two rows are equal.
    """
    if kind == "cosine":
        return 1 - similarity(a, b, "cosine")
    if kind == "euclidean":
        return -similarity(a, b, "negative_euclidean")
    if kind == "squared_euclidean":
        return -similarity(a, b, "negative_squared_euclidean")
    raise ValueError(f"unknown distance {kind!r}: squared_euclidean, euclidean, cosine")


def row_distances(a: Tensor, b: Tensor, kind: Distance = "euclidean") -> Tensor:
    """Returns the distance of row i of `a` to row i of `b`, both (B, D) -> (B,); kinds as `distances`."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(a, b, dim=1)
    squared = (a - b).square().sum(1)
    if kind == "squared_euclidean":
        return squared
    if kind == "euclidean":
        # The root has no derivative at 0; the inner choice keeps its infinity out of the graph.
        return torch.where(squared > 0, torch.where(squared > 0, squared, 1).sqrt(), 0)
    raise ValueError(f"unknown distance {kind!r}: squared_euclidean, euclidean, cosine")


def pair_margin_loss(
    distance: Tensor,
    similar: Tensor,
    margin: float = 1.0,
    reduce: Reduce = alone,
    *,
    keep: Tensor | None = None,
    balanced: bool = False,
) -> Tensor:
    """Returns the mean over pairs of d^2 / 2 if similar, else max(0, margin - d)^2 / 2, ().

    distance: any shape, from `row_distances` or `distances` (plain Euclidean in the paper); similar bool
    of the same shape. Hadsell, Chopra and LeCun, CVPR 2006 eq. 4, whose Y is the other way round: there
    Y = 0 is similar and Y = 1 dissimilar. keep: False leaves a pair out. `balanced` adds the mean over
    similar pairs to that over dissimilar ones, for matrices in which few pairs are similar.
    """
    keep = torch.ones_like(similar) if keep is None else keep
    costs = torch.where(similar, distance, (margin - distance).clamp_min(0)).square() / 2
    if not balanced:
        return global_mean(costs, keep, reduce)
    return global_mean(costs, keep & similar, reduce) + global_mean(costs, keep & ~similar, reduce)


def mined_triplets(
    distance: Tensor,
    positives: Tensor,
    negatives: Tensor,
    margin: float,
    miner: Miner,
    average: Average = "all",
    reduce: Reduce = alone,
) -> Tensor:
    """Returns the mean over mined triplets of max(0, d(anchor, positive) - d(anchor, negative) + margin), ().

    distance (B, N); positives, negatives bool (B, N), disjoint. Miners:
    all        every positive with every negative
    semi_hard  every positive with the nearest negative that is farther than it; where no negative is, with
               the farthest one. FaceNet, arXiv:1503.03832 sec. 3.2
    hard       per anchor the farthest positive with the nearest negative. arXiv:1703.07737 eq. 5
    average: over "all" mined triplets or over those with a "nonzero" loss (a larger effective step once
    most are zero). Anchors without a positive or a negative are left out.
    """
    if average not in ("all", "nonzero"):
        raise ValueError(f"unknown average {average!r}: all, nonzero")
    if miner == "all":
        return _all_triplets(distance, positives, negatives, margin, average, reduce)
    valid = positives.any(1) & negatives.any(1)
    if miner == "hard":
        near = distance.masked_fill(~negatives, math.inf).amin(1)
        far = distance.masked_fill(~positives, -math.inf).amax(1)
        # Filled before the hinge: inf - inf would reach the gradient.
        costs = (far.masked_fill(~valid, 0) - near.masked_fill(~valid, 0) + margin).clamp_min(0)
        chosen = valid
    elif miner == "semi_hard":
        ordered = distance.masked_fill(~negatives, math.inf).sort(1).values
        last = (negatives.sum(1, keepdim=True) - 1).clamp_min(0)
        place = torch.searchsorted(ordered.detach(), distance.detach().contiguous(), right=True)
        chosen = positives & valid[:, None]
        near = ordered.gather(1, torch.minimum(place, last)).masked_fill(~chosen, 0)
        costs = (distance - near + margin).clamp_min(0)
    else:
        raise ValueError(f"unknown miner {miner!r}: all, semi_hard, hard")
    return global_mean(costs, chosen if average == "all" else chosen & (costs > 0), reduce)


def _all_triplets(
    distance: Tensor, positives: Tensor, negatives: Tensor, margin: float, average: Average, reduce: Reduce
) -> Tensor:
    """The sum over negatives from their sorted distances: O(B N log N), where the triplets are B N^2."""
    ordered = distance.masked_fill(~negatives, math.inf).sort(1).values
    bound = distance + margin
    active = torch.searchsorted(ordered.detach(), bound.detach().contiguous())
    below = F.pad(ordered.masked_fill(ordered.isinf(), 0).cumsum(1), (1, 0))
    sums = active * bound - below.gather(1, active)
    sums = sums.masked_fill(~positives, 0).sum()
    triplets = active if average == "nonzero" else negatives.sum(1, keepdim=True).expand_as(active)
    return mean_of_sums(sums, triplets.masked_fill(~positives, 0).sum(), distance.shape[0], reduce)


def triplet_loss(
    a: Tensor,
    b: Tensor | None,
    labels: Tensor | None = None,
    margin: float = 0.2,
    first: int = 0,
    gather: Gather = alone,
    reduce: Reduce = alone,
    *,
    miner: Miner = "semi_hard",
    distance: Distance = "squared_euclidean",
    average: Average = "all",
) -> Tensor:
    """Returns the triplet loss of this rank's anchors against all gathered candidates, ().

    a, b (B, D): two views or modalities, the mean of a -> b and b -> a; or b = None and candidates are the
    other rows of `a`. Positives are the own pair and, with labels int64 (B,), all of equal label (negative:
    unlabelled); all others are negatives. The default is FaceNet's: squared distance of L2-normalised rows,
    margin 0.2, arXiv:1503.03832 eq. 3. miner "all" on pairs is the sum, "hard" the maximum of hinges of
    VSE++, arXiv:1707.05612. A collapsed embedding costs exactly the margin. Raises ValueError for
    b = None without labels.
    """
    if labels is None:
        if b is None:
            raise ValueError("one set of rows has no positives without labels: pass labels or a second view")
        labels = torch.full((a.shape[0],), -1, device=a.device)
    positives = same_label(labels, first, gather)
    negatives = ~positives
    if b is None:
        rows = torch.arange(a.shape[0], device=a.device)
        positives[rows, own_columns(a, first)] = False
        matrix = distances(a, gather(a), distance)
        return mined_triplets(matrix, positives, negatives, margin, miner, average, reduce)
    directions = (distances(a, gather(b), distance), distances(b, gather(a), distance))
    costs = [mined_triplets(x, positives, negatives, margin, miner, average, reduce) for x in directions]
    return (costs[0] + costs[1]) / 2
