"""A rank that is killed or stopped is named by the other one, which leaves with code 1 and no workers."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit.checkpoint import CheckpointStore, process_start
from clipkit.cli import main
from clipkit.dist import World
from clipkit.train.heartbeat import Heartbeat, Sign, behind, missing, read_signs
from clipkit.types import ClipkitError
from tests.conftest import Ranks
from tests.train.runs import values


def command(rank: int, world: int, path: str) -> None:
    os._exit(main(["pretrain", path]))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def eventually(holds: Any, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="workers are found in /proc: run it on Linux"
)
@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGKILL, " is gone, last "), (signal.SIGSTOP, " has given no sign for ")],
)
def test_a_rank_that_is_missing_is_named_and_the_other_leaves(
    tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int, message: str
) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=5000, run__timeout="3s", data__workers=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    ranks = Ranks(2, command, str(tmp_path / "run.yaml"))
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        assert eventually(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 6, 120)
        stays, goes = ranks.processes
        assert stays.pid is not None
        assert goes.pid is not None
        workers = children(stays.pid)
        assert len(workers) >= 1
        os.kill(goes.pid, number)
        stays.join(60)
        assert stays.exitcode == 1
        assert eventually(lambda: all(process_start(worker) is None for worker in workers), 10)
        error = capfd.readouterr().err
        assert f"rank 1 (process {goes.pid} on {socket.gethostname()}){message}" in error
        assert "cure: look at what that rank wrote last" in error
        assert "Traceback" not in error
        found = CheckpointStore(tmp_path / "run" / "checkpoints", World()).newest()
        assert found is not None
        assert found.step >= 5
    finally:
        ranks.kill()


def sign(rank: int, **changes: Any) -> Sign:
    me = {"host": "elsewhere", "pid": 7, "start": "then", "step": 5, "doing": "in a step"}
    return Sign(**{"rank": rank, **me, **changes})


def test_the_strongest_evidence_is_named() -> None:
    here = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
    alive, late = sign(1, **here), sign(2, doing="waiting for data")
    silent, failed = sign(3, age=60.0), sign(4, left="MemoryError: none left")
    gone = sign(5, **{**here, "start": "of another process with this number"})
    following = sign(6, left="")
    every = [alive, late, silent, failed, gone, following]
    assert [text[:6] for text in missing(every, 0, 30.0)] == ["rank 5", "rank 4"]
    assert "none left" in missing(every, 0, 30.0)[1]
    assert [text[:6] for text in missing([alive, late, silent, following], 0, 30.0)] == ["rank 3"]
    assert missing([alive, late, following, gone], 5, 30.0) == [], "nobody waits for himself"
    assert [text[:6] for text in behind([alive, late, following])] == ["rank 2"]
    assert behind([alive, sign(0), following]) == []


def test_only_a_failed_collective_is_translated(tmp_path: Path) -> None:
    other = Heartbeat(tmp_path, World(1, 2), 60.0)
    with pytest.raises(MemoryError), other:
        raise MemoryError("none left")
    first = Heartbeat(tmp_path, World(0, 2), 60.0)
    first.at(4, "in a step")
    with pytest.raises(ClipkitError, match=r"^a collective failed: rank 1 .* step 0: none left"), first:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
    assert [(found.step, found.doing, found.left) for found in read_signs(other.folder)] == [
        (4, "in a step", ""),
        (0, "starting", "none left"),
    ]
    with pytest.raises(RuntimeError, match="shapes"), Heartbeat(tmp_path, World(0, 2), 60.0):
        raise RuntimeError("shapes differ")
    first.prepare()
    with Heartbeat(tmp_path, World(0, 1), 60.0):
        assert read_signs(other.folder) == [], "one process signs nothing"
