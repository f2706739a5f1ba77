"""Exact scores and rank counting: no sort, no N x M matrix, no dependence on the order of summation.

Embeddings are rounded to multiples of 2^-25 in float64, an error below 1.5e-8 per entry, less than a
float32 product has. Every product is then a multiple of 2^-50 and, for unit rows, every partial sum stays
below 2: all of it fits into the 53 bits of a float64, so a dot product has ONE value, whatever the kernel,
the chunk or the device. Ties are ties, and rank counts are integers that any chunking reproduces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

GRID = 2.0**25
BLOCK_ENTRIES = 1 << 22  # scores held at a time: 32 MiB of float64


def on_grid(embeddings: Tensor) -> Tensor:
    """Returns the rows (N, D) as float64 unit vectors whose entries are multiples of 2^-25."""
    return torch.round(functional.normalize(embeddings.to(torch.float64), dim=-1) * GRID) / GRID


@dataclass(frozen=True)
class Ranks:
    """Where the right answer of each query stands: `above` candidates score higher, `level` score the same.

    above, level  int64 (queries,)
    valid         bool (queries,), False where a query has no right answer at all
    """

    above: Tensor
    level: Tensor
    valid: Tensor

    @property
    def pessimistic(self) -> Tensor:
        """Returns 1-based ranks with every tied candidate in front of the right answer, int64 (queries,)."""
        return 1 + self.above + self.level

    @property
    def optimistic(self) -> Tensor:
        """Returns 1-based ranks with every tied candidate behind the right answer, int64 (queries,)."""
        return 1 + self.above


def _chunks(rows: int, columns: int, chunk: int | None) -> Iterator[slice]:
    size = chunk or max(1, BLOCK_ENTRIES // max(columns, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def class_ranks(images: Tensor, classes: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Returns the 1-based rank of the true class of each image, int64 (N,).

    images (N, D) and classes (K, D) lie on the grid; labels int64 (N,). Of two classes with exactly the same
    score the lower index comes first (two of the 1,000 ImageNet names exist twice).
    """
    order = torch.arange(len(classes), device=images.device)
    ranks = torch.empty(len(images), dtype=torch.int64, device=images.device)
    for rows in _chunks(len(images), len(classes), chunk):
        scores = images[rows] @ classes.T
        label = labels[rows, None]
        own = scores.gather(1, label)
        ahead = (scores > own) | ((scores == own) & (order < label))
        ranks[rows] = 1 + ahead.sum(1)
    return ranks


def retrieval_ranks(
    images: Tensor, texts: Tensor, owners: Tensor, chunk: int | None = None
) -> tuple[Ranks, Ranks]:
    """Returns the ranks (text -> image, image -> text), both directions from one pass over score blocks.

    images (N, D) and texts (M, D) lie on the grid; owners int64 (M,) is the image of each text.
    A text asks for its image. An image asks for its best own text; its other texts do not compete.
    Memory: blocks of `chunk` x N scores.
    """
    own = torch.empty(len(texts), dtype=torch.float64, device=texts.device)
    for rows in _chunks(len(texts), texts.shape[1], chunk):
        own[rows] = (texts[rows] * images[owners[rows]]).sum(1)
    best = own.new_full((len(images),), -torch.inf).scatter_reduce(0, owners, own, "amax")
    count = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    num_texts = count.scatter_add(0, owners, torch.ones_like(owners))
    own_level = count.scatter_add(0, owners, (own == best[owners]).to(torch.int64))

    text_above, text_level = torch.empty_like(owners), torch.empty_like(owners)
    image_above, image_level = count.clone(), count.clone()
    for rows in _chunks(len(texts), len(images), chunk):
        scores = texts[rows] @ images.T
        mine = own[rows, None]
        text_above[rows] = (scores > mine).sum(1)
        text_level[rows] = (scores == mine).sum(1) - 1
        image_above += (scores > best).sum(0)
        image_level += (scores == best).sum(0)
    everyone = torch.ones_like(owners, dtype=torch.bool)
    return Ranks(text_above, text_level, everyone), Ranks(image_above, image_level - own_level, num_texts > 0)
