"""What a user meets around the loop: refusals, rejects, signals, evaluation, the dry run."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clipkit.cli.training import _rehearsal as rehearsal_table
from clipkit.config import make_config
from clipkit.evaluation.probe import probe
from clipkit.evaluation.retrieval import retrieval
from clipkit.export import load
from clipkit.train import pretrain
from clipkit.train.setup import build_towers, declare, seed_everything, shortened
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.conftest import COLOURS, Ranks
from tests.train.runs import trace, train, values, weights


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def spoil(shards: Path, folder: Path, keys: set[str]) -> Path:
    """Copies shards, with the images of `keys` replaced by bytes that are no image."""
    folder.mkdir()
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as source, tarfile.open(folder / path.name, "w") as target:
            for member in source:
                stream = source.extractfile(member)
                assert stream is not None
                content = stream.read()
                stem, extension = member.name.split(".")
                if stem in keys and extension == "png":
                    content = b"\x89PNG\r\n\x1a\n" + b"spoiled" * 9
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
    return folder


def test_a_dry_run_reports_costs_and_writes_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    report = pretrain(values(tiny_shards, tmp_path / "run", run__weight_ema=True), dry_run=True)
    assert not (tmp_path / "run").exists()
    assert report["steps"] == 24
    assert report["samples_per_epoch"] == 96
    assert report["samples_per_s"] > 0
    assert report["seconds_left"] == pytest.approx(24 * 12 / report["samples_per_s"])
    # Weights, averaged weights and two moments of each, in fp32.
    assert report["checkpoint_bytes"] == pytest.approx(4 * 4 * report["parameters"], rel=0.05)
    assert report["world_sizes"] == [1, 2, 3, 4, 6, 12]
    assert "deterministic_slowdown" not in report


def test_a_dry_run_says_what_deterministic_kernels_cost(tiny_shards: Path, tmp_path: Path) -> None:
    try:
        report = pretrain(values(tiny_shards, tmp_path / "run", run__deterministic=True), dry_run=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0.05 < report["deterministic_slowdown"] < 20
    assert "x the time of a step" in "\n".join(rehearsal_table(report))


def test_another_configuration_is_refused_with_the_differing_keys(tiny_shards: Path, tmp_path: Path) -> None:
    pretrain(values(tiny_shards, tmp_path / "run", run__steps=4))
    with pytest.raises(ConfigError, match=r"optim\.lr.*run\.seed") as caught:
        pretrain(values(tiny_shards, tmp_path / "run", run__steps=4, optim__lr=0.5, run__seed=9))
    assert "run.dir" in caught.value.cure
    with pytest.raises(ConfigError, match="already holds a checkpoint"):
        pretrain(values(tiny_shards, tmp_path / "run", run__steps=4), resume="never")


def test_values_that_do_not_change_the_result_may_change(tiny_shards: Path, tmp_path: Path) -> None:
    pretrain(values(tiny_shards, tmp_path / "run", run__steps=4))
    report = pretrain(values(tiny_shards, tmp_path / "run", run__steps=4, data__workers=1, run__log_every=3))
    assert report["steps"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__precision": "fp16"}, "silently train in fp32"),
        ({"run__world_size": 2}, "asks for 2 processes, 1 are running"),
        ({"data__train": "/no/such/folder/{000..003}.tar"}, "/no/such/folder"),
        ({"data__batch_size": 97}, "97"),
    ],
)
def test_what_cannot_run_is_refused(
    tiny_shards: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ClipkitError, match=message) as caught:
        pretrain(values(tiny_shards, tmp_path / "run", **changes))
    assert caught.value.exit_code in (2, 3)
    assert caught.value.cure


def test_bad_samples_are_replaced_counted_and_named(tiny_shards: Path, tmp_path: Path) -> None:
    bad = {"000007", "000050"}
    shards = spoil(tiny_shards, tmp_path / "shards", bad)
    config = values(shards, tmp_path / "run", run__steps=8, data__max_reject_fraction=0.05)
    assert pretrain(config)["samples"] == 96
    named = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["key"] for reject in named} == bad
    assert len(named) == 2, "one epoch meets each bad sample once"
    assert all(reject["reason"] and reject["substitute"] not in bad for reject in named)


def test_too_many_bad_samples_stop_the_run(tiny_shards: Path, tmp_path: Path) -> None:
    shards = spoil(tiny_shards, tmp_path / "shards", {f"{number:06d}" for number in range(0, 96, 8)})
    with pytest.raises(DataError, match="12") as caught:
        pretrain(values(shards, tmp_path / "run"))
    assert caught.value.exit_code == 3
    assert (tmp_path / "run" / "rejects.jsonl").read_text().count("\n") == 12


@pytest.fixture
def captions(tiny_shards: Path, tmp_path: Path) -> Path:
    """A captions.csv and a labels.csv (the colour) with their images, taken from the shards."""
    folder = tmp_path / "captions"
    (folder / "images").mkdir(parents=True)
    rows, labels = ["filepath,caption"], ["filepath,label"]
    for path in sorted(tiny_shards.glob("*.tar"))[:2]:
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                if member.name.endswith(".png"):
                    (folder / "images" / member.name).write_bytes(stream.read())
                else:
                    text = stream.read().decode()
                    picture = f"images/{member.name.replace('.txt', '.png')}"
                    rows.append(f'{picture},"{text}"')
                    labels.append(f"{picture},{list(COLOURS).index(text.split()[1])}")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    (folder / "classnames.txt").write_text("\n".join(COLOURS) + "\n")
    return folder


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_while_training_equals_the_command_afterwards(
    tiny_shards: Path, tmp_path: Path, captions: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipkit.evaluation.probe.ITERATIONS", 20)
    tasks = [{"task": "retrieval", "data": str(captions), "name": "squares"}]
    if world > 1:
        tasks += [{"task": "probe", "data": str(captions), "name": "colours"}]
    common = {"run__evaluate_every": 3, "run__evaluate": tasks, "run__weight_ema": True}
    config = values(tiny_shards, tmp_path / "run", run__steps=6, **common)
    Ranks(world, train, config).values()
    found = [record for record in records(tmp_path / "run") if record.get("event") == "evaluation"]
    assert [record["step"] for record in found] == [3, 6]
    for label, which in (("squares", "raw"), ("squares@ema", "ema")):
        again = retrieval(load(tmp_path / "run", weights=which), captions)
        assert found[-1]["results"][label] == again["metrics"]
        if world > 1:
            again = probe(load(tmp_path / "run", weights=which), captions)
            assert found[-1]["results"][label.replace("squares", "colours")] == again["metrics"]
    # The export holds the averaged weights.
    exported = retrieval(load(tmp_path / "run" / "export"), captions)
    assert exported["metrics"] == found[-1]["results"]["squares@ema"]


def test_evaluation_does_not_change_the_training(tiny_shards: Path, tmp_path: Path, captions: Path) -> None:
    evaluated = [{"task": "retrieval", "data": str(captions)}]
    for name, changes in (("with", {"run__evaluate_every": 2, "run__evaluate": evaluated}), ("without", {})):
        Ranks(1, train, values(tiny_shards, tmp_path / name, run__steps=8, **changes)).values()
    assert trace(tmp_path / "with") == trace(tmp_path / "without")


def test_frozen_trunk_stays_and_projection_trains(tiny_shards: Path, tmp_path: Path) -> None:
    first = pretrain(values(tiny_shards, tmp_path / "first", run__steps=2, run__weight_ema=False))
    given = load(first["export"]).towers.clip.visual.state_dict()
    # A projection that comes with the weights is part of what they know; a random one has to learn.
    bare = tmp_path / "trunk.safetensors"
    save_file({name: x for name, x in given.items() if name != "proj"}, bare)
    for name, init, moving in (("whole", first["export"], set()), ("bare", str(bare), {"proj"})):
        config = values(tiny_shards, tmp_path / name, run__steps=3, run__weight_ema=False)
        config["model"]["image"] = {"init": init, "freeze": "trunk"}
        seed_everything(config["run"]["seed"])
        checked = make_config(config)
        start = build_towers(checked, declare(checked)).clip.visual.state_dict()
        assert {key for key in given if not torch.equal(given[key], start[key])} == moving
        end = load(pretrain(config)["export"]).towers.clip.visual.state_dict()
        assert {key for key in start if not torch.equal(start[key], end[key])} == moving


def test_a_fixed_temperature_stays_and_is_exported(tiny_shards: Path, tmp_path: Path) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=3)
    config["objectives"] = [{"name": "clip", "temperature": 0.25}]
    exported = pretrain(config)["export"]
    assert load(exported).logit_scale == pytest.approx(4.0, rel=1e-6)
    scales = [record["logit_scale"] for record in records(tmp_path / "run") if "loss" in record]
    assert scales == pytest.approx([4.0] * 3, rel=1e-6)


def test_modules_stand_for_their_parameters() -> None:
    known = ["scale", "a.x.w", "a.x.b", "a.y", "b.w", "b.v"]
    assert shortened(["scale", "a.x.w", "a.x.b", "b.w", "b.v"], known) == ["scale", "a.x", "b"]
    assert shortened(["a.x.w", "a.y"], known) == ["a.x.w", "a.y"]
    assert shortened(known[1:4], known) == ["a"]


def test_missing_run_directory_of_a_finished_export_is_rebuilt(tiny_shards: Path, tmp_path: Path) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=3)
    pretrain(config)
    kept = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    pretrain(config)
    assert weights(tmp_path / "run") == kept


def test_config_objects_and_dicts_mean_the_same(tiny_shards: Path, tmp_path: Path) -> None:
    given = values(tiny_shards, tmp_path / "a", run__steps=2)
    pretrain(make_config(given))
    assert len(records(tmp_path / "a")) == 2


def test_time_based_evaluation_happens(tiny_shards: Path, tmp_path: Path, captions: Path) -> None:
    evaluated = [{"task": "retrieval", "data": str(captions)}]
    pretrain(
        values(
            tiny_shards, tmp_path / "run", run__steps=3, run__evaluate=evaluated, run__evaluate_every="0.001s"
        )
    )
    steps = [record["step"] for record in records(tmp_path / "run") if record.get("event") == "evaluation"]
    assert steps == [1, 2, 3]
