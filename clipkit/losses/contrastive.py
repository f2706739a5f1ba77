"""The one kernel of the softmax family, and what feeds it: similarities, logits, targets, global means.

Shapes: B anchors on this rank, C candidates, N = B * W gathered rows, D width. Values are in nats.
Every loss of this package keeps one promise: rank r returns the mean over ITS anchors against all
gathered candidates, so that the mean over ranks, of value and gradient, is that of the global batch. Where
ranks hold unequal parts of it, every mean over ranks counts a rank by its rows. `first` is always the place
of this rank's first row among the gathered ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of all ranks in rank order, (B, ...) -> (N, ...), differentiable.
Gather = Callable[[Tensor], Tensor]
# Mean over ranks, each counting by its rows of the batch, same shape, differentiable.
Reduce = Callable[[Tensor], Tensor]
Scale = Tensor | float
Form = Literal["out", "in", "decoupled"]
Similarity = Literal["cosine", "dot", "negative_euclidean", "negative_squared_euclidean"]


def alone(x: Tensor) -> Tensor:
    """Returns `x`: the gather, and the mean over ranks, of a single process."""
    return x


def own_columns(x: Tensor, first: int = 0) -> Tensor:
    """Returns the places of this rank's rows among the gathered ones, int64 (B,)."""
    return torch.arange(x.shape[0], device=x.device) + first


def similarity(a: Tensor, b: Tensor, kind: Similarity = "cosine") -> Tensor:
    """Returns how alike row i of `a` (B, D) and row j of `b` (C, D) are, (B, C); larger is more alike.

    The plain Euclidean kind has gradient 0 where two rows are equal. The squared one comes from a matrix
    product and loses digits where norms are much larger than distances.
    """
    if kind == "cosine":
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    if kind == "dot":
        return a @ b.T
    if kind == "negative_squared_euclidean":
        return 2 * a @ b.T - a.square().sum(1)[:, None] - b.square().sum(1)
    if kind == "negative_euclidean":
        # Not by matrix product: the root magnifies its rounding near 0.
        return -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    raise ValueError(
        f"unknown similarity {kind!r}: cosine, dot, negative_euclidean, negative_squared_euclidean"
    )


def scaled_similarity(a: Tensor, b: Tensor, scale: Scale, kind: Similarity = "dot") -> Tensor:
    """Returns scale * similarity, (B, C); "dot" of L2-normalised rows is the cosine."""
    if kind == "dot":
        return scale * a @ b.T
    return scale * similarity(a, b, kind)


def two_view_logits(
    a: Tensor,
    b: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    kind: Similarity = "dot",
    within: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logits of the anchors `a` (B, 2N), logits of the anchors `b` (B, 2N), positives (B,)).

    a, b (B, D): two views of the same samples. The first N columns are the other view, the next N the
    anchor's own view with the anchor itself at -inf; `within=False` leaves these out, (B, N). Raises
    ValueError when the global batch is one sample, which has no negatives.
    """
    all_a, all_b = gather(a), gather(b)
    count = all_a.shape[0]
    if count < 2:
        raise ValueError("in-batch negatives need a global batch of at least two samples, got one")
    positives = own_columns(a, first)

    def against(anchors: Tensor, other: Tensor, own: Tensor) -> Tensor:
        if not within:
            return scaled_similarity(anchors, other, scale, kind)
        logits = scaled_similarity(anchors, torch.cat([other, own]), scale, kind)
        logits[positives - first, positives + count] = -math.inf
        return logits

    return against(a, all_b, all_a), against(b, all_a, all_b), positives


def same_label(labels: Tensor, first: int = 0, gather: Gather = alone) -> Tensor:
    """Returns which gathered samples share the label of each row, bool (B, N), its own column included.

    labels int64 (B,); a negative label means unlabelled and is shared with nothing else.
    """
    same = (labels[:, None] == gather(labels)) & (labels >= 0)[:, None]
    same[torch.arange(labels.shape[0], device=labels.device), own_columns(labels, first)] = True
    return same


def graded_targets(similarities: Tensor, temperature: float) -> Tensor:
    """Returns target weights softmax(similarities / temperature), (B, C), rows sum to 1.

    `similarities` are of the captions, or minus the distance of classes in a taxonomy:
    `-distance[labels][:, all_labels]`. A small temperature leaves the most similar candidate alone.
    """
    return torch.softmax(similarities / temperature, dim=1)


def smoothed_targets(positives: Tensor, epsilon: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns (1 - epsilon) * rows of `positives` normalised + epsilon / C, (B, C), rows sum to 1.

    positives bool or float (B, C), every row with at least one. Label smoothing, arXiv:1512.00567 sec. 7.
    """
    weights = positives.to(dtype)
    return (1 - epsilon) * weights / weights.sum(1, keepdim=True) + epsilon / weights.shape[1]


def global_mean(values: Tensor, chosen: Tensor, reduce: Reduce = alone) -> Tensor:
    """Returns the chosen values per row over the mean of their number per row, (); 0 if there are none.

    The mean over ranks of the results is then the mean over all chosen values, however unevenly they
    are spread over ranks. values (B, ...), chosen bool of the same shape.
    """
    return mean_of_sums(values.masked_fill(~chosen, 0).sum(), chosen.sum(), values.shape[0], reduce)


def mean_of_sums(total: Tensor, count: Tensor, rows: int, reduce: Reduce = alone) -> Tensor:
    """Returns as `global_mean` the mean of what adds up to `total` () in `count` () parts on `rows` rows."""
    # Per row: ranks count by their rows in the mean.
    share = reduce(count.to(total.dtype) / rows)
    return total / rows / torch.where(share > 0, share, 1)


def log_mean_over_ranks(log_values: Tensor, reduce: Reduce = alone) -> Tensor:
    """Returns log of the mean over ranks of exp(log_values), same shape; differentiable if `reduce` is."""
    # A mean over ranks cannot give the usual maximum. The mean keeps the largest exponent >= 0, and
    # overflows only where one rank exceeds it by 88 (fp32).
    shift = reduce(log_values.detach())
    return shift + reduce((log_values - shift).exp()).log()


def contrastive_loss(
    logits: Tensor,
    positives: Tensor,
    *,
    keep: Tensor | None = None,
    log_weights: Tensor | None = None,
    form: Form = "out",
    reduce: Reduce = alone,
) -> Tensor:
    """Returns the mean over anchors of -log of the share of the positives among the candidates, ().

    logits       (B, C); -inf takes a candidate out
    positives    int64 (B,): the column of the one positive; bool (B, C): the positives; float (B, C):
                 non-negative target weights (soft targets), of which each row is normalised to sum 1
    keep         bool (B, C): False takes a candidate out, as positive and as negative
    log_weights  (B, C): added in the denominator only (log importance weights; 0 at positives is usual)
    form         "out": mean over positives of -log softmax, arXiv:2004.11362 eq. 2, which for float
                 weights is the cross-entropy; "in": -log of the mean over positives of the softmax, eq. 3;
                 "decoupled": as "out", but positives leave the denominator, arXiv:2110.06848 (L_DC)
    reduce       mean over ranks; needed when anchors without a positive can occur

    An anchor without a positive (decoupled: or without a negative) is left out, and the mean is over the
    others of all ranks. An int64 positive must not be taken out. Raises ValueError for an unknown form and
    for float weights with "decoupled", which has no meaning for them.
    """
    if form not in ("out", "in", "decoupled"):
        raise ValueError(f"unknown form {form!r}: out, in, decoupled")
    candidates = logits if log_weights is None else logits + log_weights
    if keep is not None:
        candidates = candidates.masked_fill(~keep, -math.inf)
    if positives.ndim == 1:
        if log_weights is None and form != "decoupled":
            return F.cross_entropy(candidates, positives)
        column = positives[:, None]
        if form == "decoupled":
            candidates = candidates.scatter(1, column, -math.inf)
        return (candidates.logsumexp(1) - logits.gather(1, column)[:, 0]).mean()
    if form == "decoupled" and positives.is_floating_point():
        raise ValueError("the decoupled form takes positives out of the denominator: pass bool, not float")
    if keep is not None:
        positives = positives.masked_fill(~keep, 0)
    chosen = positives > 0
    valid = chosen.any(1)
    if form == "decoupled":
        candidates = candidates.masked_fill(chosen, -math.inf)
        valid = valid & (candidates > -math.inf).any(1)
    rows = candidates.logsumexp(1) - _attraction(logits, positives.to(logits.dtype), chosen, form)
    return global_mean(rows, valid, reduce)


def _attraction(logits: Tensor, weights: Tensor, chosen: Tensor, form: Form) -> Tensor:
    """Returns per row the weighted mean of the positives' logits, or its log-sum-exp ("in"), (B,)."""
    total = weights.sum(1)
    weights = weights / torch.where(total > 0, total, 1)[:, None]
    if form == "in":
        return (logits + weights.log()).masked_fill(~chosen, -math.inf).logsumexp(1)
    return (weights * logits.masked_fill(~chosen, 0)).sum(1)
