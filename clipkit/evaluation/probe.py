"""How much a linear classifier, and the nearest neighbours, find in the trunk features of an image tower."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from clipkit.dist import World
from clipkit.evaluation.datasets import open_classification
from clipkit.evaluation.embed import Encoder, Progress, check_embeddings, embed_images, together
from clipkit.evaluation.results import build_result
from clipkit.evaluation.sets import ClassificationSet
from clipkit.types import DataError

PENALTIES = tuple(10.0**power for power in range(-5, 2))  # of the squared weights, per training row
NEIGHBOURS = 20
FOLDS = 5
ITERATIONS = 200

DEFINITIONS = {
    "linear_acc1": "multinomial logistic regression on standardised features, L2 penalty chosen on a fifth "
    "of the training rows",
    "knn_acc1": f"vote of the {NEIGHBOURS} nearest training rows (cosine), weighted by exp(cosine / 0.07)",
    "standard_error": "binomial, sqrt(p (1 - p) / rows)",
}


class TrunkEncoder(Encoder, Protocol):
    """What a probe needs of a model: besides an Encoder, pooled features before the joint projection."""

    def encode_image_trunk(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class _Trunk:
    """A model whose image embeddings are its trunk features."""

    model: TrunkEncoder

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def precision(self) -> str:
        return self.model.precision

    @property
    def image_size(self) -> tuple[int, int]:
        return self.model.image_size

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        return self.model.preprocess

    def tokenize(self, captions: list[str], /) -> Tensor:
        return self.model.tokenize(captions)

    def encode_image(self, images: Tensor, /) -> Tensor:
        return self.model.encode_image_trunk(images)

    def encode_text(self, tokens: Tensor, /) -> Tensor:
        return self.model.encode_text(tokens)


class LinearFit:
    """Multinomial logistic regression on standardised features, in float64.

    `fit` minimises mean cross-entropy + penalty / 2 * |weights|^2 by L-BFGS from where the last fit ended,
    from zero at first: falling penalties are quick, and every run finds the same answer.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int) -> None:
        """features (N, F) float, labels int64 (N,) of 0..classes-1."""
        x = features.double()
        self.mean, self.spread = x.mean(dim=0), x.std(dim=0, unbiased=False).clamp(min=1e-8)
        self.x, self.labels = (x - self.mean) / self.spread, labels
        self.weights = x.new_zeros(x.shape[1], classes).requires_grad_()
        self.bias = x.new_zeros(classes).requires_grad_()

    def fit(self, penalty: float) -> LinearFit:
        """Returns this fit at its optimum for `penalty`."""
        optimizer = torch.optim.LBFGS(
            [self.weights, self.bias],
            max_iter=ITERATIONS,
            history_size=10,
            tolerance_grad=1e-6,
            tolerance_change=1e-14,  # the default stops far from the optimum
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(self.x @ self.weights + self.bias, self.labels)
            loss = loss + penalty / 2 * self.weights.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return self

    @torch.no_grad()
    def scores(self, features: Tensor) -> Tensor:
        """Returns the scores (M, classes) of features (M, F)."""
        return ((features.double() - self.mean) / self.spread) @ self.weights + self.bias


def linear_probe(
    features: Tensor, labels: Tensor, tested: Tensor, classes: int, penalties: Sequence[float] = PENALTIES
) -> tuple[Tensor, float]:
    """Returns (predicted classes of the rows `tested`, int64 (M,); the penalty that was chosen).

    The penalty is the one with the most right answers on a fifth of the training rows (every fifth within a
    class), the largest of equals; the classifier is then fitted on all of them.
    """
    fold = folds_of(labels, FOLDS)
    held = fold == 0
    best, chosen = -1, penalties[-1]
    tried = LinearFit(features[~held], labels[~held], classes)
    for penalty in sorted(penalties, reverse=True):
        answers = tried.fit(penalty).scores(features[held]).argmax(dim=1)
        right = int((answers == labels[held]).sum())
        if right > best:
            best, chosen = right, penalty
    final = LinearFit(features, labels, classes).fit(chosen)
    return final.scores(tested).argmax(dim=1), chosen


def knn_probe(features: Tensor, labels: Tensor, tested: Tensor, classes: int) -> Tensor:
    """Returns the classes (M,) that the nearest training rows vote for, arXiv:1805.01978 section 3.4."""
    near = (normalize(tested.float(), dim=1) @ normalize(features.float(), dim=1).T).topk(
        min(NEIGHBOURS, len(features)), dim=1
    )
    votes = one_hot(labels[near.indices], classes) * (near.values / 0.07).exp()[..., None]
    return votes.sum(dim=1).argmax(dim=1)


def folds_of(labels: Tensor, count: int) -> Tensor:
    """Returns the fold 0..count-1 of every row: rows of a class are dealt in turn, so folds are alike."""
    folds = torch.empty_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        # Classes start at different folds, or fold 0 would get the extra row of every class.
        folds[rows] = (torch.arange(len(rows), device=labels.device) + int(label)) % count
    return folds


def probe_features(
    features: Tensor, labels: Tensor, tested: tuple[Tensor, Tensor] | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns (metrics, protocol) of both probes from features (N, F) and labels int64 (N,).

    tested: (features, labels) of a test split; None: five folds take turns as the test rows.
    """
    classes = int(max(labels.max(), labels.max() if tested is None else tested[1].max())) + 1
    rounds = []
    if tested is not None:
        rounds.append((features, labels, *tested))
    else:
        fold = folds_of(labels, FOLDS)
        rounds = [
            (features[fold != n], labels[fold != n], features[fold == n], labels[fold == n])
            for n in range(FOLDS)
        ]
    right = {"linear": 0, "knn": 0}
    rows, penalties = 0, []
    for train_x, train_y, test_x, test_y in rounds:
        predicted, penalty = linear_probe(train_x, train_y, test_x, classes)
        right["linear"] += int((predicted == test_y).sum())
        right["knn"] += int((knn_probe(train_x, train_y, test_x, classes) == test_y).sum())
        rows += len(test_y)
        penalties.append(penalty)
    metrics = {f"{name}_acc1": count / rows for name, count in right.items()}
    accuracy = metrics["linear_acc1"]
    metrics["standard_error"] = math.sqrt(accuracy * (1 - accuracy) / rows)
    protocol = {"test_rows": rows, "folds": len(rounds) if tested is None else 0, "penalties": penalties}
    return metrics, protocol


def _features(model: Encoder, dataset: ClassificationSet, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    features = embed_images(model, dataset.images, **options)
    check_embeddings(features, "image", dataset.images.name)
    return features, torch.from_numpy(dataset.labels).to(features.device)


def open_probed(data: str | Path) -> tuple[ClassificationSet, ClassificationSet | None]:
    """Returns (the rows to test, the rows to fit on); None for the latter: folds of the former.

    Raises ConfigError and DataError as `open_classification` does, DataError for a single class and for
    splits with different class folders.
    """
    tested = open_classification(data, "test")
    trained = open_classification(data, "train") if tested.split is not None and _has_train(data) else None
    if trained is not None and trained.folders != tested.folders:
        # Labels count the folders of a split: one that is missing shifts all that follow.
        raise DataError(
            f"{trained.source} and {tested.source} have different class folders",
            "give both splits the same class folders",
        )
    if len(set(tested.labels.tolist())) < 2:
        raise DataError(f"{tested.source}: only one class", "probe a set with at least two classes")
    return tested, trained


def probe(
    model: TrunkEncoder,
    data: str | Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    world: World | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the result of both probes on `data`, a classification set: a dictionary that is valid JSON.

    A set with the splits train and test is fitted on the one and tested on the other; any other set is
    cross-validated in five folds. Other arguments and errors as in `zero_shot`.
    """
    encoder = _Trunk(model)
    options = {"batch_size": batch_size, "workers": workers, "world": world, "progress": progress}
    tested, trained = together(lambda: open_probed(data), world or World())
    test = _features(encoder, tested, options)
    if trained is None:
        metrics, protocol = probe_features(*test)
        how = f"{FOLDS} folds"
    else:
        metrics, protocol = probe_features(*_features(encoder, trained, options), test)
        how = "split train -> split test"
    counts = {
        "samples": len(tested.labels),
        "classes": len(set(tested.labels.tolist())),
        "train_samples": 0 if trained is None else len(trained.labels),
        "features": test[0].shape[1],
    }
    protocol |= {
        "summary": f"trunk features, {how}",
        "data_kind": tested.kind,
        "split": tested.split,
        "batch_size": batch_size,
        "definitions": DEFINITIONS,
    }
    return build_result("probe", encoder, tested.name, metrics, counts, protocol)


def _has_train(data: str | Path) -> bool:
    return (Path(data) / "train").is_dir()
