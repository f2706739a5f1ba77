"""The commands as users start them: real processes, torchrun, SIGKILL from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Ranks
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
    deadline = time.monotonic() + 200
    while not moment(run):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.0005)
    os.killpg(running.pid, signal.SIGKILL)
    assert running.wait(20) == -signal.SIGKILL


@pytest.mark.parametrize(("world", "moment"), [(1, in_step), (1, in_save), (2, in_step)])
def test_a_killed_command_continues_bit_for_bit(
    tiny_shards: Path, tmp_path: Path, world: int, moment: Callable[[Path], bool]
) -> None:
    # A checkpoint at every step leaves little time outside of saves.
    common = {"run__checkpoint_every": 1 if moment is in_save else 5, "run__world_size": world}
    Ranks(world, train, values(tiny_shards, tmp_path / "straight", **common)).values()
    config = written(values(tiny_shards, tmp_path / "broken", **common), tmp_path / "broken.yaml")
    command = [sys.executable, *(launcher(world) if world > 1 else []), "-m", "clipkit", "pretrain", config]
    kill_when(moment, tmp_path / "broken", command)
    assert len(losses(tmp_path / "broken")) < 24, "it was killed before its end"
    done = subprocess.run(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{world} process(es) on cpu" in done.stderr
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
