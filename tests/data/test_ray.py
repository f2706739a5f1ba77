"""The Ray engine with two local workers, for real: same results and bytes as processes, same errors.

Run it with: pytest -m slow tests/data/test_ray.py. Last result: 9 passed in 92 s, ray 2.60.0, 2 busy cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clipkit.cli.app import main
from clipkit.data.engine import Engine
from clipkit.types import ClipkitError, DataError
from tests.data.makers import good, write_tar
from tests.data.making.makers import table
from tests.data.test_engine import die, refuse, square
from tests.data.test_reshard import command, visible_bytes, write_inputs

pytestmark = pytest.mark.slow  # starting Ray takes 10 to 50 s


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    module = pytest.importorskip("ray")
    yield module
    module.shutdown()


def test_results_and_errors_are_those_of_processes(ray: Any) -> None:
    engine = Engine(2, "ray")
    assert list(engine.map(square, [(n,) for n in range(10)])) == [n * n for n in range(10)]
    assert list(engine.map(partial(pow, 2), [(n,) for n in range(5)])) == [1, 2, 4, 8, 16]
    seen: list[int] = []
    with pytest.raises(DataError, match="part 3 is bad") as caught:
        list(engine.map(refuse, [(n,) for n in range(8)], seen.append))
    assert seen == [0, 1, 2]
    assert caught.value.cure == "mend it"
    with pytest.raises(FileNotFoundError):
        list(engine.map(os.stat, [("no such file",)]))
    with pytest.raises(ClipkitError, match="a Ray worker failed"):
        list(engine.map(die, [(n,) for n in range(4)]))


def test_a_reshard_gives_the_bytes_of_processes(ray: Any, tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", [40, 3, 77])
    options = ["--samples-per-shard", 9, "--split", "0.7/0.3"]
    assert command(inputs, "--out", tmp_path / "a", *options, "--workers", 2) == 0
    assert command(inputs, "--out", tmp_path / "b", *options, "--workers", 2, "--engine", "ray") == 0
    assert visible_bytes(tmp_path / "a") == visible_bytes(tmp_path / "b")
    (inputs / "00001.tar").write_bytes(b"no tar" * 100)
    assert command(inputs, "--out", tmp_path / "c", "--workers", 2, "--engine", "ray") == 3


JOBS: dict[str, tuple[str, ...]] = {
    "make-shards": ("--samples-per-shard", "6"),
    "check-shards": (),
    "stats": (),
    "filter": ("--min-words", "2"),
    "dedup": ("--by", "image", "--by", "phash"),
    "hard-captions": (),
}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_gives_the_bytes_of_processes(ray: Any, tmp_path: Path, job: str) -> None:
    if job == "make-shards":
        source = table(tmp_path)
    else:
        source = tmp_path / "in"
        source.mkdir()
        for shard in range(4):
            write_tar(source / f"{shard}.tar", [good(number) for number in range(7 * shard, 7 * shard + 7)])
    found = []
    for engine in ("processes", "ray"):
        folder = tmp_path / engine
        folder.mkdir()
        out = folder / ("report.jsonl" if job == "check-shards" else "out")
        options = ["--out", str(out), *JOBS[job], "--workers", "2", "--engine", engine]
        assert main(["data", job, str(source), *options]) == 0
        found.append(visible_bytes(folder))
    assert found[0] == found[1]
    assert found[0]


PARENT = """
import os, sys, time
from clipkit.data.engine import Engine
def part(number):
    return os.getpid()
for pid in Engine(2, "ray").map(part, [(n,) for n in range(4)]):
    print(pid, flush=True)
time.sleep(600)
"""


def test_a_killed_parent_leaves_no_worker(ray: Any) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        workers = {int(parent.stdout.readline()) for _ in range(4)}
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{worker}") for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.2)
