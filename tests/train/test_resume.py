"""P3: kill -9 anywhere, the same command again, the same losses bit for bit."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import clipkit
from clipkit.checkpoint import Checkpoint, versions
from clipkit.dist import World
from clipkit.train import pretrain
from clipkit.train.resume import guarantee
from clipkit.types import ConfigError
from tests.conftest import Ranks
from tests.objectives.entries import ENTRIES
from tests.train.runs import columns, trace, train, values, weights

STEPS = 24


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at(config: dict[str, Any], world: int, step: int) -> None:
    """Starts the run on `world` ranks and kills all of them once metrics.jsonl holds `step` lines."""
    ranks = Ranks(world, train, config)
    metrics = Path(config["run"]["dir"]) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while lines(metrics) < step:
        assert time.monotonic() < deadline, "the run did not reach the step at which it is killed"
        assert all(process.is_alive() for process in ranks.processes) or lines(metrics) >= step
        time.sleep(0.002)
    ranks.kill()


def test_frozen_weights_are_stored_once_and_runs_continue_with_them(
    tiny_shards: Path, tmp_path: Path
) -> None:
    straight, broken = (values(tiny_shards, tmp_path / name, run__weight_ema=True) for name in ("a", "b"))
    for config in (straight, broken):
        config["model"]["image"] = {"freeze": "trunk"}
        config["objectives"] = [
            {"name": "clip"},
            {"name": "moco", "queue": 24, "hidden": 8, "dim": 4},
        ]
    Ranks(1, train, straight).values()
    kill_at(broken, 1, 13)
    Ranks(1, train, broken).values()
    assert trace(tmp_path / "b") == trace(tmp_path / "a")
    assert weights(tmp_path / "b") == weights(tmp_path / "a")
    newest = sorted((tmp_path / "b/checkpoints").glob("step-*"))[-1]
    (shared,) = (tmp_path / "b/checkpoints").glob("model-*.safetensors")
    apart, once = load_file(newest / "model.safetensors"), load_file(shared)
    assert {name.split(".")[0] for name in once} == {"towers", "ema", "teachers"}
    assert all(".visual." in name for name in once)
    assert not apart.keys() & once.keys()
    for averaged in ("raw", "ema"):
        model = clipkit.load(tmp_path / "b", weights=averaged)
        trunk = {
            name: x for name, x in model.towers.clip.state_dict().items() if f"towers.clip.{name}" in once
        }
        assert trunk
        assert all(torch.equal(x, once[f"towers.clip.{name}"]) for name, x in trunk.items())


def test_a_finished_run_only_exports_again(tiny_shards: Path, tmp_path: Path) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=4)
    Ranks(1, train, config).values()
    before = trace(tmp_path / "run")
    (again,) = Ranks(1, train, config).values()
    assert again["steps"] == 4
    assert trace(tmp_path / "run") == before


def test_queues_averages_and_prototypes_continue_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    objectives = [ENTRIES[name] for name in ("clip", "moco", "pcl", "byol", "swav, queue")]
    # They read one average, so they must mean the same by it.
    objectives[3] = {**objectives[3], "schedule": "constant"}
    straight, broken = (values(tiny_shards, tmp_path / name) for name in ("straight", "broken"))
    straight["objectives"] = broken["objectives"] = objectives
    Ranks(2, train, straight).values()
    for step in (7, 16):
        kill_at(broken, 2, step)
    Ranks(2, train, broken).values()
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
    found = columns(tmp_path / "straight")
    terms = {"loss/clip", "loss/moco", "loss/pcl", "loss/byol", "loss/swav"}
    assert terms == {name for name in found if name.startswith("loss/")}
    assert found["queue_filled/moco"][0] == 0.0
    assert found["queue_filled/moco"][-1] == 1.0
    assert found["queue_age/moco"][0] == 0 < found["queue_age/moco"][-1]


def test_a_named_checkpoint_of_another_configuration_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    pretrain(values(tiny_shards, tmp_path / "one", run__steps=4, run__checkpoint_every=2))
    named = str(tmp_path / "one" / "checkpoints" / "step-00000002")
    kept = {path: path.read_bytes() for path in (tmp_path / "one").glob("*.*")}
    other = {"run__steps": 4, "optim__lr": 0.5}
    for folder in ("one", "two"):
        with pytest.raises(
            ConfigError, match=r"one belongs to a run with other values of optim\.lr"
        ) as caught:
            pretrain(values(tiny_shards, tmp_path / folder, **other), resume=named)
        assert caught.value.cure
    # A run directory that is another run is not overwritten either, whatever is continued into it.
    pretrain(values(tiny_shards, tmp_path / "three", **other))
    with pytest.raises(ConfigError, match="three belongs to a run"):
        pretrain(values(tiny_shards, tmp_path / "three", run__steps=4), resume=named)
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_without_a_checkpoint_starts_again_and_is_not_overwritten(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=4, run__checkpoint_every=100)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("clipkit.train.loop.Saver.begin", die)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    kept = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    assert lines(tmp_path / "run" / "metrics.jsonl") >= 3
    other = values(tiny_shards, tmp_path / "run", run__steps=4, run__checkpoint_every=100, optim__lr=0.5)
    with pytest.raises(ConfigError, match=r"run belongs to a run with other values of optim\.lr"):
        pretrain(other, resume=resume)
    assert {path: path.read_bytes() for path in kept} == kept
    assert pretrain(config, resume=resume)["steps"] == 4
    assert sorted(trace(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_named_checkpoint_cuts_the_logs_of_its_own_run_only(tiny_shards: Path, tmp_path: Path) -> None:
    one = values(tiny_shards, tmp_path / "one", run__steps=4, run__checkpoint_every=2)
    pretrain(one)
    log, kept = tmp_path / "one" / "metrics.jsonl", trace(tmp_path / "one")
    named = tmp_path / "one" / "checkpoints" / "step-00000002"
    # Elsewhere: the same samples and losses from there on, and a log that was there stays.
    two = values(tiny_shards, tmp_path / "two", run__steps=4)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "metrics.jsonl").write_text('{"event": "mine"}\n')
    pretrain(two, resume=str(named))
    assert trace(tmp_path / "two") == {step: loss for step, loss in kept.items() if step > 2}
    assert (tmp_path / "two" / "metrics.jsonl").read_text().startswith('{"event": "mine"}\n')
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    # At home: the log is cut back to where the checkpoint stood, and goes on from there.
    shutil.rmtree(tmp_path / "one" / "export")
    before = log.read_text().splitlines()
    assert pretrain(one, resume=str(named))["steps"] == 4
    assert trace(tmp_path / "one") == kept
    assert len(log.read_text().splitlines()) == len(before)
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def test_a_continued_run_says_what_is_exact() -> None:
    def said(
        exact: bool = True,
        world: int = 2,
        torch_version: str = "",
        device: str = "cpu",
        fixed: bool = False,
        shares: tuple[int, ...] = (),
    ) -> str:
        run = SimpleNamespace(
            stream=SimpleNamespace(exact=exact, changed=None, shares=shares),
            world=World(0, world),
            accelerator=SimpleNamespace(device=torch.device(device)),
            config=SimpleNamespace(run=SimpleNamespace(deterministic=fixed)),
            bare=None,
        )
        manifest = {
            "world_size": 2,
            "versions": {"torch": torch_version or versions()["torch"]},
            "identity": {},
            "files": {},
        }
        return guarantee(run, Checkpoint(Path(), 3, manifest))  # type: ignore[arg-type]

    assert said().endswith("bit for bit")
    assert said(device="cuda", fixed=True).endswith("bit for bit")
    assert "spread of two uninterrupted runs on cuda (run.deterministic: true" in said(device="cuda")
    assert said(world=4).startswith("2 -> 4 process(es): same samples")
    assert said(world=3, shares=(2, 3, 3)).startswith("2 -> 3 process(es) of 2 to 3 rows: same samples")
    assert "torch 1.0 -> " in said(torch_version="1.0")
    assert said(exact=False).startswith("not exact")
    for changes in ({"world": 4}, {"torch_version": "1.0"}, {"exact": False}):
        assert "bit for bit" not in said(**changes)  # type: ignore[arg-type]
