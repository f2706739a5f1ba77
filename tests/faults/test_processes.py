"""Processes that die, hang or are told to stop: the others say so and leave, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit.checkpoint import CheckpointStore, StopSignals
from clipkit.cli import main
from clipkit.data.loader import LoaderOptions, Source, open_train
from clipkit.dist import World
from clipkit.lock import process_start
from clipkit.train import loop, pretrain
from clipkit.types import ClipkitError
from tests.checkpoint.children import in_child
from tests.conftest import Ranks
from tests.data.makers import NoisyView, stream, worker_pids, write_shards
from tests.evaluation.layouts import captioned_csv
from tests.faults.killing import check_same
from tests.train.runs import train, values


def send(number: int, pid: int | None = None) -> None:
    os.kill(os.getpid() if pid is None else pid, number)


@pytest.mark.fault("F17", "SIGINT twice", "leaves at once with 130")
def test_f17_a_second_interrupt_leaves_at_once_with_130() -> None:
    def work() -> None:
        with StopSignals():
            try:
                send(signal.SIGINT)
                send(signal.SIGINT)
                time.sleep(60)
            finally:
                os._exit(3)

    assert os.waitstatus_to_exitcode(in_child(work)) == 130


@pytest.mark.fault("F17", "SIGINT twice, with a worker", "no orphan is left")
def test_f17_a_second_interrupt_takes_workers_along() -> None:
    import multiprocessing

    read, write = os.pipe()

    def work() -> None:
        os.close(read)
        with StopSignals():
            worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
            worker.start()
            send(signal.SIGINT)
            send(signal.SIGINT)

    began = time.monotonic()
    assert os.waitstatus_to_exitcode(in_child(work)) == 130
    os.close(write)
    # End of file comes when the last process that inherited the pipe is gone.
    assert os.read(read, 1) == b""
    os.close(read)
    assert time.monotonic() - began < 30


def poll_with_one_signal(rank: int, world: int, number: int) -> list[Any]:
    with StopSignals() as signals:
        answers = [signals.poll()]
        if rank == 1:
            send(number)
        answers += [signals.poll(), signals.poll()]
    return answers


@pytest.mark.parametrize(
    ("number", "wanted"),
    [
        (signal.SIGTERM, [(None, False), (15, False), (15, False)]),
        (signal.SIGUSR1, [(None, False), (None, True), (None, False)]),
    ],
)
@pytest.mark.fault("F17", "SIGTERM or SIGUSR1 to one of two ranks", "both save at the same step")
def test_f17_a_signal_to_one_rank_is_known_to_all(run_ranks: Any, number: int, wanted: list[Any]) -> None:
    assert run_ranks(2, poll_with_one_signal, int(number)) == [wanted, wanted]


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
@pytest.mark.timeout(600)
@pytest.mark.fault(
    "F18",
    "one of two ranks killed or stopped",
    "the other leaves within 60 s with exit 1, names host and process, and takes its workers along; the "
    "checkpoint is valid",
)
def test_f18_a_rank_that_is_missing_is_named_and_the_other_leaves(
    tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int, message: str
) -> None:
    # One that is gone is seen at once; one that is silent, only after the time limit.
    limit = "60s" if number == signal.SIGKILL else "15s"
    config = values(tiny_shards, tmp_path / "run", run__steps=5000, run__timeout=limit, data__workers=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    ranks = Ranks(2, command, str(tmp_path / "run.yaml"))
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        assert eventually(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 6, 400)
        # Saved in the background: it appears some steps later.
        assert eventually(lambda: (tmp_path / "run" / "checkpoints" / "latest").exists(), 60)
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
        # A worker of the killed rank may die with one of torch's; the command itself shows none.
        assert not re.search(r'File ".*clipkit/(cli|train)/', error)
        found = CheckpointStore(tmp_path / "run" / "checkpoints", World()).newest()
        assert found is not None
        assert found.step >= 5
    finally:
        ranks.kill()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), [50, 30])


@pytest.mark.fault(
    "F19", "kill -9 of a loader worker", "the run stops and says that a worker was lost, with the usual cause"
)
def test_f19_a_killed_worker_is_reported(shards: Path) -> None:
    before = set(worker_pids())
    opened = stream(shards, 8, workers=1, prefetch=1)
    batches = opened.batches(0, 10)
    next(batches)
    (worker,) = [pid for pid in worker_pids() if pid not in before]
    os.kill(worker, signal.SIGKILL)
    with pytest.raises((ClipkitError, RuntimeError), match="worker"):
        list(batches)
    opened.close()


@pytest.fixture(scope="module")
def straight(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of 12 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    Ranks(1, train, values(tiny_shards, folder, run__steps=12, run__checkpoint_every=100)).values()
    return folder


def train_with_a_signal(rank: int, world: int, config: dict[str, Any], where: str, number: int) -> str:
    """Trains, and gets a signal inside its first evaluation, save or fourth step; returns how it ended."""

    def interrupted(original: Any, call: int) -> Any:
        left = call

        def inside(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return original(*arguments, **named)

        return inside

    # As a terminal leaves it; under nohup it is ignored, and stays so.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if where == "evaluation":
        loop.evaluate = interrupted(loop.evaluate, 1)  # type: ignore[assignment]
    elif where == "save":
        CheckpointStore.save = interrupted(CheckpointStore.save, 1)  # type: ignore[method-assign]
    else:
        loop.step = interrupted(loop.step, 4)  # type: ignore[assignment]
    try:
        pretrain(config)
    except loop.Interrupted as error:
        return f"{error.exit_code}: {error.cause}"
    return ""


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("step", signal.SIGTERM),
        ("step", signal.SIGINT),
        ("step", signal.SIGHUP),
        ("step", signal.SIGUSR1),
        ("evaluation", signal.SIGTERM),
        ("save", signal.SIGTERM),
    ],
)
@pytest.mark.fault(
    "F17",
    "SIGTERM, SIGINT or SIGHUP in a step; SIGTERM in an evaluation and in a save",
    "a checkpoint at the end of the step, exit 130; the continued run equals the unbroken one bit for bit",
)
@pytest.mark.fault(
    "F17", "SIGUSR1 in a step", "a checkpoint at the end of the step; the run goes on and changes nothing"
)
def test_f17_a_signal_costs_nothing(
    tiny_shards: Path, tmp_path: Path, straight: Path, where: str, number: signal.Signals
) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=12, run__checkpoint_every=100)
    if where == "evaluation":
        data = captioned_csv(tmp_path / "set", [[f"picture {one}"] for one in range(6)])
        config["run"] |= {"evaluate": [{"task": "retrieval", "data": str(data)}], "evaluate_every": 5}
    if where == "save":
        config["run"]["checkpoint_every"] = 3
    (ended,) = Ranks(1, train_with_a_signal, config, where, int(number)).values()
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    if number == signal.SIGUSR1:
        assert (ended, saved) == ("", ["step-00000004", "step-00000012"])
    else:
        assert ended.startswith(f"130: stopped by {number.name} after step")
        assert saved[-1] < "step-00000012"
        Ranks(1, train, config).values()
    check_same(tmp_path / "run", straight)


class FailingView(NoisyView):
    """An augmentation with a defect that two samples meet, or one that never comes back."""

    hangs = False

    def __call__(self, image: Any) -> Any:
        if self.hangs:
            time.sleep(600)
        raise ZeroDivisionError("float division by zero")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.fault(
    "F19",
    "an augmentation that raises, in the main process and in a loader worker",
    "error that names the sample and its shard",
)
def test_f19_what_an_augmentation_raises_names_the_sample(shards: Path, workers: int) -> None:
    opened = open_train(
        LoaderOptions(Source(str(shards)), 8, 0, workers=workers), [FailingView(size=(8, 8))], [], World()
    )
    with pytest.raises(ClipkitError, match=r"at sample 0000\d\d in .*0000\d\.tar \(ZeroDivisionError: float"):
        next(opened.batches(0, 2))
    opened.close()


@pytest.mark.fault(
    "F19",
    "a loader worker that hangs",
    "after `run.timeout` the run ends and says that the workers built nothing",
)
def test_f19_a_worker_that_hangs_is_given_up(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingView, "hangs", True)
    before = set(worker_pids())
    options = LoaderOptions(Source(str(shards)), 8, 0, workers=1, timeout=1.0, start_method="fork")
    opened = open_train(options, [FailingView(size=(8, 8))], [], World())
    batches = opened.batches(0, 2)
    try:
        with pytest.raises(ClipkitError, match="have built nothing for 1 s"):
            next(batches)
    finally:
        for pid in set(worker_pids()) - before:
            os.kill(pid, signal.SIGKILL)
