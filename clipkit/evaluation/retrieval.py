"""Image-text retrieval in both directions, with any number of captions per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clipkit.dist import World
from clipkit.evaluation.datasets import open_retrieval
from clipkit.evaluation.diagnostics import describe_embeddings, duplicate_share, similarity_histogram
from clipkit.evaluation.embed import (
    Encoder,
    Progress,
    check_embeddings,
    distinct,
    embed_images,
    embed_texts,
    together,
)
from clipkit.evaluation.ranks import Ranks, on_grid, retrieval_ranks
from clipkit.evaluation.results import build_result
from clipkit.evaluation.sets import RetrievalSet

DIAGNOSED = 1024  # pairs whose embeddings are described: products of rows stay small
DEFINITIONS = {
    "image_retrieval_recall@k": "= t2i_recall@k, text -> image: share of captions whose image is in the "
    "first k",
    "text_retrieval_recall@k": "= i2t_recall@k, image -> text: share of images with an own caption in the "
    "first k; an image without captions is a miss",
    "median_rank, mean_rank": "counted from 1: of the own image for every caption, of the best own caption "
    "for every image that has one",
    "null": "recall@k with fewer than k candidates",
    "ties": "pessimistic: candidates with exactly the score of the right answer stand before it (other own "
    "captions of an image are no candidates against it); `optimistic` puts them behind it, and every other "
    "way to break ties lies between the two",
    "diagnostics": f"of the first {DIAGNOSED:,} images that have a caption, each with its first one: "
    "how the embeddings lie, not how good they are",
}


@runtime_checkable
class Scaled(Protocol):
    """An encoder with a temperature."""

    @property
    def logit_scale(self) -> float: ...


def _recall(ranks: Tensor, valid: Tensor, k: int, candidates: int) -> float | None:
    if candidates < k:
        return None
    return int(((ranks <= k) & valid).sum()) / len(ranks)


def _statistics(ranks: Tensor) -> tuple[float, float]:
    """Returns (median, mean) of integer ranks; the median of an even number is the mean of two."""
    ordered = ranks.sort().values
    middle = (int(ordered[(len(ordered) - 1) // 2]) + int(ordered[len(ordered) // 2])) / 2
    return middle, int(ordered.sum()) / len(ordered)


def retrieval_metrics(
    images: Tensor,
    texts: Tensor,
    owners: Tensor,
    recall_k: Sequence[int] = (1, 5, 10),
    chunk: int | None = None,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Returns (metrics, ties) from embeddings images (N, D), texts (M, D) and owners int64 (M,).

    metrics  recall@k of both directions under CLIP_benchmark's names and as t2i_/i2t_, median and mean ranks;
             ties count against the model (see DEFINITIONS)
    ties     per direction: how many queries have a tied competitor, and recall@k if those were put last
    chunk    texts scored at a time; changes memory, never a number
    """
    text_ranks, image_ranks = retrieval_ranks(on_grid(images), on_grid(texts), owners, chunk)
    metrics: dict[str, float | None] = {}
    ties: dict[str, Any] = {}
    directions: tuple[tuple[str, str, Ranks, int], ...] = (
        ("image_retrieval", "t2i", text_ranks, len(images)),
        ("text_retrieval", "i2t", image_ranks, len(texts)),
    )
    for name, alias, ranks, candidates in directions:
        optimistic = {}
        for k in recall_k:
            recall = _recall(ranks.pessimistic, ranks.valid, k, candidates)
            metrics[f"{name}_recall@{k}"] = metrics[f"{alias}_recall@{k}"] = recall
            optimistic[f"{alias}_recall@{k}"] = _recall(ranks.optimistic, ranks.valid, k, candidates)
        median, mean = _statistics(ranks.pessimistic[ranks.valid])
        metrics[f"{alias}_median_rank"], metrics[f"{alias}_mean_rank"] = median, mean
        tied = int(((ranks.level > 0) & ranks.valid).sum())
        ties[alias] = {"queries_with_ties": tied, "optimistic": optimistic}
    return metrics, ties


def _counts(dataset: RetrievalSet, unique: int, text_index: Tensor) -> dict[str, int]:
    owners = torch.from_numpy(dataset.owners)
    per_image = torch.bincount(owners, minlength=len(dataset.images))
    pairs = torch.unique(torch.stack([text_index, owners]), dim=1)
    images_of_text = torch.bincount(pairs[0], minlength=unique)
    return {
        "images": len(dataset.images),
        "captions": len(dataset.captions),
        "captions_per_image_min": int(per_image.min()),
        "captions_per_image_max": int(per_image.max()),
        "images_without_captions": int((per_image == 0).sum()),
        "captions_of_several_images": int((images_of_text[text_index] > 1).sum()),
        "empty_captions_left_out": dataset.empty_captions,
    }


def _diagnostics(
    model: Encoder, images: Tensor, texts: Tensor, owners: Tensor, text_index: Tensor
) -> dict[str, Any]:
    """What training reports, about the first pairs of the set: every image with the first of its captions."""
    first = torch.full((len(images),), len(texts), dtype=torch.int64, device=owners.device)
    first = first.scatter_reduce(0, owners, torch.arange(len(texts), device=owners.device), "amin")
    rows = (first < len(texts)).nonzero()[:DIAGNOSED, 0]
    # Not on the device: Metal has no float64, and a small float64 spectrum is slow elsewhere.
    image, text = images[rows].cpu(), texts[first[rows]].cpu()
    found: dict[str, Any] = describe_embeddings(image, text, DIAGNOSED)
    found["duplicate_captions"] = duplicate_share(text_index[first[rows].cpu()])
    if isinstance(model, Scaled):
        found["logit_scale"] = model.logit_scale
    found["similarity"] = similarity_histogram(image, text)
    return found


def retrieval(
    model: Encoder,
    data: str | Path | RetrievalSet,
    *,
    recall_k: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    workers: int = 0,
    split: str = "test",
    world: World | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the result of retrieval on `data`, both directions: a dictionary that is valid JSON.

    Arguments and errors as in `zero_shot`; `data` may be an opened set, whose split is fixed. Equal captions
    are encoded once: their scores are equal.
    """
    world = world or World()
    dataset = data if isinstance(data, RetrievalSet) else together(lambda: open_retrieval(data, split), world)
    unique, text_index = distinct(dataset.captions)
    texts = embed_texts(model, unique, batch_size=batch_size, world=world, progress=progress)
    check_embeddings(texts, "text", lambda row: repr(unique[row]))
    images = embed_images(
        model, dataset.images, batch_size=batch_size, workers=workers, world=world, progress=progress
    )
    check_embeddings(images, "image", dataset.images.name)
    owners = torch.from_numpy(dataset.owners).to(images.device)
    all_texts = texts.to(images.device)[text_index.to(images.device)]
    metrics, ties = retrieval_metrics(images, all_texts, owners, recall_k)
    protocol = {
        "summary": "ties counted against the model",
        "data_kind": dataset.kind,
        "split": dataset.split,
        "batch_size": batch_size,
        "definitions": DEFINITIONS,
    }
    counts = _counts(dataset, len(unique), text_index)
    return build_result(
        "zeroshot_retrieval",
        model,
        dataset.name,
        metrics,
        counts,
        protocol,
        ties=ties,
        diagnostics=_diagnostics(model, images, all_texts, owners, text_index),
    )
