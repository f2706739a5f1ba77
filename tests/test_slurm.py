"""examples/slurm, run by a shell with stand-ins for what only a cluster has: srun, scancel, scontrol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.faults.test_kills import ENVIRONMENT, free_port, written
from tests.train.runs import trace, train, values, weights

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm" / "pretrain.sbatch"
SCONTROL = """
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "scontrol $*" >> "$CALLS"; fi
"""
# Two "nodes": each runs the command that srun was given.
TWO_NODES = """
"$@" & one=$!
"$@" & two=$!
wait $one && wait $two
"""
# Ends as a training does when scancel asks for it.
ONE_STEP = """
echo $$ > "$CALLS.pid"; trap 'exit 1' TERM
while :; do sleep 0.05; done
"""
SCANCEL = 'echo "scancel $*" >> "$CALLS"; kill -TERM "$(cat "$CALLS.pid")"'


def start(folder: Path, config: str, **programs: str) -> subprocess.Popen[bytes]:
    """Starts the script with these programs first in PATH; what they note stands in folder/calls."""
    for name, body in {"scontrol": SCONTROL, **programs}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **ENVIRONMENT,
        "PATH": path,
        "CALLS": str(folder / "calls"),
        "RENDEZVOUS_PORT": str(free_port()),
        # How torchrun reads --local-addr: the name of this machine need not resolve.
        "PET_LOCAL_ADDR": "127.0.0.1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
    }
    with (folder / "stderr").open("wb") as stderr:
        return subprocess.Popen(
            ["bash", str(SCRIPT), config], env=environment, stderr=stderr, start_new_session=True
        )


def stop(running: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a job, of which processes are in sessions of their own."""
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGTERM)
        running.wait(60)


def wait_for(holds: Callable[[], bool], running: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.001)


@pytest.mark.slow
def test_a_killed_process_on_one_of_two_nodes_changes_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    # Four starts of torch and two agents. Last result: passed in 146 s on two busy cores, torch 2.15.
    length = {"run__steps": 40, "run__timeout": "60s"}
    Ranks(2, train, values(tiny_shards, tmp_path / "straight", **length)).values()
    config = written(values(tiny_shards, tmp_path / "broken", **length), tmp_path / "broken.yaml")
    metrics = tmp_path / "broken" / "metrics.jsonl"
    running = start(tmp_path, config, srun=TWO_NODES)
    try:
        wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 12, running, 200)
        victim = json.loads((tmp_path / "broken" / "heartbeat" / "rank-1").read_text())
        os.kill(victim["pid"], signal.SIGKILL)
        assert running.wait(240) == 0, (tmp_path / "stderr").read_text()
    finally:
        stop(running)
    said = (tmp_path / "stderr").read_text()
    assert f"rank 1 (process {victim['pid']} on {victim['host']}) is gone" in said
    assert "continuing " in said
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


def test_ahead_of_the_time_limit_the_job_ends_and_is_queued_again(tmp_path: Path) -> None:
    running = start(tmp_path, "run.yaml", srun=ONE_STEP, scancel=SCANCEL)
    wait_for((tmp_path / "calls.pid").exists, running, 20)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(20) == 0
    assert (tmp_path / "calls").read_text() == "scancel --signal=TERM 7.0\nscontrol requeue 7\n"


@pytest.mark.parametrize("code", [0, 3])
def test_the_job_ends_as_the_training_does(tmp_path: Path, code: int) -> None:
    assert start(tmp_path, "run.yaml", srun=f"exit {code}").wait(20) == code
