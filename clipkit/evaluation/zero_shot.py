"""Zero-shot classification: each image against one text embedding per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clipkit.dist import World
from clipkit.evaluation.datasets import open_classification
from clipkit.evaluation.embed import (
    Encoder,
    Progress,
    check_embeddings,
    distinct,
    embed_images,
    embed_texts,
    together,
)
from clipkit.evaluation.prompts import ClassNames, Prompts, Templates, build_prompts
from clipkit.evaluation.ranks import class_ranks, on_grid
from clipkit.evaluation.results import build_result
from clipkit.evaluation.sets import ClassificationSet
from clipkit.types import DataError

DEFINITIONS = {
    "acc1": "share of images whose class has the highest score",
    "acc5": "share of images whose class is among the 5 highest; null with fewer than 5 classes",
    "mean_per_class_recall": "mean over the classes that occur of their acc1 (balanced accuracy)",
    "classifier": "per class: prompt embeddings normalised, averaged, normalised",
    "ties": "of two classes with exactly the same score the lower class number comes first",
}


def class_embeddings(prompts: Tensor, index: Tensor, num_prompts: Sequence[int]) -> Tensor:
    """Returns one unit row per class, float64 (K, D): normalise, mean over the prompts, normalise.

    prompts      (P, D) embeddings of the distinct prompts
    index        int64 (sum of num_prompts,), class by class: the row of each prompt
    num_prompts  prompts of each class
    """
    rows = prompts.cpu()
    means = [
        functional.normalize(rows[own].double(), dim=-1).mean(0)
        for own in torch.split(index, list(num_prompts))
    ]
    return functional.normalize(torch.stack(means), dim=-1)


def zero_shot_metrics(
    images: Tensor, classes: Tensor, labels: Tensor
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Returns (metrics, images per class, correct images per class).

    images (N, D) and classes (K, D) embeddings, labels int64 (N,). Metrics as CLIP_benchmark names them:
    acc1, acc5 (None when K < 5), mean_per_class_recall over the classes that occur.
    """
    ranks = class_ranks(on_grid(images), on_grid(classes).to(images.device), labels.to(images.device)).cpu()
    labels, first = labels.cpu(), (ranks == 1).to(torch.int64)
    samples = torch.bincount(labels, minlength=len(classes))
    correct = torch.zeros_like(samples).scatter_add(0, labels, first)
    present = samples > 0
    metrics = {
        "acc1": int(first.sum()) / len(labels),
        "acc5": int((ranks <= 5).sum()) / len(labels) if len(classes) >= 5 else None,
        "mean_per_class_recall": float((correct[present] / samples[present].double()).mean()),
    }
    return metrics, samples, correct


def _classifier(model: Encoder, prompts: Prompts, batch_size: int, world: World, progress: Any) -> Tensor:
    flat = [text for texts in prompts.texts for text in texts]
    unique, index = distinct(flat)
    embedded = embed_texts(model, unique, batch_size=batch_size, world=world, progress=progress)
    check_embeddings(embedded, "text", lambda row: repr(unique[row]))
    return class_embeddings(embedded, index, [len(texts) for texts in prompts.texts])


def _per_class(names: Sequence[str], samples: Tensor, correct: Tensor) -> list[dict[str, Any]]:
    return [
        {"name": name, "samples": seen, "acc1": hits / seen if seen else None}
        for name, seen, hits in zip(names, samples.tolist(), correct.tolist(), strict=True)
    ]


def open_prompted(
    data: str | Path, classnames: ClassNames = None, templates: Templates = None, split: str = "test"
) -> tuple[ClassificationSet, tuple[str, ...], Prompts]:
    """Returns (images with labels, class names, prompts): all that can be wrong before a model is asked.

    Arguments as in `zero_shot`. Raises ConfigError for missing files and names, DataError for names that do
    not fit the data, and for fewer than two classes.
    """
    dataset = open_classification(data, split)
    names = dataset.classnames(classnames)
    if len(names) < 2:
        raise DataError(
            f"{dataset.source}: only one class, {names[0]!r}: every image would be right",
            "point the command at the folder that holds one folder per class",
        )
    return dataset, names, build_prompts(names, templates, dataset.templates, dataset.wordnet)


def zero_shot(
    model: Encoder,
    data: str | Path,
    *,
    classnames: ClassNames = None,
    templates: Templates = None,
    batch_size: int = 64,
    workers: int = 0,
    split: str = "test",
    world: World | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the result of zero-shot classification on `data`: a dictionary that is valid JSON.

    data        a folder or CSV, see `clipkit.evaluation.datasets`
    classnames  a file (one per line, or JSON), a list, or "imagenet"; default: what the data brings
    templates   a file (one per line, or JSON), a list, "openai" or "simple"; default: what the data brings
    batch_size  rows per forward pass; part of the protocol, because low precision may depend on it
    world       the ranks that share the work; all must call, all get the same result. Default: this process

    Raises ConfigError (missing files, no class names), DataError (class names that do not fit, unreadable
    images), ClipkitError (embeddings that are not finite or collapsed).
    """
    world = world or World()
    dataset, names, prompts = together(lambda: open_prompted(data, classnames, templates, split), world)
    classes = _classifier(model, prompts, batch_size, world, progress)
    images = embed_images(
        model, dataset.images, batch_size=batch_size, workers=workers, world=world, progress=progress
    )
    check_embeddings(images, "image", dataset.images.name)
    metrics, samples, correct = zero_shot_metrics(images, classes, torch.from_numpy(dataset.labels))
    counts = {
        "samples": len(dataset.labels),
        "classes": len(names),
        "absent_classes": int((samples == 0).sum()),
        "templates": max(len(texts) for texts in prompts.texts),
        "prompts": sum(len(texts) for texts in prompts.texts),
    }
    protocol = {
        "summary": f"{prompts.per_class} ({prompts.origin}): normalise, mean, normalise",
        "data_kind": dataset.kind,
        "split": dataset.split,
        "templates": prompts.origin,
        "example_prompt": prompts.texts[0][0],
        "batch_size": batch_size,
        "definitions": DEFINITIONS,
    }
    per_class = _per_class(names, samples, correct)
    return build_result(
        "zeroshot_classification", model, dataset.name, metrics, counts, protocol, per_class=per_class
    )
