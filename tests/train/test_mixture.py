"""Runs on mixtures: exact parts in every batch, before and after a kill, by one process or by several."""

from __future__ import annotations

import csv
import json
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipkit.config import load_config
from clipkit.data.loader import TrainStream
from clipkit.train import pretrain
from clipkit.types import Batch, ConfigError
from tests.conftest import Ranks, write_tiny_shards
from tests.data.makers import Members, write_tar
from tests.faults.killing import last_step, run_until_step
from tests.train.runs import columns, trace, values, weights

STEPS = 16


def journalled(rank: int, world: int, config: dict[str, Any], resume: str = "auto") -> dict[str, Any]:
    """Runs `pretrain` and writes step, keys and sums of pixels of its rows as they come, one line each."""
    batches = TrainStream.batches
    folder = Path(config["run"]["dir"])

    def spy(self: TrainStream, start: int, stop: int) -> Iterator[Batch]:
        with open(f"{folder}.rank{rank}of{world}", "a") as journal:
            for number, batch in enumerate(batches(self, start, stop), start):
                sums = batch.images["image"].sum((1, 2, 3)).tolist()
                rows = [
                    [*row] for row in zip(batch.keys, sums, batch.texts["text"].sum(1).tolist(), strict=True)
                ]
                journal.write(json.dumps([number, rows]) + "\n")
                journal.flush()
                yield batch

    TrainStream.batches = spy  # type: ignore[method-assign]
    return pretrain(config, resume=resume)


def journal(folder: Path, world: int = 1) -> dict[int, list[list[list[Any]]]]:
    """Step -> the rows of all ranks, once for every time the step was built."""
    found: dict[int, list[list[list[Any]]]] = {}
    files = [Path(f"{folder}.rank{rank}of{world}").read_text().splitlines() for rank in range(world)]
    for lines in zip(*files, strict=True):
        parts = [json.loads(line) for line in lines]
        assert len({number for number, _ in parts}) == 1
        found.setdefault(parts[0][0], []).append([row for _, rows in parts for row in rows])
    return found


def taken(data: Path, folder: Path, count: int, members: Callable[[dict[str, str], bytes], Members]) -> str:
    """Shards of the first pairs of a folder of real data, written by tarfile."""
    folder.mkdir()
    with zipfile.ZipFile(data / "images.zip") as images, open(data / "pairs.csv", encoding="utf-8") as table:
        rows = [row for row, _ in zip(csv.DictReader(table), range(count), strict=False)]
        samples = [members(row, images.read(row["filepath"])) for row in rows]
    for first in range(0, count, 50):
        write_tar(folder / f"{first // 50:03d}.tar", samples[first : first + 50])
    return str(folder)


def product(row: dict[str, str], image: bytes) -> Members:
    key = "p" + Path(row["filepath"]).stem
    fields = {"title": row["caption"], "attributes": row["attributes"]}
    return [(f"{key}.jpg", image), (f"{key}.json", json.dumps(fields).encode())]


def clipart(row: dict[str, str], image: bytes) -> Members:
    key = "c" + Path(row["filepath"]).stem
    return [(f"{key}.png", image), (f"{key}.txt", row["caption"].encode())]


def test_a_killed_run_on_two_real_sources_has_the_same_shares_and_keys(
    real_data: Path, tmp_path: Path
) -> None:
    """0.7 / 0.3, two caption fields in the first; killed in a step, continued by one process and by two."""
    fields = [{"field": "json.title", "weight": 3.0}, {"field": "json.attributes"}]
    sources = [
        {
            "shards": taken(real_data / "pretrain_products", tmp_path / "products", 130, product),
            "weight": 0.7,
            "captions": fields,
        },
        {
            "shards": taken(real_data / "pretrain_clipart", tmp_path / "clipart", 50, clipart),
            "weight": 0.3,
        },
    ]
    changes = {"data__train": sources, "data__batch_size": 20, "run__steps": STEPS, "data__workers": 1}
    # In the background the first one may be unfinished at the kill, and the run rightly begins again.
    changes["run__background_save"] = False

    def config(name: str) -> dict[str, Any]:
        return values(tmp_path, tmp_path / name, **changes)

    (whole,) = Ranks(1, journalled, config("straight")).values()
    straight = journal(tmp_path / "straight")
    assert sorted(straight) == list(range(STEPS))
    for (rows,) in straight.values():
        assert Counter(key[0] for key, *_ in rows) == {"p": 14, "c": 6}
    assert whole["counts"]["samples/products"] == 14 * STEPS
    assert whole["counts"]["samples/clipart"] == 6 * STEPS
    drawn = {name: n for name, n in whole["counts"].items() if name.startswith("captions/")}
    assert set(drawn) == {"captions/products/json.title", "captions/products/json.attributes"}
    assert sum(drawn.values()) == 14 * STEPS
    # 50 pictures came 96 times and no one of them a third time, while the products are in their second epoch.
    times = Counter(key for (rows,) in straight.values() for key, *_ in rows)
    assert {times[key] for key in times if key[0] == "c"} <= {1, 2}

    run_until_step(config("broken"), 1, random.Random(1).randrange(6, 12), random.Random(2))
    done = last_step(tmp_path / "broken" / "metrics.jsonl")
    assert 6 <= done < STEPS
    (continued,) = Ranks(1, journalled, config("broken")).values()
    assert continued["counts"] == whole["counts"]
    found = journal(tmp_path / "broken")
    assert sorted(found)[-1] == STEPS - 1
    assert sorted(found)[0] > 0, "it began after its checkpoint"
    assert {step: rows for step, (rows,) in found.items()} == {step: straight[step][0] for step in found}
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
    logged = columns(tmp_path / "broken")
    assert logged["samples/products"] == [14 * step for step in logged["step"]]
    assert logged["samples/clipart"] == [6 * step for step in logged["step"]]

    begun = str(tmp_path / "straight" / "checkpoints" / "step-00000015")
    Ranks(2, journalled, config("two"), begun).values()
    assert journal(tmp_path / "two", 2) == {15: straight[15]}


def mixed(folder: Path, run: Path, weight: float, **changes: Any) -> dict[str, Any]:
    sources = [
        {"shards": str(folder / "a"), "weight": weight, "name": "first"},
        {"shards": str(folder / "b"), "weight": 1 - weight},
    ]
    settings = {"data__train": sources, "data__batch_size": 8, "run__steps": 4, "run__checkpoint_every": 2}
    return values(folder, run, **{**settings, **changes})


def test_counts_go_on_when_the_weights_change(tmp_path: Path) -> None:
    write_tiny_shards(tmp_path / "a", 40)
    write_tiny_shards(tmp_path / "b", 24)
    run = tmp_path / "run"
    (first,) = Ranks(1, journalled, mixed(tmp_path, run, 0.75)).values()
    assert first["counts"] == {"samples/first": 24, "samples/b": 8}
    with pytest.raises(ConfigError, match=r"data\.train\.0\.weight: 0\.75 -> 0\.25"):
        pretrain(mixed(tmp_path, run, 0.25))
    half = str(run / "checkpoints" / "step-00000002")
    changed = mixed(tmp_path, tmp_path / "other", 0.25, run__resume_data="restart_epoch")
    (second,) = Ranks(1, journalled, changed, half).values()
    assert second["counts"] == {"samples/first": 12 + 4, "samples/b": 4 + 12}
    assert columns(tmp_path / "other")["samples/first"] == [14, 16]
    # An epoch of the mixture are the 64 samples of both.
    report = pretrain(mixed(tmp_path, tmp_path / "dry", 0.75), dry_run=True)
    assert report["samples_per_epoch"] == 64
    assert "source first: 40 samples, 75% of every batch (6 of 8), seen 0.6 times" in (report["summary"])
    assert "source b: 24 samples, 25% of every batch (2 of 8), seen 0.333 times" in (report["summary"])


def test_the_example_of_two_sources_is_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        """
model: {name: ViT-B-32}
objectives: [{name: clip}, {name: simclr, weight: 1.0}]
data:
  train:
    - shards: "s3://b/laion/{00000..49999}.tar"
      weight: 0.7
      captions: [{field: txt}, {field: json.recaption, weight: 3}]
    - {shards: "catalogue/", weight: 0.3}
  holdout: 5000
  batch_size: 32768
  workers: 8
optim: {lr: 5e-4, betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.2, clip_norm: 1.0, warmup: 5%}
run: {samples: 12.8e9, precision: bf16, seed: 0, checkpoint_every: 30min, evaluate_every: 5%}
"""
    )
    found = load_config(path)
    assert [source.weight for source in found.data.train] == [0.7, 0.3]
    assert load_config(path, ["data.train.1.name=shop"]).data.train[1].name == "shop"
    path.write_text(path.read_text().replace('{shards: "catalogue/", weight: 0.3}', "catalogue/"))
    assert [source.weight for source in load_config(path).data.train] == [0.7, 1.0]
    with pytest.raises(ConfigError, match="lazy does not go with several sources"):
        load_config(path, ["data.index=lazy"])
