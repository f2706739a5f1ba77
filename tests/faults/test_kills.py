"""kill -9 and restarts: the same command goes on at the very next sample, as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from clipkit.dist import World
from clipkit.train import loop, pretrain
from clipkit.types import ConfigError
from tests.conftest import Ranks
from tests.data.makers import stream
from tests.faults.killing import check_left, check_same, dropping, run_until_step
from tests.train.runs import losses, trace, train, values, weights

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def written(config: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launcher(world: int) -> list[str]:
    ports = ["--master_port", str(free_port())]
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(world), *ports]


def in_step(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.read_bytes().count(b"\n") >= 13


def in_save(run: Path) -> bool:
    # A checkpoint under its temporary name is being written.
    return in_step(run) and any((run / "checkpoints").glob("step-*.tmp-*"))


def kill_when(moment: Callable[[Path], bool], run: Path, command: list[str]) -> None:
    """Starts the command and ends it and its children by SIGKILL as soon as `moment` has come."""
    running = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 600
    while not moment(run):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.0005)
    # The ranks of torchrun are in groups of their own.
    below = psutil.Process(running.pid).children(recursive=True)
    os.killpg(running.pid, signal.SIGKILL)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert running.wait(20) == -signal.SIGKILL
    assert not psutil.wait_procs(below, 20)[1]


@pytest.mark.timeout(1500)  # imports of fresh processes on a machine with other work
@pytest.mark.parametrize(("world", "moment"), [(1, in_step), (1, in_save), (2, in_step)])
@pytest.mark.fault(
    "F1",
    "kill -9 of a command in a step and in a save, as one process and as two under torchrun",
    "the same command again: losses and weights equal the uninterrupted run's bit for bit",
)
def test_f01_a_killed_command_continues_bit_for_bit(
    tiny_shards: Path, tmp_path: Path, world: int, moment: Callable[[Path], bool]
) -> None:
    # A checkpoint at every step leaves little time outside of saves.
    common = {"run__checkpoint_every": 1 if moment is in_save else 5, "run__world_size": world}
    Ranks(world, train, values(tiny_shards, tmp_path / "straight", **common)).values()
    config = written(values(tiny_shards, tmp_path / "broken", **common), tmp_path / "broken.yaml")
    command = [sys.executable, *(launcher(world) if world > 1 else []), "-m", "clipkit", "pretrain", config]
    kill_when(moment, tmp_path / "broken", command)
    assert len(losses(tmp_path / "broken")) < 24, "it was killed before its end"
    if world == 1 and moment is in_step:
        done = subprocess.run(
            command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"{world} process(es) on cpu" in done.stderr
    else:
        # What is left behind is the same for every start; an import of everything costs 5 s of each process.
        Ranks(world, train, values(tiny_shards, tmp_path / "broken", **common)).values()
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


@pytest.mark.fault(
    "F4",
    "a run of 4 lanes continued by 3 processes",
    "error that lists the numbers of processes that can continue it",
)
def test_f04_a_world_that_does_not_divide_the_lanes_is_refused(uneven: Path) -> None:
    state = stream(uneven, 12, lanes=4).state(0)
    later = stream(uneven, 12, World(1, 2), saved=state)
    assert later.state(0)["lanes"] == 4
    with pytest.raises(ConfigError, match=r"1, 2, 4; data.uneven=true takes any up to 4"):
        stream(uneven, 12, World(0, 3), saved=state)
    assert stream(uneven, 12, World(0, 3), saved=state, uneven=True).state(0)["lanes"] == 4
    with pytest.raises(ConfigError, match="lanes, 4, is not a multiple of the 5 processes"):
        stream(uneven, 12, World(0, 5), saved=state, uneven=True)
    assert state["processes"] == "1, 2, 4; with data.uneven=true any number up to 4"


# Two kills in the first epoch (of 8 steps), on its last batch, which a checkpoint follows, and on the
# first of the next.
@pytest.mark.parametrize(
    ("world", "workers", "steps"), [(1, 0, (3, 6, 8, 9)), (1, 2, (2, 8, 9)), (3, 0, (5, 8))]
)
@pytest.mark.fault(
    "F1",
    "kill -9 at seeded moments of steps, W = 1 and 3, with and without loader workers, towers with dropout",
    "the same command again: losses and weights equal the uninterrupted run's bit for bit",
)
@pytest.mark.fault(
    "F3",
    "several kills in one epoch, on its last batch and on the first of the next",
    "as after one kill",
)
@pytest.mark.fault("F34", "a checkpoint at the border of two epochs", "the run continues from it exactly")
def test_f01_f03_f34_killed_runs_continue_bit_for_bit(
    tiny_shards: Path, tmp_path: Path, world: int, workers: int, steps: tuple[int, ...]
) -> None:
    straight, broken = (
        values(tiny_shards, tmp_path / name, run__steps=14, run__checkpoint_every=4, data__workers=workers)
        for name in ("straight", "broken")
    )
    straight["model"] = broken["model"] = dropping()
    Ranks(world, train, straight).values()
    draw = random.Random(world * 10 + workers)
    for step in steps:
        run_until_step(broken, world, step, draw)
        check_left(tmp_path / "broken", trace(tmp_path / "straight"))
    Ranks(world, train, broken).values()
    check_same(tmp_path / "broken", tmp_path / "straight")
    assert len(trace(tmp_path / "straight")) == 14


@dataclass(frozen=True)
class Stage:
    """A part of a run: on how many ranks, with how many workers each, and the step after which it stops."""

    world: int
    workers: int
    stop: int


def train_stage(rank: int, world: int, config: dict[str, Any], stop: int) -> list[tuple[str, ...]]:
    """Trains until a SIGTERM after step `stop`; returns the sample keys of each step of this process."""
    keys: list[tuple[str, ...]] = []
    step = loop.Loop._advance

    def recorded(self: loop.Loop, batch: Any) -> Any:
        keys.append(batch.keys)
        found = step(self, batch)
        if self.state.step == stop and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    loop.Loop._advance = recorded  # type: ignore[method-assign]
    try:
        pretrain(config)
    except loop.Interrupted:
        assert stop
    return keys


def run_stages(shards: Path, folder: Path, stages: list[Stage]) -> list[tuple[str, ...]]:
    """Returns the keys of every global batch, in order of steps, and leaves the run behind."""
    keys: list[tuple[str, ...]] = []
    for stage in stages:
        changes = {"data__workers": stage.workers, "data__lanes": 12, "run__steps": 12}
        parts = Ranks(stage.world, train_stage, values(shards, folder, **changes), stage.stop).values()
        keys += [tuple(key for part in step for key in part) for step in zip(*parts, strict=True)]
    return keys


@pytest.mark.fault(
    "F4",
    "a run continued with 1, 2 and then 4 processes",
    "the same samples in the same rows of every step, losses within 1e-5",
)
@pytest.mark.fault(
    "F4", "a run continued with 0, 1 and then 3 loader workers", "losses and weights equal bit for bit"
)
def test_f04_other_numbers_of_processes_and_workers(tiny_shards: Path, tmp_path: Path) -> None:
    straight = run_stages(tiny_shards, tmp_path / "straight", [Stage(1, 0, 0)])
    assert len(straight) == 12
    assert len({key for batch in straight[:8] for key in batch}) == 96
    worlds = [Stage(1, 0, 3), Stage(2, 0, 7), Stage(4, 0, 0)]
    assert run_stages(tiny_shards, tmp_path / "worlds", worlds) == straight
    found = zip(losses(tmp_path / "worlds"), losses(tmp_path / "straight"), strict=True)
    assert max(abs(one - other) for one, other in found) < 1e-5
    workers = [Stage(1, 0, 3), Stage(1, 1, 7), Stage(1, 3, 0)]
    assert run_stages(tiny_shards, tmp_path / "workers", workers) == straight
    check_same(tmp_path / "workers", tmp_path / "straight")
