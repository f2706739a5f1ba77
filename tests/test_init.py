"""From a table of pairs to a run file, and from the run file to a trained model."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from clipkit.cli import main
from clipkit.config import load_config, make_config
from clipkit.data.making import Reading, make_shards, open_collection
from clipkit.data.raw.reading import Raw, planned
from clipkit.proposal import sampling
from clipkit.proposal.machine import Machine, Speed
from clipkit.proposal.model import choose_model
from clipkit.proposal.plan import Pace, plan_data, plan_run, seen_samples
from clipkit.proposal.survey import DataFacts, FieldFacts
from tests.commands import fails

COLOURS = ("red", "green", "blue", "white")


def write_pairs(folder: Path, rows: int = 160) -> Path:
    """A CSV, its images in images.zip as they come, 40 x 30 pixels; captions in two columns."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "pairs.csv"
    with (
        zipfile.ZipFile(folder / "images.zip", "w") as archive,
        table.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(["filepath", "caption", "story"])
        for number in range(rows):
            colour = COLOURS[number % 4]
            picture = io.BytesIO()
            Image.new("RGB", (40, 30), colour).save(picture, "PNG")
            archive.writestr(f"images/{number}.png", picture.getvalue())
            writer.writerow([f"images/{number}.png", f"{colour} number {number // 8}", f"all is {colour}, Ж"])
    return table


def write_run_file(path: Path, *arguments: str) -> dict[str, Any]:
    assert main(["init", *arguments, "--out", str(path)]) == 0
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def test_from_csv_to_a_trained_model_with_shards_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    table = write_pairs(Path("my data"))
    before = sorted(path.name for path in table.parent.iterdir())
    values = write_run_file(Path("run.yaml"), str(table), "--budget", "1h")
    assert sorted(path.name for path in table.parent.iterdir()) == before, "init writes the run file alone"
    shown = capsys.readouterr().out
    assert "160 (counted)" in shown
    assert "80 of 160 compared" in shown
    assert "Cyrillic" not in shown.split("captions txt")[1].splitlines()[0]
    assert "shorter side 5 / 50 / 95 %: 30 / 30 / 30 pixels; PNG 100%" in shown
    assert values["data"]["train"] == str(table)
    assert values["model"]["vision_cfg"]["image_size"] == 32
    text = Path("run.yaml").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert 18 <= len(lines) <= 32
    for key in (*values["data"], *values["run"], *values["optim"], *values["model"]):
        (at,) = [number for number, line in enumerate(lines) if line.startswith(f"  {key}:")]
        assert "#" in lines[at] or lines[at - 1].startswith("  #"), f"{key} has no reason"
    fails(capsys, 2, "is there already", "init", table)
    assert Path("run.yaml").read_text(encoding="utf-8") == text

    few = ["run.steps=3", "data.workers=0", "data.batch_size=16", "run.log_every=1"]
    assert main(["pretrain", "run.yaml", "--dry-run", *few]) == 0
    assert "making shards of" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main(["pretrain", "run.yaml", *few]) == 0
    assert "making shards of" not in capsys.readouterr().err
    run = Path("runs/run")
    assert (run / "export" / "open_clip_model.safetensors").is_file()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == [1, 2, 3]
    assert len(list((table.parent / ".clipkit-cache").iterdir())) == 1

    # Touched, not changed: other shards, the same bytes, and the run goes on. Changed: it does not.
    os.utime(table.parent / "images.zip", (1, 1))
    assert main(["pretrain", "run.yaml", *few, "run.checkpoint_every=1"]) == 0
    assert "making shards of" in capsys.readouterr().err
    table.write_text(
        table.read_text(encoding="utf-8").replace("red number 0", "red numbex 0"), encoding="utf-8"
    )
    cure = fails(capsys, 2, "contents", "pretrain", "run.yaml", *few)
    assert "resume_data" in cure


def test_shards_and_a_model_to_start_from(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clipkit.export import save_open_clip
    from clipkit.models.towers import build
    from tests.conftest import TINY_MODEL

    monkeypatch.chdir(tmp_path)
    save_open_clip(build(dict(TINY_MODEL)), tmp_path / "model")
    values = write_run_file(tmp_path / "tune.yaml", str(tiny_shards), "--from", "model")
    assert values["model"]["init"] == "model"
    assert values["model"]["image"] == {"freeze": "trunk"}
    assert values["optim"]["lr"] < 1e-4
    assert "96 (" in capsys.readouterr().out
    few = ["run.steps=2", "run.epochs=null", "data.workers=0"]
    assert main(["pretrain", "tune.yaml", "--dry-run", *few]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (["absent.csv"], 2, "absent.csv: no such table"),
        (["absent/{00..01}.tar"], 3, "absent/00.tar"),
        (["empty"], 2, "no table"),
        (["bad.csv"], 3, "no column of images"),
        (["none.csv"], 3, "no samples to write"),
        (["one/pairs.csv"], 3, "1 usable pair(s): nothing to contrast"),
        (["pairs.csv", "--budget", "soon"], 2, "--budget soon is no time"),
        (["pairs.csv", "--budget", "20%"], 2, "--budget 20% is no time"),
        (["pairs.csv", "--from", "nothing"], 2, "--from nothing"),
        (["pairs.csv", "--caption", "titel"], 3, "no column 'titel'"),
        (["pairs.csv", "--out", "pairs.csv/run.yaml"], 2, "cannot be written"),
    ],
)
def test_what_cannot_be_looked_at_is_said_in_two_lines(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    cause: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, rows=4)
    write_pairs(tmp_path / "one", rows=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "none.csv").write_text("filepath,caption\nimages/absent.png,x\n")
    cure = fails(capsys, code, cause, "init", *arguments)
    assert "--caption-key" not in cure
    assert "--keep" not in cure
    assert not (tmp_path / "run.yaml").exists()


@pytest.mark.parametrize("pairs", [2, 5])
def test_a_handful_of_pairs_is_enough_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run_file(tmp_path / "run.yaml", str(write_pairs(tmp_path / "data", pairs)))
    assert main(["pretrain", "run.yaml", "--dry-run", "run.steps=2", "run.epochs=null"]) == 0


def facts(pairs: int, side: int, tokens: int = 20) -> DataFacts:
    field = FieldFacts(10, ["a red ball"] * 10, [tokens] * 10)
    return DataFacts(
        pairs, True, 10, Counter(), ("txt",), {"txt": field}, (9, 10), [side] * 10, Counter({"JPEG": 10})
    )


CPU = Machine("cpu", "CPU", 16 * 10**9, "fp32", "", 4)
GPU = Machine("cuda", "a GPU", 80 * 10**9, "bf16", "", 16)


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("hours", [None, 0.001, 10.0])
def test_what_is_proposed_is_a_configuration_that_keeps_to_the_budget(
    machine: Machine, hours: float | None
) -> None:
    rate = 50.0 if machine is CPU else 2000.0
    pace = Pace(Speed(64, rate, 2 * 10**9), Speed(256, rate, 4 * 10**9))
    for side, pairs in itertools.product(
        (20, 64, 100, 224, 2000), (3, 50, 999, 20_000, 3_000_000, 400_000_000)
    ):
        data = facts(pairs, side)
        chosen = choose_model(data, machine)
        seconds = None if hours is None else hours * 3600
        seen = seen_samples(data, chosen, pace, seconds)
        section = plan_data("x.csv", data, chosen, machine, pace, seen)
        batch = section["batch_size"][0]
        run, samples = plan_run(data, chosen, machine, pace, seen, batch, "the budget")
        values = {"model": chosen.values, "data": section, "run": run}
        config = make_config(
            {key: {name: v for name, (v, _) in part.items()} for key, part in values.items()}
        )
        assert 2 <= batch <= pairs
        held = section["holdout"][0] if "holdout" in section else 0
        assert (held > 0) == ("evaluate_every" in run) == (pairs >= 1000)
        assert held <= pairs // 20
        assert batch & (batch - 1) == 0
        micro = config.data.micro_batch or batch
        # A straight line through the two measurements.
        assert (machine.memory or 0) >= 4e9 + (micro - 256) * 2e9 / 192
        if seconds is not None:
            assert samples / rate <= max(seconds, batch / rate)
        # Not less than it could be: all passes, or most of the time, but for what rounding to passes takes.
        most = math.inf if seconds is None else 0.8 * seconds * rate
        assert samples >= min(32 * (pairs - held - batch), most / 2 - batch)
        assert config.model.spec


def test_of_large_pictures_fewer_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_pairs(tmp_path / "pairs")
    with zipfile.ZipFile(tmp_path / "pairs" / "images.zip") as archive:
        mean = sum(entry.file_size for entry in archive.infolist()) / 160
    monkeypatch.setattr(sampling, "MAX_BYTES", int(20 * mean))
    for name in ("raw", "shards", "made"):
        (tmp_path / name).mkdir()
    found = sampling.copy_raw(planned(Raw(table)), tmp_path / "raw", lambda *_: None)
    assert (found.pairs, found.exact) == (160, True)
    keys = [name for name in names(tmp_path / "raw") if name.endswith(".png")]
    assert 15 <= len(keys) <= 24
    assert min(keys) < "000000020" < "000000140" < max(keys), "they are spread over all rows"
    make_shards(open_collection(table, Reading()), tmp_path / "made")
    sampling.copy_shards(str(tmp_path / "made"), tmp_path / "shards", lambda *_: None)
    # Of shards all members count, each in whole blocks of a tar.
    assert 1 <= len([name for name in names(tmp_path / "shards") if name.endswith(".png")]) <= 24


def names(folder: Path) -> list[str]:
    found: list[str] = []
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as archive:
            found += archive.getnames()
    return found


def test_a_run_file_survives_odd_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clipkit.config.reading import flow_yaml, parse_text

    for value in (
        "-a #1, {x}: \u2028y\n",
        "5%",
        "yes",
        "1e3",
        "",
        "ünï",
        ["a, b", {"c: d": "e}"}],
        1e-5,
        True,
    ):
        assert parse_text(f"key: {flow_yaml(value)}  # why", "text").tree == {"key": value}, value
    folder = tmp_path / "-a # b: {c}"
    write_pairs(folder, rows=8)
    path = tmp_path / "run.yaml"
    write_run_file(path, str(folder))
    assert load_config(path).data.train[0].shards == str(folder)
