"""Real sets, cut small: raw to shards that index and check find whole, or to a set the evaluation reads."""

from __future__ import annotations

import csv
import itertools
import shutil
import zipfile
from pathlib import Path

import pytest

from clipkit.cli.app import main
from tests.data.making.makers import samples, write_csv, write_zip

ROWS = 40


def cut(source: Path, folder: Path, table: str, rows: int = ROWS) -> dict[str, list[dict[str, str]]]:
    """Copies every n-th row of a table with its images; returns image -> its rows."""
    with (source / table).open(encoding="utf-8-sig", newline="") as stream:
        everything = list(csv.DictReader(stream))
    names = list(dict.fromkeys(row["filepath"] for row in everything))
    names = names[:: max(1, len(names) // rows)][:rows]
    kept = [row for row in everything if row["filepath"] in set(names)]
    folder.mkdir()
    write_csv(folder / table, list(kept[0]), [list(row.values()) for row in kept])
    with zipfile.ZipFile(source / "images.zip") as archive:
        write_zip(folder / "images.zip", {name: archive.read(name) for name in names})
    if (source / "classnames.txt").is_file():
        shutil.copyfile(source / "classnames.txt", folder / "classnames.txt")
    return {name: [row for row in kept if row["filepath"] == name] for name in names}


@pytest.mark.parametrize("name", ["pretrain_products", "pretrain_clipart", "pretrain_emoji_noto"])
def test_pairs_become_training_shards(real_data: Path, tmp_path: Path, name: str) -> None:
    rows = list(cut(real_data / name, tmp_path / name, "pairs.csv").values())
    out = tmp_path / "out"
    assert main(["data", "make-shards", str(tmp_path / name), "--out", str(out), "--workers", "1"]) == 0
    assert main(["index", str(out)]) == 0
    assert main(["data", "check-shards", str(out)]) == 0
    found = list(samples(out).values())
    assert [members["txt"].decode() for members in found] == [
        " ".join(row["caption"].split()) for (row,) in rows
    ]
    with zipfile.ZipFile(tmp_path / name / "images.zip") as archive:
        for members, ((row),) in zip(found, rows, strict=True):
            assert (members.get("jpg") or members["png"]) == archive.read(row["filepath"])


@pytest.mark.parametrize("name", ["ret_coco_free", "ret_products"])
def test_captions_become_retrieval_sets(real_data: Path, tmp_path: Path, name: str) -> None:
    from clipkit.evaluation.datasets import open_retrieval

    rows = cut(real_data / name, tmp_path / name, "captions.csv")
    out = tmp_path / "out"
    assert main(["data", "make-shards", str(tmp_path / name), "--to", "evaluation", "--out", str(out)]) == 0
    data = open_retrieval(out)
    assert list(data.captions) == [
        " ".join(row["caption"].split()) for row in itertools.chain(*rows.values())
    ]
    assert len(data.images) == len(rows)


@pytest.mark.parametrize("name", ["zs_product_type", "zs_caltech101", "zs_clothing", "zs_ucmerced"])
def test_labels_become_classification_sets(real_data: Path, tmp_path: Path, name: str) -> None:
    from clipkit.evaluation.datasets import open_classification

    rows = cut(real_data / name, tmp_path / name, "labels.csv")
    out = tmp_path / "out"
    assert main(["data", "make-shards", str(tmp_path / name), "--to", "evaluation", "--out", str(out)]) == 0
    data = open_classification(out)
    assert data.labels.tolist() == [int(row["label"]) for (row,) in rows.values()]
    assert data.names is not None
    assert list(data.names) == (real_data / name / "classnames.txt").read_text().splitlines()
    again = tmp_path / "train"
    assert main(["data", "make-shards", str(tmp_path / name), "--out", str(again)]) == 0
    assert [members["txt"].decode() for members in samples(again).values()] == [
        f"a photo of a {row['class_name']}" for (row,) in rows.values()
    ]
