"""Retrieval: metrics equal slow oracles and CLIP_benchmark's definition; every world size agrees."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clipkit.dist import World
from clipkit.evaluation import diagnostics, format_table
from clipkit.evaluation.retrieval import retrieval, retrieval_metrics
from clipkit.losses.geometry import spread
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.evaluation.encoders import Projection, small_pixels
from tests.evaluation.layouts import captioned_csv, image_bytes
from tests.oracles import hit_rates_by_topk, recall_by_counting, retrieval_ranks_by_sorting


def random_set(images: int, texts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns embeddings in which captions are near their image, and ragged owners."""
    generator = torch.Generator().manual_seed(seed)
    image_rows = torch.randn(images, 24, generator=generator)
    owners = torch.randint(0, images, (texts,), generator=generator)
    text_rows = image_rows[owners] + 1.5 * torch.randn(texts, 24, generator=generator)
    return functional.normalize(image_rows, dim=1), functional.normalize(text_rows, dim=1), owners


def test_metrics_equal_the_oracle_on_ragged_captions() -> None:
    images, texts, owners = random_set(30, 70)
    metrics, _ = retrieval_metrics(images, texts, owners)
    text_ranks, image_ranks = retrieval_ranks_by_sorting(images.tolist(), texts.tolist(), owners.tolist())
    assert None in image_ranks  # some image has no caption at all, and is a miss
    for k in (1, 5, 10):
        assert metrics[f"image_retrieval_recall@{k}"] == recall_by_counting(text_ranks, k)
        assert metrics[f"t2i_recall@{k}"] == recall_by_counting(text_ranks, k)
        assert metrics[f"text_retrieval_recall@{k}"] == recall_by_counting(image_ranks, k)
        assert metrics[f"i2t_recall@{k}"] == recall_by_counting(image_ranks, k)
    known = sorted(rank for rank in image_ranks if rank is not None)
    middle = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
    assert metrics["i2t_median_rank"] == middle
    assert metrics["i2t_mean_rank"] == pytest.approx(sum(known) / len(known), abs=1e-12)


def test_metrics_equal_the_hit_rates_of_clip_benchmark() -> None:
    images, texts, owners = random_set(200, 1000)
    metrics, ties = retrieval_metrics(images, texts, owners)
    assert ties["t2i"]["queries_with_ties"] == ties["i2t"]["queries_with_ties"] == 0
    for k in (1, 5, 10):
        image_hits, text_hits = hit_rates_by_topk(images, texts, owners, k)
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(image_hits, abs=1e-6)
        assert metrics[f"text_retrieval_recall@{k}"] == pytest.approx(text_hits, abs=1e-6)


def test_ties_count_against_the_model_and_the_optimistic_bound_is_reported() -> None:
    # Two images with one caption each; both captions are the same text, so each image sees a tie.
    images = torch.eye(2)
    texts = functional.normalize(torch.ones(2, 2), dim=1)
    metrics, ties = retrieval_metrics(images, texts, torch.tensor([0, 1]), recall_k=(1, 2))
    assert metrics["i2t_recall@1"] == 0
    assert metrics["i2t_recall@2"] == 1
    assert ties["i2t"] == {"queries_with_ties": 2, "optimistic": {"i2t_recall@1": 1.0, "i2t_recall@2": 1.0}}


def test_own_captions_do_not_compete_with_each_other() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    metrics, ties = retrieval_metrics(images, texts, torch.tensor([0, 0, 1]), recall_k=(1,))
    assert metrics["i2t_recall@1"] == metrics["t2i_recall@1"] == 1
    assert ties["i2t"]["queries_with_ties"] == 0


def test_recall_beyond_the_number_of_candidates_is_null() -> None:
    metrics, _ = retrieval_metrics(torch.eye(3), torch.eye(3), torch.arange(3), recall_k=(1, 3, 5))
    assert metrics["t2i_recall@3"] == 1
    assert metrics["t2i_recall@5"] is None


CAPTIONS = [
    [f"caption {i} of {j}" for j in range(i % 4)] + (["shared"] if i % 10 == 3 else []) for i in range(113)
]


def _folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    # An image is only known to a table through a caption; an empty one stands for "no caption".
    return captioned_csv(root, [texts or [""] for texts in CAPTIONS])


def test_command_reads_ragged_captions_and_counts_what_it_saw(tmp_path: Path) -> None:
    result = retrieval(Projection(), _folder(tmp_path), batch_size=16)
    total = sum(map(len, CAPTIONS))
    assert result["task"] == "zeroshot_retrieval"
    assert result["dataset"] == "set"
    assert result["counts"] == {
        "images": 113,
        "captions": total,
        "captions_per_image_min": 0,
        "captions_per_image_max": 4,
        "images_without_captions": sum(not texts for texts in CAPTIONS),
        "captions_of_several_images": sum("shared" in texts for texts in CAPTIONS),
        "empty_captions_left_out": sum(not texts for texts in CAPTIONS),
    }
    json.dumps(result, allow_nan=False)
    table = "\n".join(format_table(result))
    assert "R@10" in table
    assert f"{total:,} captions (0 to 4 per image)" in table


def test_batch_sizes_change_nothing_for_an_encoder_without_batch_effects(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    first, *others = (retrieval(Projection(), folder, batch_size=size)["metrics"] for size in (113, 7, 64))
    assert all(other == first for other in others)


def test_diagnostics_are_those_of_training(tmp_path: Path) -> None:
    class Warm(Projection):
        logit_scale = 14.25

    captions = [["one", "other"], ["two"], ["one"], ["three"]] + [[f"no {n}"] for n in range(4)]
    folder = captioned_csv(tmp_path / "set", captions)
    encoder = Warm()
    found = retrieval(encoder, folder)["diagnostics"]
    image = encoder.encode_image(
        torch.stack([small_pixels(Image.open(io.BytesIO(image_bytes(n)))) for n in range(8)])
    )
    text = encoder.encode_text(encoder.tokenize([texts[0] for texts in captions]))
    for name, rows in (("image", image), ("text", text)):
        assert found[f"effective_rank_{name}"] == pytest.approx(diagnostics.effective_rank(rows), rel=1e-4)
        assert found[f"spread_{name}"] == pytest.approx(float(spread(rows)), rel=1e-4)
    assert found["alignment"] == pytest.approx(diagnostics.describe_pairs(image, text)["alignment"], rel=1e-4)
    assert found["duplicate_captions"] == 2 / 8
    assert found["logit_scale"] == 14.25
    assert found["similarity"].keys() == {"edges", "positive", "negative"}
    assert sum(found["similarity"]["positive"]) == pytest.approx(1)
    assert "logit_scale" not in retrieval(Projection(), folder)["diagnostics"]


def _lacking_on_rank(rank: int, size: int, folder: Path) -> str:
    # Only the second machine lacks the table.
    data = folder if rank == 0 else folder / "nowhere"
    with pytest.raises(ConfigError) as caught:
        retrieval(Projection(), data, world=World(rank, size, rank))
    return caught.value.cause


def test_a_set_that_one_machine_lacks_stops_all_ranks(
    tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    causes = run_ranks(2, _lacking_on_rank, _folder(tmp_path))
    assert causes[0] == causes[1]
    assert "nowhere" in causes[0]


def _towers_on_rank(rank: int, size: int, folder: Path, model_cfg: dict[str, Any]) -> dict[str, Any]:
    from clipkit.data.views import ImageView
    from clipkit.models import Model, build

    torch.manual_seed(0)
    towers = build(model_cfg)
    model = Model(towers, ImageView(size=towers.image_size, train=False), device="cpu", precision="bf16")
    return retrieval(model, folder, batch_size=16, world=World(rank, size, rank))


def test_real_towers_give_identical_results_on_two_ranks(
    tmp_path: Path, run_ranks: Callable[..., list[Any]], tiny_model_cfg: dict[str, Any]
) -> None:
    folder = _folder(tmp_path)
    alone = _towers_on_rank(0, 1, folder, tiny_model_cfg)
    assert alone["protocol"]["precision"] == "bf16"
    assert run_ranks(2, _towers_on_rank, folder, tiny_model_cfg) == [alone, alone]


def _error_on_rank(rank: int, size: int, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        retrieval(Projection(), folder, batch_size=4, world=World(rank, size, rank))
    return caught.value.cause


def test_a_bad_image_of_one_rank_stops_all_ranks(tmp_path: Path, run_ranks: Callable[..., list[Any]]) -> None:
    root = captioned_csv(tmp_path / "set", [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]], zipped=False)
    (root / "images/5.png").write_bytes(image_bytes(5)[:60])
    causes = run_ranks(2, _error_on_rank, root)
    assert causes[0] == causes[1]
    assert "images/5.png" in causes[0]


class Broken(Projection):
    """An encoder that returns what a diverged or collapsed model does."""

    def __init__(self, side: str, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.side, self.rows = side, rows

    def encode_image(self, images: Tensor) -> Tensor:
        """Returns image rows, broken if asked for."""
        rows = super().encode_image(images)
        return self.rows(rows) if self.side == "image" else rows

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns text rows, broken if asked for."""
        rows = super().encode_text(tokens)
        return self.rows(rows) if self.side == "text" else rows


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize(
    ("rows", "word"),
    [
        (lambda x: x * torch.nan, "not finite"),
        (lambda x: x * torch.inf, "not finite"),
        (torch.zeros_like, "zero vectors"),
        (lambda x: x[:1].expand_as(x) * 0 + 1.0, "collapsed"),
        (lambda x: functional.normalize(1 + 1e-7 * x, dim=1), "collapsed"),
    ],
)
def test_nan_and_collapsed_embeddings_are_errors(
    tmp_path: Path, side: str, rows: Callable[[Tensor], Tensor], word: str
) -> None:
    folder = captioned_csv(tmp_path / "set", [["one"], ["two"], ["three"]])
    with pytest.raises(ClipkitError, match=word) as caught:
        retrieval(Broken(side, rows), folder)
    assert caught.value.exit_code == 1
    assert side in caught.value.cause
    assert "\n" not in caught.value.cause + caught.value.cure


def test_one_image_is_not_called_collapsed(tmp_path: Path) -> None:
    folder = captioned_csv(tmp_path / "set", [["one", "two"]])
    assert retrieval(Projection(), folder)["metrics"]["t2i_recall@1"] == 1


def test_decoding_processes_and_random_state(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    state = torch.get_rng_state()
    alone = retrieval(Projection(), folder, batch_size=16)
    helped = retrieval(Projection(), folder, batch_size=16, workers=2)
    assert alone == helped
    assert torch.equal(state, torch.get_rng_state())
