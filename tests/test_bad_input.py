"""What goes wrong for users: one line of cause, one of cure, the documented exit code, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit.cli import main
from clipkit.train import pretrain
from tests.conftest import write_tiny_shards
from tests.train.runs import values
from tests.train.test_pretrain import spoil


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_tiny_shards(tmp_path / "shards", samples=24, per_shard=12)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> dict[str, Any]:
    return values(shards, tmp_path / "run", run__steps=2)


def fails(capsys: pytest.CaptureFixture[str], code: int, cause: str, *arguments: str | Path) -> str:
    """Runs a command, asserts exit code and form of the message, returns the cure."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "  cure:"))]
    assert len(errors) == 2, errors
    assert cause in errors[0]
    assert "Traceback" not in "".join(errors)
    return errors[1].removeprefix("  cure: ")


def write(config: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def test_missing_shard(capsys: pytest.CaptureFixture[str], config: dict[str, Any], tmp_path: Path) -> None:
    config["data"]["train"] = str(tmp_path / "shards" / "{00000..00004}.tar")
    assert fails(capsys, 3, "00002.tar", "pretrain", write(config, tmp_path / "c.yaml"))
    assert not (tmp_path / "run" / "checkpoints").exists() or not any(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


def test_truncated_tar(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    damaged = shards / "00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:9000])
    assert fails(capsys, 3, "00001.tar", "pretrain", write(config, tmp_path / "c.yaml"))
    assert fails(capsys, 3, "00001.tar", "index", shards)


def test_a_corrupt_image_is_counted_and_replaced(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    config["data"]["train"] = str(spoil(shards, tmp_path / "spoiled", {"000003"}))
    assert main(["pretrain", str(write(config, tmp_path / "c.yaml")), "data.max_reject_fraction=0.1"]) == 0
    (line,) = (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "000003"


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


def test_a_missing_caption_stops_a_run_that_allows_none(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    with tarfile.open(shards / "00000.tar") as source, tarfile.open(shards / "new.tar", "w") as target:
        for member in source:
            if member.name != "000005.txt":
                target.addfile(member, source.extractfile(member))
    (shards / "new.tar").replace(shards / "00000.tar")
    config["data"]["max_reject_fraction"] = 0.0
    assert fails(capsys, 3, "caption", "pretrain", write(config, tmp_path / "c.yaml"))
    assert '"000005"' in (tmp_path / "run" / "rejects.jsonl").read_text()


def test_unknown_key_names_the_nearest(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], tmp_path: Path
) -> None:
    config["optim"]["learning_rte"] = config["optim"].pop("lr")
    config["optim"]["weight_decai"] = 0.1
    capsys.readouterr()
    assert main(["pretrain", str(write(config, tmp_path / "c.yaml"))]) == 2
    printed = capsys.readouterr().err
    assert "weight_decay" in printed
    assert "learning_rte" in printed


def test_wrong_type(capsys: pytest.CaptureFixture[str], config: dict[str, Any], tmp_path: Path) -> None:
    config["data"]["batch_size"] = "many"
    fails(capsys, 2, "data.batch_size", "pretrain", write(config, tmp_path / "c.yaml"))


def test_a_batch_without_negatives(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], tmp_path: Path
) -> None:
    config["data"]["batch_size"] = 1
    path = write(config, tmp_path / "c.yaml")
    fails(capsys, 2, "data.batch_size is 1", "pretrain", path)
    fails(capsys, 2, "data.batch_size is 1", "configs", "validate", path)


def test_missing_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fails(capsys, 2, "none.yaml", "pretrain", tmp_path / "none.yaml")


def test_unreadable_checkpoint(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], tmp_path: Path
) -> None:
    pretrain(config)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    model = checkpoint / "model.safetensors"
    kept = model.read_bytes()
    model.write_bytes(kept[: len(kept) // 2])
    path = write(config, tmp_path / "c.yaml")
    assert fails(capsys, 1, "model.safetensors", "pretrain", path, "--resume", checkpoint)
    # Nothing was written over: with the bytes back, the run is as complete as before.
    model.write_bytes(kept)
    assert main(["pretrain", str(path)]) == 0


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
