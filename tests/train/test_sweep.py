"""Sweeps: what is split, what runs, what comes out, and that an interrupted one continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit.cli import main
from clipkit.train.loop import Interrupted
from clipkit.train.sweep import records, split_overrides, split_values
from clipkit.types import ConfigError
from tests.train.runs import values


def test_values_are_split_outside_brackets_and_quotes() -> None:
    assert split_values("1,2, 3") == ["1", "2", "3"]
    assert split_values("[0.5,1],[0.8,1]") == ["[0.5,1]", "[0.8,1]"]
    assert split_values("[{name: clip},{name: simclr}]") == ["[{name: clip},{name: simclr}]"]
    assert split_values("'a,b',c") == ["'a,b'", "c"]
    swept, plain = split_overrides(["optim.lr=1e-3,3e-3", "run.steps=4", "data.crop_scale=[0.5,1]"])
    assert swept == {"optim.lr": ["1e-3", "3e-3"]}
    assert plain == ["run.steps=4", "data.crop_scale=[0.5,1]"]
    for bad in (["run.steps=4"], ["optim.lr=1,,2"], ["optim.lr=1,1"]):
        with pytest.raises(ConfigError):
            split_overrides(bad)


def test_a_sweep_runs_every_combination_and_continues(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(values(tiny_shards, tmp_path / "unused", run__steps=3)))
    command = ["sweep", str(config), "optim.lr=1e-3,1e-2", "run.seed=1,2", "--dir", str(tmp_path / "out")]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert table.count("optim.lr = ") == 4
    document = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [list(run["values"].values()) for run in document["runs"]] == [
        ["1e-3", "1"], ["1e-3", "2"], ["1e-2", "1"], ["1e-2", "2"],
    ]  # fmt: skip
    assert len({run["outcome"]["loss"] for run in document["runs"]}) == 4
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    written = {path: path.read_bytes() for path in (tmp_path / "out").rglob("metrics.jsonl")}
    assert len(written) == 4
    assert main(command) == 0
    again = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert again == document
    assert {path: path.read_bytes() for path in written} == written


def test_a_wrong_value_stops_a_sweep_before_its_first_run(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(values(tiny_shards, tmp_path / "unused", run__steps=3)))
    assert main(["sweep", str(config), "optim.lr=1e-3,fast", "--dir", str(tmp_path / "out")]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_failed_run_does_not_stop_a_sweep(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    limited = values(tiny_shards, tmp_path / "unused", run__steps=4, run__max_skipped_steps=2)
    config.write_text(yaml.safe_dump(limited))
    # The second one has losses that are not finite, the third one shards that are not there.
    shards = f"data.train={tiny_shards},{tmp_path / 'nowhere'}"
    out = tmp_path / "out"
    assert main(["sweep", str(config), "optim.lr=1e30,1e-3", "--dir", str(out)]) == 1
    seen = capsys.readouterr()
    assert "1 of 2 runs failed; optim.lr = 1e30: " in seen.err
    assert "failed" in seen.out
    failed, finished = json.loads((out / "sweep.json").read_text())["runs"]
    assert "not finite" in failed["error"]
    assert failed["outcome"] == {}
    assert finished["outcome"]["loss"] > 0
    assert "error" not in finished
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    written = Path(finished["directory"], "metrics.jsonl").read_bytes()
    # The exit code is that of the failure: here of data.
    code = main(["sweep", str(config), shards, "--dir", str(tmp_path / "other")])
    assert code in (2, 3)
    first, second = json.loads((tmp_path / "other" / "sweep.json").read_text())["runs"]
    assert "loss" in first["outcome"]
    assert "nowhere" in second["error"]
    assert main(["sweep", str(config), "optim.lr=1e30,1e-3", "--dir", str(out)]) == 1
    assert Path(finished["directory"], "metrics.jsonl").read_bytes() == written


def test_steps_that_were_skipped_do_not_count(tiny_shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(values(tiny_shards, tmp_path / "unused", run__steps=4)))
    # Fewer steps than end a run: from the second on none is finite.
    assert main(["sweep", str(config), "optim.lr=1e30,1e-3", "--dir", str(tmp_path / "out")]) == 0
    spoilt, sound = json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"]
    (first, *others) = records(Path(spoilt["directory"]))
    assert [record["loss"] for record in others] == [None] * 3
    assert spoilt["outcome"]["loss"] == pytest.approx(first["loss"])
    assert sound["outcome"]["loss"] > 0


def test_a_sweep_stops_when_it_is_interrupted(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(values(tiny_shards, tmp_path / "unused", run__steps=4)))

    def interrupted(*_: Any) -> None:
        raise Interrupted("stopped by SIGTERM", "run the same command again")

    monkeypatch.setattr("clipkit.train.sweep.pretrain", interrupted)
    assert main(["sweep", str(config), "optim.lr=1e-2,1e-3", "--dir", str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()
