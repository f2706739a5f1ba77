"""Scores of training samples by a model: those of a slow loop, and NaN for what is unusable."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from clipkit.cli.app import main
from clipkit.data.engine import Engine
from clipkit.data.sample import decode_image
from clipkit.evaluation.scoring import Scorer
from tests.data.makers import Members, png, write_tar
from tests.evaluation.encoders import Projection


def text(number: int) -> str:
    return f"picture number {number}"


def samples(count: int) -> list[Members]:
    return [[(f"{n:04d}.png", png(n, 12)), (f"{n:04d}.txt", text(n).encode())] for n in range(count)]


def expected(count: int) -> list[float]:
    model, scores = Projection(), []
    for number in range(count):
        image = model.encode_image(model.preprocess(decode_image(png(number, 12)))[None])
        caption = model.encode_text(model.tokenize([text(number)]))
        scores.append(float((image.double() * caption.double()).sum()))
    return scores


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 1), (64, 1), (3, 2)])
def test_scores_are_the_cosines_of_image_and_caption(tmp_path: Path, batch_size: int, workers: int) -> None:
    shard = write_tar(tmp_path / "0.tar", samples(10))
    rows = Scorer(Projection(), "txt", batch_size, Engine(workers)).scores(str(shard))["samples"]
    assert rows["key"].tolist() == [f"{n:04d}".encode() for n in range(10)]
    np.testing.assert_allclose(rows["score"], expected(10), atol=1e-6)


def test_unusable_samples_have_no_score_and_no_vector(tmp_path: Path) -> None:
    mixed = samples(4)
    mixed[1] = [("0001.png", b"no image"), mixed[1][1]]
    mixed[2] = [mixed[2][0], ("0002.txt", b"")]
    shard = write_tar(tmp_path / "0.tar", mixed)
    scorer = Scorer(Projection(), "txt", 3)
    assert np.isnan(scorer.scores(str(shard))["samples"]["score"]).tolist() == [False, True, True, False]
    vectors = scorer.vectors(str(shard))["vectors"]
    assert np.isnan(vectors).any(axis=1).tolist() == [False, True, False, False]
    np.testing.assert_allclose(np.linalg.norm(vectors[[0, 2, 3]], axis=1), 1, atol=1e-6)


def test_the_commands_take_scores_and_embeddings_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("usearch")
    used = []

    def scorer(model: str, *rest: object) -> Scorer:
        used.append(model)
        return Scorer(Projection(), "txt", 4)

    for job in ("filter", "dedup"):
        # By name: the package holds the functions of the same names.
        monkeypatch.setattr(sys.modules[f"clipkit.cli.data.{job}"], "scorer", scorer)
    (tmp_path / "pool").mkdir()
    for shard in range(3):
        write_tar(tmp_path / "pool" / f"{shard}.tar", samples(30)[10 * shard : 10 * shard + 10])
    given = ["data", "filter", str(tmp_path / "pool"), "--out", str(tmp_path / "kept")]
    assert main([*given, "--clip-score", "runs/mine", "--top", "0.3"]) == 0
    scores = np.array(expected(30))
    lowest = np.sort(scores)[::-1][9]
    lines = (tmp_path / "kept" / "dropped.jsonl").read_text().splitlines()
    assert len(lines) == int((scores < lowest).sum())
    assert used == ["runs/mine"], "the model is loaded once"

    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "x.png").write_bytes(png(17, 12))
    given = ["data", "dedup", str(tmp_path / "pool"), "--keys-out", str(tmp_path / "k.csv")]
    more = ["--embeddings", "runs/mine", "--cosine", "0.999", "--against", str(tmp_path / "set")]
    assert main([*given, *more, "--by", "embedding"]) == 0
    kept = (tmp_path / "k.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1] for line in kept] == [f"{n:04d}" for n in range(30) if n != 17]
