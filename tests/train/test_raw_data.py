"""Training on pairs as they lie on the disk: alone and in a mixture, on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipkit.train import pretrain
from clipkit.types import ConfigError
from tests.data.test_raw import write_table
from tests.train.runs import columns, train, values, weights


def source(table: Path, **more: Any) -> dict[str, Any]:
    titles = [f"title of {number}" for number in range(40)]
    write_table(table.parent, rows=40, name=table.name, title=titles)
    return {"shards": str(table), "captions": [{"field": "txt"}, {"field": "title", "weight": 3}], **more}


def test_a_table_in_a_mixture_on_two_ranks_gives_the_run_of_one(
    tmp_path: Path, tiny_shards: Path, run_ranks: Any
) -> None:
    table = tmp_path / "own" / "pairs.csv"
    train_on = [source(table), {"shards": str(tiny_shards)}]
    found = {}
    for world in (1, 2):
        config = values(tiny_shards, tmp_path / f"run-{world}", data__train=train_on, run__steps=3)
        run_ranks(world, train, config)
        found[world] = columns(tmp_path / f"run-{world}")
    assert len(list((table.parent / ".clipkit-cache").iterdir())) == 1
    counted = {name: series[-1] for name, series in found[1].items() if "own" in name or "title" in name}
    assert counted, list(found[1])
    assert counted == {name: found[2][name][-1] for name in counted}
    assert found[1]["loss"] == pytest.approx(found[2]["loss"], rel=1e-5)


def test_the_run_of_a_table_is_the_run_of_its_shards(tmp_path: Path) -> None:
    from clipkit.data.raw import Raw, Rules, made_shards

    table = write_table(tmp_path, rows=40)
    made = made_shards(Raw(table), Rules(), print, lambda *_: None)
    for name, shards in (("raw", table), ("shards", made.folder)):
        pretrain(values(shards, tmp_path / name, run__steps=3))
    assert weights(tmp_path / "raw") == weights(tmp_path / "shards")


def test_image_root_beside_shards_is_refused_before_a_model_is_built(
    tmp_path: Path, tiny_shards: Path
) -> None:
    config = values(
        tiny_shards, tmp_path / "run", data__train=[{"shards": str(tiny_shards), "image_root": "x"}]
    )
    config["model"] = {"name": "ViT-H-14"}
    with pytest.raises(ConfigError, match="image_root or image_key beside shards"):
        pretrain(config)
