"""Zero-shot: metrics equal slow oracles; class names that do not fit are errors; every world size agrees."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from clipkit.dist import World
from clipkit.evaluation import format_table
from clipkit.evaluation.zero_shot import class_embeddings, zero_shot, zero_shot_metrics
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.evaluation.encoders import Projection
from tests.evaluation.layouts import image_bytes, labelled_csv
from tests.oracles import balanced_accuracy, class_ranks_by_sorting, ensembled_classes, recall_by_counting

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def test_metrics_equal_the_oracle_with_absent_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    images = functional.normalize(torch.randn(150, 8, generator=generator), dim=1)
    classes = functional.normalize(torch.randn(9, 8, generator=generator), dim=1)
    labels = torch.randint(0, 6, (150,), generator=generator)  # classes 6, 7, 8 do not occur
    metrics, samples, correct = zero_shot_metrics(images, classes, labels)
    ranks = class_ranks_by_sorting(images.tolist(), classes.tolist(), labels.tolist())
    assert metrics["acc1"] == recall_by_counting(ranks, 1)
    assert metrics["acc5"] == recall_by_counting(ranks, 5)
    assert metrics["mean_per_class_recall"] == pytest.approx(
        balanced_accuracy(ranks, labels.tolist()), abs=1e-12
    )
    assert samples.tolist() == torch.bincount(labels, minlength=9).tolist()
    assert int(correct.sum()) == sum(rank == 1 for rank in ranks)


def test_acc5_of_three_classes_is_null_in_valid_json(tmp_path: Path) -> None:
    result = zero_shot(Projection(), labelled_csv(tmp_path / "set", 9, NAMES[:3]))
    assert result["metrics"]["acc5"] is None
    assert '"acc5": null' in json.dumps(result, allow_nan=False)
    assert "--" in "\n".join(format_table(result))


def test_template_ensembling_normalises_then_averages_then_normalises() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(7, 5, generator=generator) * torch.tensor([1, 10, 0.1, 1, 3, 5, 0.2])[:, None]
    index, num_prompts = torch.tensor([0, 1, 2, 3, 3, 4, 5, 6, 0]), [3, 2, 4]
    found = class_embeddings(rows, index, num_prompts)
    wanted = ensembled_classes([rows[part].tolist() for part in index.split(num_prompts)])
    assert torch.allclose(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-14)


def test_classifier_equals_open_clips_own(tiny_model_cfg: dict[str, Any]) -> None:
    open_clip = pytest.importorskip("open_clip")
    from clipkit.evaluation.prompts import simple_templates

    encoder = Projection()

    class Peer:
        def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
            return encoder.encode_text(tokens)

    peer = open_clip.build_zero_shot_classifier(
        Peer(), encoder.tokenize, NAMES, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    prompts = [template.replace("{c}", name) for name in NAMES for template in simple_templates()]
    rows = encoder.encode_text(encoder.tokenize(prompts))
    ours = class_embeddings(rows, torch.arange(len(prompts)), [7] * len(NAMES))
    assert torch.allclose(ours.float(), peer.T, atol=1e-6)


def _on_rank(rank: int, size: int, folder: Path) -> tuple[dict[str, Any], int, int]:
    encoder = Projection(position_noise=0.3)
    world = World(rank, size, rank)
    result = zero_shot(encoder, folder, templates=["a {}", "the {c}", "{}"], batch_size=16, world=world)
    return result, len(encoder.image_shapes), len(encoder.text_shapes)


def test_results_are_identical_for_every_number_of_ranks(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    folder = labelled_csv(tmp_path / "set", 113, NAMES)
    alone, images, _ = _on_rank(0, 1, folder)
    assert images == 8
    assert alone["counts"]["samples"] == 113
    for size in (2, 3):
        ranks = run_ranks(size, _on_rank, folder)
        assert [result for result, *_ in ranks] == [alone] * size
        # 113 images are 8 batches of 16, 21 prompts are 2; every rank runs equally many.
        assert {(images, texts) for _, images, texts in ranks} == {(-(-8 // size), -(-2 // size))}


def test_result_says_what_was_measured(tmp_path: Path) -> None:
    result = zero_shot(Projection(), labelled_csv(tmp_path / "set", 20, NAMES), templates=["a {}", "the {c}"])
    assert result["counts"] == {
        "samples": 20,
        "classes": 7,
        "absent_classes": 0,
        "templates": 2,
        "prompts": 14,
    }
    assert result["protocol"]["precision"] == "fp32"
    assert result["protocol"]["image_size"] == [6, 8]
    assert result["protocol"]["example_prompt"] == "a ant"
    assert {"python", "torch", "open_clip", "clipkit"} <= set(result["versions"])
    assert sum(entry["samples"] for entry in result["per_class"]) == 20
    assert [entry["name"] for entry in result["per_class"]] == list(NAMES)


def _file(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("names", [NAMES[:-1], (*NAMES, "hen")])
def test_class_name_file_of_the_wrong_length_is_a_data_error(tmp_path: Path, names: Sequence[str]) -> None:
    folder = labelled_csv(tmp_path / "set", 20, NAMES)
    with pytest.raises(DataError) as caught:
        zero_shot(Projection(), folder, classnames=_file(tmp_path / "names.txt", names))
    assert f"{len(names)} class names" in caught.value.cause
    assert "7 classes" in caught.value.cause
    assert "\n" not in caught.value.cause + caught.value.cure
    assert caught.value.exit_code == 3


def test_class_name_file_in_another_order_is_a_data_error(tmp_path: Path) -> None:
    folder = labelled_csv(tmp_path / "set", 20, NAMES)
    swapped = ("ant", "cat", "bee", "dog", "eel", "fox", "gnu")
    with pytest.raises(DataError, match="order does not match"):
        zero_shot(Projection(), folder, classnames=_file(tmp_path / "names.txt", swapped))
    reworded = ("an ant", "Bee", "kitten", "dog", "eel", "fox", "gnu")
    assert zero_shot(Projection(), folder, classnames=list(reworded))["per_class"][2]["name"] == "kitten"


def test_missing_class_name_and_template_files_are_usage_errors(tmp_path: Path) -> None:
    folder = labelled_csv(tmp_path / "set", 20, NAMES)
    with pytest.raises(ConfigError, match=r"nowhere\.txt"):
        zero_shot(Projection(), folder, classnames=tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"nowhere\.txt"):
        zero_shot(Projection(), folder, templates=tmp_path / "nowhere.txt")


def test_corrupt_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = labelled_csv(tmp_path / "set", 6, NAMES[:3], zipped=False)
    (folder / "images/4.png").write_bytes(image_bytes(4)[:50])
    with pytest.raises(DataError, match=r"images/4\.png"):
        zero_shot(Projection(), folder)


def test_class_names_that_all_embed_alike_are_a_collapsed_model(tmp_path: Path) -> None:
    folder = labelled_csv(tmp_path / "set", 6, NAMES[:3])

    class OneClass(Projection):
        def tokenize(self, captions: list[str]) -> torch.Tensor:
            return super().tokenize(["same"] * len(captions))

    with pytest.raises(ClipkitError, match="collapsed"):
        zero_shot(OneClass(), folder)


def test_progress_counts_images_and_texts(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = labelled_csv(tmp_path / "set", 20, NAMES)
    zero_shot(Projection(), folder, batch_size=8, progress=lambda *values: seen.append(values))
    assert seen == [("texts", 7, 7), ("images", 8, 20), ("images", 16, 20), ("images", 20, 20)]


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one class"):
        zero_shot(Projection(), labelled_csv(tmp_path / "set", 4, NAMES[:1]))
