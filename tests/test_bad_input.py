"""What goes wrong for users: one line of cause, one of cure, the documented exit code, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from clipkit.cli import main
from clipkit.train import pretrain
from tests.commands import fails, write
from tests.conftest import write_tiny_shards
from tests.train.runs import values


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_tiny_shards(tmp_path / "shards", samples=24, per_shard=12)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> dict[str, Any]:
    return values(shards, tmp_path / "run", run__steps=2)


def test_a_corrupt_image_with_a_name_that_is_not_utf8(
    config: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    name = os.fsdecode(b"caf\xe9")
    with tarfile.open(shards / "00000.tar") as source, tarfile.open(shards / "new.tar", "w") as target:
        for member in source:
            content = source.extractfile(member)
            if member.name == "000003.png":
                member.size, content = 0, None
            member.name = member.name.replace("000003", name)
            target.addfile(member, content)
    (shards / "new.tar").replace(shards / "00000.tar")
    assert main(["pretrain", str(write(config, tmp_path / "c.yaml")), "data.max_reject_fraction=0.1"]) == 0
    (line,) = (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "caf\\udce9"


def test_a_batch_without_negatives(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], tmp_path: Path
) -> None:
    config["data"]["batch_size"] = 1
    path = write(config, tmp_path / "c.yaml")
    fails(capsys, 2, "data.batch_size is 1", "pretrain", path)
    fails(capsys, 2, "data.batch_size is 1", "configs", "validate", path)


def test_missing_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(capsys, 2, "none.yaml", "pretrain", tmp_path / "none.yaml")


@pytest.fixture
def exported(config: dict[str, Any], tmp_path: Path) -> Path:
    return Path(pretrain(config)["export"])


def test_class_names_of_the_wrong_length(
    capsys: pytest.CaptureFixture[str], exported: Path, shards: Path, tmp_path: Path
) -> None:
    data = tmp_path / "labels"
    data.mkdir()
    with tarfile.open(shards / "00000.tar") as tar:
        tar.extractall(data / "images", filter="data")
    rows = [f"images/{number:06d}.png,{number % 3}" for number in range(12)]
    (data / "labels.csv").write_text("\n".join(["filepath,label", *rows]) + "\n")
    names = data / "two.txt"
    names.write_text("red\ngreen\n")
    assert fails(capsys, 3, "2", "zeroshot", exported, data, "--classnames", names)


def test_model_or_data_that_is_not_there(
    capsys: pytest.CaptureFixture[str], exported: Path, tmp_path: Path
) -> None:
    fails(capsys, 2, "nowhere", "zeroshot", tmp_path / "nowhere", tmp_path)
    fails(capsys, 2, "nowhere", "retrieval", exported, tmp_path / "nowhere")
    shutil.rmtree(exported)
    fails(capsys, 2, "export", "export", exported, tmp_path / "out")
