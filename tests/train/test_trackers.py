"""Trackers get what metrics.jsonl gets, once, on one rank, across a kill; none of them can end a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from clipkit.config import make_config
from clipkit.train import pretrain
from clipkit.train.trackers import Trackers, scalars
from clipkit.types import ConfigError
from tests.conftest import Ranks
from tests.train.runs import train, values

Series = dict[str, dict[int, float]]


class Recorder(GeneralTracker):
    """Stands in for wandb: keeps every call, and raises where `broken` says so."""

    name = "wandb"
    requires_logging_directory = False
    made: ClassVar[list[Recorder]] = []
    broken: ClassVar[set[str]] = set()

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.options, self.configuration, self.logged = options, dict[str, Any](), Series()
        self.made.append(self)

    def _fail(self, call: str) -> None:
        if call in self.broken:
            raise ConnectionError(f"no route\nto {call} \x1b[31mhost")

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        self._fail("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._fail("log")
        for name, value in values.items():
            assert step is not None
            assert step not in self.logged.setdefault(name, {}), "logged twice"
            self.logged[name][step] = value

    def finish(self) -> None:
        self._fail("finish")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    Recorder.made.clear()
    Recorder.broken.clear()
    yield Recorder
    Recorder.broken.clear()


def written(folder: Path) -> Series:
    """The numbers of metrics.jsonl: name -> step -> value."""
    found: Series = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in scalars(record).items():
            found.setdefault(name, {})[record["step"]] = value
    return found


def recorded(rank: int, world: int, config: dict[str, Any]) -> list[tuple[dict[str, Any], Series]]:
    pretrain(config)
    return [(made.options, made.logged) for made in Recorder.made]


def test_one_rank_tells_one_run_everything_once(
    recorder: type[Recorder],
    tiny_shards: Path,
    tmp_path: Path,
    run_ranks: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "CANARY-CANARY")
    config = values(
        tiny_shards, tmp_path / "run", run__steps=4, run__trackers=["wandb"], run__diagnose_every=2
    )
    config["data"]["storage"] = {"profile": "CANARY-CANARY"}
    first, silent = run_ranks(2, recorded, config)
    assert silent == []
    ((options, logged),) = first
    assert options["resume"] == "allow"
    assert logged == written(tmp_path / "run")
    assert {"loss", "lr", "logit_scale"} <= logged.keys()
    assert any(name.startswith("diagnostics/") for name in logged)
    # Nothing is left to train, and still it is the same run of the tracker.
    assert pretrain(config)["steps"] == 4
    (again,) = recorder.made
    assert again.options["id"] == options["id"]
    assert again.configuration == {}, "sent once, when the run began"
    fresh = values(tiny_shards, tmp_path / "other", run__steps=1, run__trackers="wandb")
    fresh["data"]["storage"] = {"profile": "CANARY-CANARY"}
    pretrain(fresh)
    other = recorder.made[-1]
    assert other.options["id"] != options["id"]
    assert other.configuration["data.storage.profile"] == "***"
    assert other.configuration["model.embed_dim"] == 16


@pytest.mark.parametrize("broken", ["start", "log"])
def test_a_tracker_that_fails_is_named_once_and_ends_nothing(
    recorder: type[Recorder],
    tiny_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    broken: str,
) -> None:
    recorder.broken.update({broken, "finish"})
    config = values(tiny_shards, tmp_path / "run", run__steps=3, run__trackers=["wandb"])
    assert pretrain(config)["steps"] == 3
    said = capsys.readouterr().err
    assert said.count("the tracker wandb failed (ConnectionError: no route to") == 1
    assert f"{1 if broken == 'start' else 4} calls of the tracker wandb failed" in said
    assert len(written(tmp_path / "run")["loss"]) == 3


def test_a_missing_package_is_named_before_anything_is_written(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ConfigError, match="comet_ml is not installed") as error:
        pretrain(values(tiny_shards, tmp_path / "run", run__trackers=["comet_ml"]))
    assert error.value.cure.startswith("pip install comet-ml")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="trackers"):
        make_config(values(tiny_shards, tmp_path, run__trackers=["tensorbord"]))


def test_numbers_of_an_evaluation_are_named_after_it() -> None:
    record = {"event": "evaluation", "step": 3, "results": {"pets": {"acc1": 0.5, "note": "x", "n": 2}}}
    assert scalars(record) == {"evaluation/pets/acc1": 0.5, "evaluation/pets/n": 2}
    assert scalars({"event": "alarm", "step": 3, "cause": "x"}) == {}


def shown(folder: Path) -> Series:
    """What TensorBoard shows of a run directory."""
    reading = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="uv sync installs tensorboard"
    )
    events = reading.EventAccumulator(str(folder / "trackers" / "tensorboard"), {reading.SCALARS: 0})
    events.Reload()
    found: Series = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert event.step not in found.setdefault(name, {}), f"{name} of step {event.step} is there twice"
            found[name][event.step] = event.value
    return found


def test_tensorboard_shows_every_step_once_after_a_kill(tiny_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="uv sync installs tensorboard")
    config = values(tiny_shards, tmp_path / "run", run__steps=16, run__trackers=["tensorboard"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    running = Ranks(1, train, config)
    began = time.monotonic()
    while not metrics.exists() or metrics.read_bytes().count(b'"loss"') < 7:
        assert time.monotonic() - began < 120
        time.sleep(0.005)
    running.kill()
    assert len(shown(tmp_path / "run")["loss"]) >= 6
    pretrain(config)
    expected = written(tmp_path / "run")
    assert list(expected["loss"]) == list(range(1, 17))
    found = shown(tmp_path / "run")
    assert {name: dict.fromkeys(steps) for name, steps in found.items()} == {
        name: dict.fromkeys(steps) for name, steps in expected.items()
    }
    for name, steps in expected.items():
        assert found[name] == pytest.approx(steps, rel=1e-6, nan_ok=True)


def test_tensorboard_forgets_what_a_rollback_undid(tiny_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="uv sync installs tensorboard")
    said: list[str] = []
    trackers = Trackers(make_config(values(tiny_shards, tmp_path, run__trackers=["tensorboard"])), tmp_path)
    trackers.start(None, {}, said.append)
    for step in range(1, 6):
        trackers.log({"step": step, "loss": float(step)})
    trackers.rewind(3)
    trackers.log({"step": 4, "loss": 40.0})
    trackers.close()
    assert shown(tmp_path) == {"loss": {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0}}
    assert said == []
