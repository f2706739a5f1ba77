"""The commands as users start them: real processes, torchrun, SIGKILL from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import Ranks
from tests.train.runs import losses, trace, train, values

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def written(config: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_torchrun_trains_on_two_processes_what_one_would(tiny_shards: Path, tmp_path: Path) -> None:
    one = values(tiny_shards, tmp_path / "one", run__steps=8)
    Ranks(1, train, one).values()
    two = written(
        values(tiny_shards, tmp_path / "two", run__steps=8, run__world_size=2), tmp_path / "two.yaml"
    )
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "clipkit", "pretrain", two],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stderr
    pairs = zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5


def test_a_killed_command_continues_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    Ranks(1, train, values(tiny_shards, tmp_path / "straight")).values()
    config = written(values(tiny_shards, tmp_path / "broken"), tmp_path / "broken.yaml")
    command = [sys.executable, "-m", "clipkit", "pretrain", config]
    metrics = tmp_path / "broken" / "metrics.jsonl"
    running = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 13:
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    assert running.wait(20) == -signal.SIGKILL
    subprocess.run(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, timeout=200, check=True)
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
