"""Slow and obvious references, written from the definitions, one group per subject. Nothing here is fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

# --- Retrieval and zero-shot: exact rational scores, one sort per query ----------------------------------


def grid_rows(rows: Sequence[Sequence[float]]) -> list[list[Fraction]]:
    """Unit rows with entries rounded to multiples of 2^-25, as exact fractions."""
    result = []
    for row in rows:
        norm = math.sqrt(math.fsum(x * x for x in row))
        result.append([Fraction(round(x / norm * 2**25), 2**25) for x in row])
    return result


def exact_score(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    """The dot product, without rounding."""
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def first_right_rank(scores: Sequence[Fraction], right: Sequence[bool], ties_won: bool = False) -> int | None:
    """The 1-based place of the first right answer when equal scores put wrong answers first (or last)."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], right[i] != ties_won))
    return next((place for place, i in enumerate(order, 1) if right[i]), None)


def retrieval_ranks_by_sorting(
    images: Sequence[Sequence[float]],
    texts: Sequence[Sequence[float]],
    owners: Sequence[int],
    ties_won: bool = False,
) -> tuple[list[int | None], list[int | None]]:
    """Ranks (text -> image, image -> text); None for an image without captions."""
    image_rows, text_rows = grid_rows(images), grid_rows(texts)
    text_to_image = [
        first_right_rank(
            [exact_score(text, image) for image in image_rows],
            [number == owner for number in range(len(image_rows))],
            ties_won,
        )
        for text, owner in zip(text_rows, owners, strict=True)
    ]
    image_to_text = [
        first_right_rank(
            [exact_score(text, image) for text in text_rows], [owner == number for owner in owners], ties_won
        )
        for number, image in enumerate(image_rows)
    ]
    return text_to_image, image_to_text


def recall_by_counting(ranks: Sequence[int | None], k: int) -> float:
    """The share of queries with a right answer among the first k; a query without any is a miss."""
    return sum(rank is not None and rank <= k for rank in ranks) / len(ranks)


def hit_rates_by_topk(images: Tensor, texts: Tensor, owners: Tensor, k: int) -> tuple[float, float]:
    """(image retrieval, text retrieval) from the full matrix and topk, the way CLIP_benchmark counts them."""
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), owners] = True
    image_hits = positive.gather(1, scores.topk(k, dim=1).indices).any(1)
    text_hits = positive.T.gather(1, scores.T.topk(k, dim=1).indices).any(1)
    return image_hits.float().mean().item(), text_hits.float().mean().item()


def class_ranks_by_sorting(
    images: Sequence[Sequence[float]], classes: Sequence[Sequence[float]], labels: Sequence[int]
) -> list[int]:
    """1-based place of the true class; of equal scores the lower class number comes first."""
    image_rows, class_rows = grid_rows(images), grid_rows(classes)
    ranks = []
    for image, label in zip(image_rows, labels, strict=True):
        scores = [exact_score(image, row) for row in class_rows]
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        ranks.append(order.index(label) + 1)
    return ranks


def balanced_accuracy(ranks: Sequence[int], labels: Sequence[int]) -> float:
    """The mean, over the classes that occur, of the share of their images at rank 1."""
    recalls = []
    for label in sorted(set(labels)):
        own = [rank for rank, found in zip(ranks, labels, strict=True) if found == label]
        recalls.append(sum(rank == 1 for rank in own) / len(own))
    return sum(recalls) / len(recalls)


def ensembled_classes(prompts: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """One unit row per class from the rows of its prompts: normalise, mean, normalise."""

    def unit(row: Sequence[float]) -> list[float]:
        norm = math.sqrt(math.fsum(x * x for x in row))
        return [x / norm for x in row]

    classes = []
    for rows in prompts:
        columns = zip(*(unit(row) for row in rows), strict=True)
        classes.append(unit([math.fsum(column) / len(rows) for column in columns]))
    return classes


# Losses: double loops over pairs, in float64.


def slow_clip_loss(image: Tensor, text: Tensor, scale: float) -> float:
    """Returns the symmetric InfoNCE of N pairs, one anchor at a time."""
    count, total = len(image), 0.0
    for anchors, candidates in ((image, text), (text, image)):
        for row in range(count):
            scores = [scale * float(anchors[row] @ candidates[column]) for column in range(count)]
            total -= scores[row] - math.log(sum(math.exp(score) for score in scores))
    return total / (2 * count)


def slow_sigmoid_loss(image: Tensor, text: Tensor, scale: float, bias: float) -> float:
    """Returns the pairwise sigmoid loss of N pairs, one pair at a time."""
    total = 0.0
    for row in range(len(image)):
        for column in range(len(text)):
            sign = 1.0 if row == column else -1.0
            logit = scale * float(image[row] @ text[column]) + bias
            total += math.log(1 + math.exp(-sign * logit))
    return total / len(image)
