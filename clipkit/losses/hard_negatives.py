"""Hard negatives: weights for those of the batch, and captions written to be wrong.

Shapes: B anchors on this rank, N = B * W gathered rows, M hard captions per image, D width.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.losses.contrastive import (
    Form,
    Gather,
    Scale,
    alone,
    contrastive_loss,
    own_columns,
    two_view_logits,
)


class HardNegatives(NamedTuple):
    """A loss () in nats with what tells whether its weights are sound; the latter carry no gradient.

    clamped    () fraction of anchors whose debiased negatives hit their lower bound and give no gradient
    effective  () mean over anchors of 1 / sum w^2 for weights that sum to 1: how many negatives count
    """

    loss: Tensor
    clamped: Tensor
    effective: Tensor


def hard_columns(
    logits: Tensor,
    positives: Tensor,
    floor: Scale,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.0,
    detach: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (columns (B, 2), clamped (), effective ()) to give to the kernel with all positives at 0.

    Column 0 is the positive's logit, column 1 the log of the weighted, debiased sum over the n negatives,
    HCL, arXiv:2010.04592 and its code: weights w_k ~ exp(beta * logit_k) with mean 1,
    R = sum_k w_k exp(logit_k), and max((R - n tau_plus exp(positive)) / (1 - tau_plus), n exp(floor)).

    logits (B, C) with -inf for candidates that do not exist; positives int64 (B,); floor is the lowest
    logit there can be, -scale for cosines; beta >= 0 multiplies LOGITS, so at scale 100 anything above
    0.25 is nearly the maximum; tau_plus in [0, 1) is the probability that a negative is a positive;
    `detach` keeps gradients out of the weights (the authors let them through). keep bool (B, C): False
    takes a negative out; every row must keep at least one.
    """
    column = positives[:, None]
    negatives = logits.scatter(1, column, -math.inf)
    if keep is not None:
        negatives = negatives.masked_fill(~keep, -math.inf)
    exists = negatives > -math.inf
    log_count = exists.sum(1).to(logits.dtype).log()
    shares = (beta * negatives).masked_fill(~exists, -math.inf).log_softmax(1)
    effective = (2 * shares.detach()).logsumexp(1).neg().exp().mean()
    if detach:
        shares = shares.detach()
    log_sum = log_count + (shares + negatives).logsumexp(1)
    own = logits.gather(1, column)[:, 0]
    clamped = torch.zeros_like(exists[:, 0])
    if tau_plus > 0:
        gap = log_count + math.log(tau_plus) + own - log_sum
        clamped = gap >= 0
        # Minus 1 where nothing remains: a negative log, or an overflow, must stay out of the graph.
        remainder = torch.where(clamped, -1, gap).expm1().neg().log()
        debiased = log_sum + remainder - math.log1p(-tau_plus)
        clamped = clamped | (debiased < log_count + floor)
        log_sum = torch.where(clamped, log_count + floor, debiased)
    return torch.stack([own, log_sum], dim=1), clamped.to(logits.dtype).mean(), effective


def weighted_loss(
    logits: Tensor,
    positives: Tensor,
    scale: Scale,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.0,
    detach: bool = False,
    form: Form = "out",
) -> HardNegatives:
    """Returns the mean over anchors of -log of the positive's share beside its weighted negatives.

    logits (B, C) are scale times cosines; the other arguments as in `hard_columns`. form "decoupled" leaves
    the positive out of the denominator, as `dcl_loss` does, which is this with beta = tau_plus = 0.
    """
    columns, clamped, effective = hard_columns(
        logits, positives, -scale, beta=beta, tau_plus=tau_plus, detach=detach
    )
    loss = contrastive_loss(columns, torch.zeros_like(positives), form=form)
    return HardNegatives(loss, clamped, effective)


def _mean(one: HardNegatives, other: HardNegatives) -> HardNegatives:
    return HardNegatives(*((x + y) / 2 for x, y in zip(one, other, strict=True)))


def hcl_loss(
    a: Tensor,
    b: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    detach: bool = False,
    form: Form = "out",
) -> HardNegatives:
    """Returns NT-Xent with hard-negative weights and debiasing, mean over the 2B anchors.

    a, b (B, D) L2-normalised; the other arguments as in `weighted_loss`. HCL, arXiv:2010.04592;
    beta = 0 is the debiased loss of arXiv:2007.00224 eq. 8, tau_plus = 0 too is NT-Xent.
    Raises ValueError for N = 1.
    """
    from_a, from_b, positives = two_view_logits(a, b, scale, first, gather)
    weigh = functools.partial(weighted_loss, beta=beta, tau_plus=tau_plus, detach=detach, form=form)
    return _mean(weigh(from_a, positives, scale), weigh(from_b, positives, scale))


def caption_logits(
    image: Tensor, hard: Tensor, scale: Scale, gather: Gather = alone, present: Tensor | None = None
) -> Tensor:
    """Returns the logits of this rank's images against every gathered hard caption, (B, N * M).

    hard (B, M, D) L2-normalised captions that are wrong for their own image; present bool (B, M), False
    where one is missing: its column is -inf and its content has no influence.
    """
    logits = scale * image @ gather(hard).flatten(0, 1).T
    if present is None:
        return logits
    # As bytes: not every backend moves bools.
    missing = gather(present.to(torch.uint8)).flatten() == 0
    return logits.masked_fill(missing, -math.inf)


def hard_clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    *,
    hard: Tensor | None = None,
    present: Tensor | None = None,
    beta: float = 0.0,
    tau_plus: float = 0.0,
    detach: bool = False,
) -> HardNegatives:
    """Returns the symmetric contrastive loss of pairs with hard captions, hard-negative weights, or both.

    image, text (B, D) L2-normalised; hard (B, M, D) and present (B, M) as in `caption_logits`. Every image
    sees all gathered texts and all gathered hard captions, N + N * M candidates; texts see images alone,
    because no image belongs to a hard caption (NegCLIP, arXiv:2210.01936). beta, tau_plus and
    detach as in `hard_columns`; without any of it this is `clip_loss`. Raises ValueError for N = 1.
    """
    from_image, from_text, positives = two_view_logits(image, text, scale, first, gather, within=False)
    if hard is not None:
        from_image = torch.cat([from_image, caption_logits(image, hard, scale, gather, present)], dim=1)
    weigh = functools.partial(weighted_loss, beta=beta, tau_plus=tau_plus, detach=detach)
    return _mean(weigh(from_image, positives, scale), weigh(from_text, positives, scale))


def hard_info_nce(
    anchors: Tensor,
    candidates: Tensor,
    hard: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    *,
    present: Tensor | None = None,
    own_bonus: float = 0.0,
) -> Tensor:
    """Returns one-way InfoNCE over the gathered candidates and all gathered hard negatives, ().

    anchors, candidates (B, D), hard (B, M, D) L2-normalised; present bool (B, M). `own_bonus` is added to
    the logits of the anchor's own hard negatives, in the denominator: supervised SimCSE,
    arXiv:2104.08821 eq. 5, with log alpha of its weighted variant as `own_bonus`.
    """
    others = caption_logits(anchors, hard, scale, gather, present)
    logits = torch.cat([scale * anchors @ gather(candidates).T, others], dim=1)
    positives = own_columns(anchors, first)
    if own_bonus == 0:
        return contrastive_loss(logits, positives)
    owner = torch.arange(others.shape[1], device=logits.device) // hard.shape[1]
    log_weights = torch.zeros_like(logits)
    log_weights[:, -others.shape[1] :].masked_fill_(owner == positives[:, None], own_bonus)
    return contrastive_loss(logits, positives, log_weights=log_weights)
