"""`data.holdout` in a run: evaluated like a set of its own, by any number of ranks, and never changed."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

import clipkit
from clipkit.config import make_config
from clipkit.data.holdout import key_hash
from clipkit.train import pretrain
from clipkit.types import ConfigError, DataError
from tests.conftest import Ranks
from tests.data.makers import png, write_shards
from tests.train.runs import train, values
from tests.train.test_evaluate import evaluations

HELD = 21


def config_of(shards: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {"run__steps": 6, "run__weight_ema": False, "run__evaluate_every": 3, "data__holdout": HELD}
    return values(shards, folder, **(settings | changes))


def held_table(shards: Path, folder: Path) -> Path:
    """captions.csv of the pairs with the smallest hashes, taken out of the tars by tarfile."""
    members: dict[str, bytes] = {}
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                members[member.name] = content.read()
    keys = sorted({name.partition(".")[0] for name in members}, key=key_hash)[:HELD]
    (folder / "images").mkdir(parents=True)
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["filepath", "caption"])
        for key in sorted(keys):
            (folder / "images" / f"{key}.png").write_bytes(members[f"{key}.png"])
            writer.writerow([f"images/{key}.png", members[f"{key}.txt"].decode()])
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_the_numbers_are_those_of_a_set_of_the_same_pairs(
    tiny_shards: Path, tmp_path: Path, world: int, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_shards, tmp_path / "run")
    (report, *_) = Ranks(world, train, config).values()
    found = evaluations(tmp_path / "run")
    assert [step for step, _ in found] == [3, 6]
    assert report["metrics"] == found[-1][1]
    table = held_table(tiny_shards, tmp_path / "held")
    expected = clipkit.retrieval(clipkit.load(tmp_path / "run" / "export"), table)
    assert expected["counts"]["images"] == HELD
    assert found[-1][1]["holdout"] == pytest.approx(expected["metrics"])
    said = capfd.readouterr().err
    assert f"holdout: {HELD} pairs with {HELD} captions" in said
    assert f"75 samples ({HELD} more are held out), 6 steps per epoch" in said
    # Another hold-out would train on pairs that were evaluated, or evaluate pairs that were trained on.
    for other in (None, 20, "20%"):
        with pytest.raises(ConfigError, match=r"data\.holdout"):
            pretrain(config_of(tiny_shards, tmp_path / "run", data__holdout=other))
        changed = config_of(tiny_shards, tmp_path / "run", data__holdout=other)
        changed["run"]["resume_data"] = "restart_epoch"
        with pytest.raises(ConfigError, match=r"data\.holdout"):
            pretrain(changed)


def test_a_share_averaged_weights_and_epochs(tiny_shards: Path, tmp_path: Path) -> None:
    changes = {"data__holdout": "20%", "run__weight_ema": 0.5, "run__evaluate_every": "1epoch"}
    report = pretrain(config_of(tiny_shards, tmp_path / "run", run__steps=14, **changes))
    assert set(report["metrics"]) == {"holdout", "holdout@ema"}
    held = sum(key_hash(f"{number:06d}") < 0.2 * 2**64 for number in range(96))
    epoch = (96 - held) // 12
    assert [step for step, _ in evaluations(tmp_path / "run")] == [epoch, 2 * epoch, 14]
    assert json.loads(json.dumps(report["metrics"])) == report["metrics"]


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0, "expected a number of pairs or a share"),
        (-3, "expected"),
        (0.01, "expected"),
        (True, "expected"),
        ("500", "expected"),
        ("0%", "above 0"),
        ("60%", "more than half"),
        ("10min", "expected"),
        ([5], "expected"),
    ],
)
def test_what_is_no_hold_out(tmp_path: Path, value: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make_config(config_of(tmp_path, tmp_path / "run", data__holdout=value))


def test_what_does_not_go_with_a_hold_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="index: lazy"):
        make_config(config_of(tmp_path, tmp_path / "run", data__index="lazy"))
    named = [{"task": "retrieval", "data": "set", "name": "holdout"}]
    with pytest.raises(ConfigError, match="called holdout"):
        make_config(config_of(tmp_path, tmp_path / "run", run__evaluate=named))
    assert make_config(config_of(tmp_path, tmp_path / "run", data__holdout=5e3)).data.holdout == 5000


def test_a_hold_out_without_a_usable_pair_is_an_error(tmp_path: Path) -> None:
    held = sorted(range(40), key=lambda number: key_hash(f"{number:06d}"))[:5]
    bad = {number: [(f"{number:06d}.png", png(number))] for number in held}
    with pytest.raises(DataError, match="none of the 5 held-out pairs"):
        pretrain(config_of(write_shards(tmp_path / "set", [40], bad), tmp_path / "run", data__holdout=5))
