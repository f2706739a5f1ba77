"""Worker processes: every start method, signals, death of the parent."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.makers import same, stream, take, worker_pids, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), [50, 30])


@pytest.mark.parametrize(("method", "workers"), [("spawn", 1), ("forkserver", 2)])
def test_start_methods_build_the_same(shards: Path, method: str, workers: int) -> None:
    """Everything that goes to a worker pickles."""
    reference = take(stream(shards, 8), 3, 13)
    assert same(take(stream(shards, 8, workers=workers, start_method=method), 3, 13), reference)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_closing_ends_the_workers(shards: Path) -> None:
    before = set(worker_pids())
    opened = stream(shards, 8, workers=2)
    next(opened.batches(0, 10))
    started = [pid for pid in worker_pids() if pid not in before]
    assert len(started) == 2
    opened.close()
    assert wait_until_gone(started, 20)


def test_workers_outlive_a_first_signal(shards: Path) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the main process must still get its batches."""
    before = set(worker_pids())
    opened = stream(shards, 8, workers=1)
    batches = opened.batches(0, 10)
    found = [next(batches)]
    (worker,) = [pid for pid in worker_pids() if pid not in before]
    os.kill(worker, signal.SIGINT)
    os.kill(worker, signal.SIGTERM)
    found += list(batches)
    opened.close()
    assert same(found, take(stream(shards, 8), 0, 10))


def _parent(shards: str, method: str, pipe: Any) -> None:
    # The fork server of the test process is no child of this one: forget it, so that a new one starts.
    server = multiprocessing.forkserver._forkserver
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    opened = stream(shards, 8, workers=2, start_method=method)
    batches = opened.batches(0, 10)
    next(batches)
    pipe.send(worker_pids())
    time.sleep(300)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_die_with_their_parent(shards: Path, method: str) -> None:
    """After `kill -9` of the main process no worker is left behind."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    parent = context.Process(target=_parent, args=(str(shards), method, send))
    parent.start()
    assert receive.poll(120)
    workers = receive.recv()
    assert len(workers) == 2
    assert all(alive(pid) for pid in workers)
    parent.kill()
    parent.join()
    gone = wait_until_gone(workers, 40)
    for pid in workers if not gone else []:
        os.kill(pid, signal.SIGKILL)
    assert gone
