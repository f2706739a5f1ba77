"""Probes against optimality, slow loops and sets whose answer is known."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipkit.cli import main
from clipkit.evaluation.probe import (
    FOLDS,
    NEIGHBOURS,
    LinearFit,
    folds_of,
    knn_probe,
    linear_probe,
    open_probed,
    probe,
    probe_features,
)
from clipkit.evaluation.retrieval import retrieval
from clipkit.evaluation.zero_shot import zero_shot
from clipkit.types import DataError
from tests.evaluation.encoders import MetalProjection, Projection
from tests.evaluation.layouts import captioned_csv, image_bytes, labelled_csv
from tests.train.runs import train, values


def blobs(rows: int, classes: int, width: int, distance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = distance * torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % classes
    return centres[labels] + torch.randn(rows, width, generator=generator), labels


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_the_linear_fit_is_the_optimum(penalty: float) -> None:
    x, y = blobs(120, 3, 5, 0.7)
    found = LinearFit(x, y, 3).fit(10.0).fit(penalty)  # from another optimum
    standard = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    weights, bias = (part.detach().clone().requires_grad_() for part in (found.weights, found.bias))
    torch.testing.assert_close(found.scores(x), (standard @ weights + bias).detach())
    loss = torch.nn.functional.cross_entropy(standard @ weights + bias, y)
    loss = loss + penalty / 2 * weights.square().sum()
    loss.backward()
    assert weights.grad is not None
    assert bias.grad is not None
    assert max(float(weights.grad.abs().max()), float(bias.grad.abs().max())) < 1e-5


def test_separated_classes_are_found_and_random_labels_are_not() -> None:
    x, y = blobs(200, 4, 16, 6.0)
    metrics, protocol = probe_features(x, y)
    assert metrics["linear_acc1"] == metrics["knn_acc1"] == 1.0
    assert protocol["test_rows"] == 200
    assert protocol["folds"] == FOLDS
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(600, 8, generator=generator)
    labels = torch.randint(0, 4, (600,), generator=generator)
    metrics, _ = probe_features(noise, labels)
    error = metrics["standard_error"]
    assert error == pytest.approx(math.sqrt(metrics["linear_acc1"] * (1 - metrics["linear_acc1"]) / 600))
    assert abs(metrics["linear_acc1"] - 0.25) < 5 * error


def test_the_test_split_is_not_trained_on() -> None:
    x, y = blobs(100, 2, 4, 3.0)
    wrong = (x, 1 - y)
    metrics, protocol = probe_features(x, y, wrong)
    assert metrics["linear_acc1"] < 0.1
    assert protocol["folds"] == 0


def test_scaling_a_feature_does_not_change_the_linear_answers() -> None:
    x, y = blobs(150, 3, 6, 0.8)
    tested, _ = blobs(60, 3, 6, 0.8, seed=7)
    factors = torch.tensor([1e-3, 1.0, 50.0, 7.0, 0.2, 1e3])
    plain, _ = linear_probe(x, y, tested, 3)
    scaled, _ = linear_probe(x * factors, y, tested * factors, 3)
    assert int((plain != scaled).sum()) <= 1


def test_neighbours_vote_as_a_loop_says() -> None:
    x, y = blobs(90, 3, 5, 0.5)
    tested, _ = blobs(25, 3, 5, 0.5, seed=3)
    found = knn_probe(x, y, tested, 3)
    for row, answer in zip(tested, found, strict=True):
        cosines = [float(row @ other / (row.norm() * other.norm())) for other in x]
        near = sorted(range(len(x)), key=lambda i: -cosines[i])[:NEIGHBOURS]
        votes = [sum(math.exp(cosines[i] / 0.07) for i in near if int(y[i]) == c) for c in range(3)]
        assert int(answer) == votes.index(max(votes))


def test_folds_are_even_within_every_class() -> None:
    labels = torch.tensor([0] * 12 + [1] * 7 + [2] * 5)
    folds = folds_of(labels, FOLDS)
    for label in range(3):
        counts = torch.bincount(folds[labels == label], minlength=FOLDS)
        assert int(counts.max() - counts.min()) <= 1


def test_the_command_probes_a_run(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(0, 1, values(tiny_shards, tmp_path / "run", run__steps=2))
    generator = np.random.default_rng(0)
    for name, colour in (("red", (220, 30, 30)), ("blue", (30, 30, 220))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.clip(np.array(colour) + generator.integers(-20, 20, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "set" / name / f"{number}.png")
    assert main(["probe", str(tmp_path / "run"), str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert "linear probe, top-1    100.00%" in out
    assert "20 images, 2 classes, 32 features" in out


def test_a_split_is_fitted_on_train_and_tested_on_test(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for split, classes in (("train", "ab"), ("test", "ab")):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.png").write_bytes(image_bytes(0))
    tested, trained = open_probed(root)
    assert trained is not None
    assert (tested.split, trained.split) == ("test", "train")
    shutil.rmtree(root / "test" / "a")
    (root / "test" / "c").mkdir()
    (root / "test" / "c" / "0.png").write_bytes(image_bytes(0))
    with pytest.raises(DataError, match="different class folders"):
        open_probed(root)


def test_an_apple_gpu_gives_the_numbers_of_a_cpu(tmp_path: Path) -> None:
    labelled = labelled_csv(tmp_path / "labelled", 20, ["a", "b"])
    captioned = captioned_csv(tmp_path / "captioned", [[f"a picture {n}"] for n in range(8)])
    metal, cpu = MetalProjection(), Projection()
    cpu.encode_image_trunk = cpu.encode_image  # type: ignore[attr-defined]
    assert probe(metal, labelled)["metrics"] == probe(cpu, labelled)["metrics"]  # type: ignore[arg-type]
    assert zero_shot(metal, labelled)["metrics"] == zero_shot(cpu, labelled)["metrics"]
    assert retrieval(metal, captioned)["metrics"] == retrieval(cpu, captioned)["metrics"]
