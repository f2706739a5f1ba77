"""One run per directory: a living holder is named, a dead one is replaced at once."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipkit.checkpoint import run_lock
from clipkit.checkpoint.lock import LOCK_FILE
from clipkit.lock import process_start
from clipkit.types import ConfigError
from tests.checkpoint.children import in_child


@contextlib.contextmanager
def another_process(work: Callable[[], Any]) -> Iterator[int]:
    """A forked process that has done `work` and waits; killed at the end if it still lives."""
    ready, is_ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(is_ready, b"1")
            time.sleep(120)
        finally:
            os._exit(1)
    os.close(is_ready)
    try:
        assert os.read(ready, 1) == b"1"
        yield pid
    finally:
        os.close(ready)
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def hold(folder: Path) -> None:
    context = run_lock(folder)
    context.__enter__()
    globals()["_kept_open"] = context


def write_holder(folder: Path, **holder: Any) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(holder))


@pytest.mark.fault(
    "F33", "a second run into a directory", "refused; the lock goes away with the first, however that ends"
)
def test_f33_the_lock_names_its_holder_and_goes_away(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with run_lock(folder) as path:
        holder = json.loads(path.read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "), run_lock(folder):
            pass
        assert path.exists()
    assert not path.exists()
    with pytest.raises(RuntimeError, match="inside"), run_lock(folder):
        raise RuntimeError("inside")
    with run_lock(folder):
        pass


@pytest.mark.fault(
    "F33", "a run whose process lives, then is killed", "named with host and process; replaced at once"
)
def test_f33_a_living_process_is_respected_and_a_killed_one_replaced_at_once(tmp_path: Path) -> None:
    with another_process(lambda: hold(tmp_path)) as pid:
        with pytest.raises(ConfigError) as refused, run_lock(tmp_path):
            pass
        assert refused.value.exit_code == 2
        assert f"process {pid} on {socket.gethostname()}" in refused.value.cause
        assert str(tmp_path) in refused.value.cause
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with run_lock(tmp_path) as path:
            assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.fault("F33", "workers that outlive a killed run", "do not hold its lock")
def test_f33_orphaned_workers_of_a_killed_run_do_not_hold_its_lock(tmp_path: Path) -> None:
    orphan = tmp_path / "orphan"

    def work() -> None:
        hold(tmp_path)
        worker = os.fork()
        if worker == 0:
            time.sleep(120)
            os._exit(0)
        orphan.write_text(str(worker))

    with another_process(work) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:
            with run_lock(tmp_path):
                pass
        finally:
            os.kill(int(orphan.read_text()), signal.SIGKILL)


@pytest.mark.fault(
    "F33",
    "a lock of a process number that was used again, of a zombie, without the kernel's lock",
    "judged by number and start time",
)
def test_f33_a_recorded_process_is_judged_by_pid_and_start(tmp_path: Path) -> None:
    """As on a file system whose locks do not reach here."""
    host = socket.gethostname()
    with another_process(lambda: None) as pid:
        write_holder(tmp_path, host=host, pid=pid, start=process_start(pid))
        with pytest.raises(ConfigError, match=f"process {pid} on"), run_lock(tmp_path):
            pass
        write_holder(tmp_path, host=host, pid=pid, start="another boot 17")
        with run_lock(tmp_path):
            pass
        start = process_start(pid)
        os.kill(pid, signal.SIGKILL)
        # Not yet waited for: a zombie is dead.
        deadline = time.monotonic() + 20
        while process_start(pid) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        write_holder(tmp_path, host=host, pid=pid, start=start)
        with run_lock(tmp_path):
            pass


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"pid": "x"}', '{"host": "elsewhere", "pid": 1, "start": "0"}']
)
@pytest.mark.fault(
    "F33", "torn lock files, those of other machines", "taken over where the kernel's lock is free"
)
def test_f33_torn_locks_and_those_of_gone_machines_are_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with run_lock(tmp_path) as path:
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.fault(
    "F33", "a file system without locks", "another machine is believed, a dead process here is not"
)
def test_f33_without_kernel_locks_another_machine_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    write_holder(tmp_path, host="elsewhere", pid=1, start="0")
    with pytest.raises(ConfigError, match="process 1 on elsewhere"), run_lock(tmp_path):
        pass
    write_holder(tmp_path, host=socket.gethostname(), pid=2**22 + 1, start="0")
    with run_lock(tmp_path):
        pass


@pytest.mark.fault("F33", "eight runs that start at once", "one gets the directory")
def test_f33_of_many_that_start_at_once_one_gets_the_lock(tmp_path: Path) -> None:
    write_holder(tmp_path, host=socket.gethostname(), pid=2**22 + 1, start="0")
    begin = time.time() + 0.5

    def contend() -> None:
        pids = []
        for number in range(8):
            pid = os.fork()
            if pid == 0:
                time.sleep(max(0.0, begin - time.time()))
                try:
                    with run_lock(tmp_path):
                        (tmp_path / f"winner-{number}").touch()
                        deadline = time.time() + 60
                        while len(list(tmp_path.glob("refused-*"))) < 7 and time.time() < deadline:
                            time.sleep(0.01)
                except ConfigError:
                    (tmp_path / f"refused-{number}").touch()
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)

    assert in_child(contend) == 0
    assert len(list(tmp_path.glob("winner-*"))) == 1


@pytest.mark.fault("F16", "a run directory below a file", "refused at once")
def test_f16_a_directory_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"), run_lock(tmp_path / "file" / "run"):
        pass


def lock_free_and_busy(rank: int, world: int, folder: Path, busy: Path) -> str:
    with run_lock(folder) as path:
        assert path.exists()
        with pytest.raises(ConfigError) as refused, run_lock(busy):
            pass
    return refused.value.cause


@pytest.mark.fault("F33", "a busy directory and two ranks", "both ranks get the same refusal")
def test_f33_all_ranks_get_the_verdict_of_rank_zero(tmp_path: Path, run_ranks: Any) -> None:
    busy = tmp_path / "busy"
    busy.mkdir()
    with another_process(lambda: hold(busy)) as pid:
        first, second = run_ranks(2, lock_free_and_busy, tmp_path / "run", busy)
    assert first == second
    assert f"process {pid}" in first
