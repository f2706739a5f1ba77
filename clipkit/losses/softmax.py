"""The softmax family: each anchor names its positives among all gathered candidates.

Shapes: B anchors on this rank, N = B * W candidates, D width, Q queue entries. Values are in nats, never
multiplied by a temperature or a number of directions, as some papers and libraries do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clipkit.losses.contrastive import (
    Form,
    Gather,
    Reduce,
    Scale,
    Similarity,
    alone,
    contrastive_loss,
    own_columns,
    same_label,
    scaled_similarity,
    two_view_logits,
)


def info_nce(
    anchors: Tensor, candidates: Tensor, scale: Scale, positives: Tensor, kind: Similarity = "dot"
) -> Tensor:
    """Returns the mean over anchors of -log softmax(scale * <anchor, candidate>) at the positive, ().

    anchors (B, D) and candidates (N, D) are L2-normalised, scale is 1 / temperature, positives (B,)
    indexes the candidate of each anchor. CPC, arXiv:1807.03748 eq. 4 with cosine similarity.
    """
    return contrastive_loss(scaled_similarity(anchors, candidates, scale, kind), positives)


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    kind: Similarity = "dot",
) -> Tensor:
    """Returns the symmetric contrastive loss of this rank's pairs against all gathered pairs, ().

    image, text (B, D) L2-normalised; scale (1,) or () is exp(log-scale). CLIP, arXiv:2103.00020 figure 3:
    the mean of image-to-text and text-to-image InfoNCE. Each rank returns the mean over ITS anchors, so
    that the mean over ranks is the loss of the global batch.
    """
    images, texts = gather(image), gather(text)
    positives = own_columns(image, first)
    image_to_text = info_nce(image, texts, scale, positives, kind)
    text_to_image = info_nce(text, images, scale, positives, kind)
    return (image_to_text + text_to_image) / 2


def soft_clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Scale,
    image_targets: Tensor,
    text_targets: Tensor,
    gather: Gather = alone,
    reduce: Reduce = alone,
) -> Tensor:
    """Returns the symmetric contrastive loss with graded targets instead of one positive, ().

    image, text (B, D) L2-normalised; image_targets (B, N): weights of all texts for this rank's images,
    text_targets (B, N): weights of all images for its texts. Rows are normalised to sum 1; a row of
    zeros is left out. Label smoothing and graded similarity: `clipkit.losses.contrastive`.
    """
    images, texts = gather(image), gather(text)
    image_to_text = contrastive_loss(scale * image @ texts.T, image_targets, reduce=reduce)
    text_to_image = contrastive_loss(scale * text @ images.T, text_targets, reduce=reduce)
    return (image_to_text + text_to_image) / 2


def unicl_loss(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    *,
    form: Form = "out",
    kind: Similarity = "dot",
) -> Tensor:
    """Returns the symmetric contrastive loss in which every pair of equal label is a positive, ().

    image, text (B, D) L2-normalised; labels int64 (B,), negative for unlabelled: then only the own pair.
    UniCL, arXiv:2204.03610, its bidirectional loss halved to a mean. With unique labels this is `clip_loss`.
    """
    same = same_label(labels, first, gather)
    image_to_text = contrastive_loss(scaled_similarity(image, gather(text), scale, kind), same, form=form)
    text_to_image = contrastive_loss(scaled_similarity(text, gather(image), scale, kind), same, form=form)
    return (image_to_text + text_to_image) / 2


def nt_xent_loss(
    a: Tensor,
    b: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    kind: Similarity = "dot",
) -> Tensor:
    """Returns the normalised-temperature cross-entropy of two views, mean over the 2B anchors, ().

    a, b (B, D) L2-normalised; scale is 1 / temperature. Each anchor has its other view as positive and
    2N - 2 negatives from both views. SimCLR, arXiv:2002.05709 eq. 1. Raises ValueError for N = 1.
    """
    from_a, from_b, positives = two_view_logits(a, b, scale, first, gather, kind)
    return (contrastive_loss(from_a, positives) + contrastive_loss(from_b, positives)) / 2


def dcl_loss(
    a: Tensor,
    b: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    *,
    sigma: float | None = None,
    within: bool = True,
) -> Tensor:
    """Returns the decoupled contrastive loss, mean over the 2B anchors; can be negative, ().

    a, b (B, D) L2-normalised. The positive is missing from the denominator: DCL, arXiv:2110.06848 (L_DC).
    `sigma` (paper: 0.5) weighs the positive term by 2 - N softmax(<a, b> / sigma) over the global batch,
    without gradient and with mean 1: DCLW (L_DCW). `within=False` takes negatives from the other view
    alone, which for image and text is InfoLOOB, arXiv:2110.11316. Raises ValueError for N = 1.
    """
    from_a, from_b, positives = two_view_logits(a, b, scale, first, gather, within=within)
    loss = (
        contrastive_loss(from_a, positives, form="decoupled")
        + contrastive_loss(from_b, positives, form="decoupled")
    ) / 2
    if sigma is None:
        return loss
    agreement = (a * b).sum(1)
    with torch.no_grad():
        everyone = gather(agreement) / sigma
        weights = 2 - everyone.shape[0] * (agreement / sigma - everyone.logsumexp(0)).exp()
    return loss + ((1 - weights) * scale * agreement).mean()


def supcon_loss(
    a: Tensor,
    b: Tensor | None,
    labels: Tensor,
    scale: Scale,
    first: int = 0,
    gather: Gather = alone,
    reduce: Reduce = alone,
    *,
    form: Form = "out",
    kind: Similarity = "dot",
) -> Tensor:
    """Returns the supervised contrastive loss, mean over the anchors that have a positive, ().

    a, b (B, D): two L2-normalised views, or one with b = None; labels int64 (B,), negative for
    unlabelled: then only the other view is a positive. Candidates are all other rows of all views.
    Khosla et al., arXiv:2004.11362: form "out" eq. 2, "in" eq. 3, with mean instead of sum over anchors
    and without the factor temperature / base temperature of the authors' code.
    """
    views = [a] if b is None else [a, b]
    candidates = torch.cat([gather(view) for view in views])
    logits = scaled_similarity(torch.cat(views), candidates, scale, kind)
    positives = same_label(labels, first, gather).repeat(len(views), len(views))
    count = candidates.shape[0] // len(views)
    itself = torch.cat([own_columns(view, first) + number * count for number, view in enumerate(views)])
    rows = torch.arange(itself.shape[0], device=itself.device)
    logits[rows, itself] = -math.inf
    positives[rows, itself] = False
    return contrastive_loss(logits, positives, form=form, reduce=reduce)


def moco_loss(
    queries: Tensor, keys: Tensor, queue: Tensor, scale: Scale, valid: Tensor | int | None = None
) -> Tensor:
    """Returns the mean over queries of -log softmax at their own key, the queue being the negatives, ().

    queries, keys (B, D) and queue (Q, D) are L2-normalised; keys and queue get no gradient. Only the first
    `valid` entries of the queue exist (None: all); with none the loss and its gradient are 0. The keys of
    other samples of the batch are no negatives: MoCo, arXiv:1911.05722 eq. 1. No collective is needed.
    """
    own = scale * (queries * keys.detach()).sum(1, keepdim=True)
    others = scale * queries @ queue.detach().T
    if valid is not None:
        missing = torch.arange(queue.shape[0], device=queue.device) >= valid
        others = others.masked_fill(missing, -math.inf)
    positives = torch.zeros(queries.shape[0], dtype=torch.int64, device=queries.device)
    return contrastive_loss(torch.cat([own, others], dim=1), positives)
