"""Parts of data jobs: same results in the same order on any engine; a dead worker or parent hangs nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from clipkit.data.engine import Engine
from clipkit.types import ClipkitError, DataError


def square(number: int) -> int:
    time.sleep(0.01 * (number % 3))
    return number * number


def refuse(number: int) -> int:
    if number == 3:
        raise DataError("part 3 is bad", "mend it")
    return number


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order_and_parts_are_taken_late(workers: int) -> None:
    taken = []

    def parts() -> Iterator[tuple[int]]:
        for number in range(20):
            taken.append(number)
            yield (number,)

    results = Engine(workers).map(square, parts())
    assert next(results) == 0
    assert len(taken) <= 2 * workers
    assert list(results) == [number * number for number in range(1, 20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_a_part_arrives_as_it_is(workers: int) -> None:
    seen: list[int] = []
    with pytest.raises(DataError, match="part 3 is bad"):
        list(Engine(workers).map(refuse, [(n,) for n in range(8)], seen.append))
    assert seen == [0, 1, 2]


def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(ClipkitError, match="a worker process ended"):
        list(Engine(2).map(die, [(n,) for n in range(8)]))


PARENT = """
import os, signal, sys, time
from clipkit.data.engine import Engine
def part(number):
    print(os.getpid(), flush=True)
    time.sleep(60)
results = Engine(2).map(part, [(n,) for n in range(4)])
next(results)
"""


def test_workers_end_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while (left := [worker for worker in workers if os.path.exists(f"/proc/{worker}")]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left, "a worker outlived its parent"
