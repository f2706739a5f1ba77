"""`clipkit doctor --distributed`: true between healthy ranks, and it names what is wrong between others."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from clipkit import dist, doctor
from clipkit.cli import main
from clipkit.doctor import Finding, examine_ranks


def examine(rank: int, world: int, folders: list[str], wrong: str | None) -> list[Finding]:
    if wrong is not None:
        doctor._SIZES = (1000,)
    if rank == 1 and wrong == "gather":
        gather = dist.gather
        dist.gather = lambda x: gather(x).flip(0)
    if rank == 1 and wrong == "all-reduce":
        reduce = dist.all_reduce_sum
        dist.all_reduce_sum = lambda x: reduce(x) + 1
    return examine_ranks(Path(folders[rank]))


def test_healthy_ranks_are_described_and_timed(run_ranks: Any, tmp_path: Path) -> None:
    one, two = run_ranks(2, examine, [str(tmp_path / "runs" / "new")] * 2, None)
    assert one == two, "every rank exits with the same code"
    assert [finding for finding in one if finding.cure] == []
    found = {finding.name: finding.value for finding in one}
    assert found["world"] == f"2 ranks ({socket.gethostname()}: 2)"
    assert found["backend"] == "gloo"
    assert {found["rank 0"].split(",")[0], found["rank 1"].split(",")[0]} == {
        f"cpu on {socket.gethostname()}"
    }
    for name in ("all-reduce", "gather"):
        assert found[name] == "the expected value on every rank"
        for size in ("1 MB", "64 MB"):
            speed, unit = found[f"{name} of {size}"].split()[:2]
            assert unit == "GB/s"
            assert 0 < float(speed) < 1000
    assert found["run directory"] == f"{tmp_path}: shared by all ranks"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("wrong", ["all-reduce", "gather", "run directory"])
def test_what_is_wrong_between_ranks_is_named(run_ranks: Any, tmp_path: Path, wrong: str) -> None:
    folders = [str(tmp_path / name) for name in ("a", "b" if wrong == "run directory" else "a")]
    for folder in set(folders):
        os.mkdir(folder)
    for found in run_ranks(2, examine, folders, wrong):
        (problem,) = [finding for finding in found if finding.cure]
        assert problem.name == wrong
        assert "rank 1" in problem.value


def test_two_ranks_on_one_gpu_and_two_versions_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    rank = {"host": "a", "pid": 1, "device": "cuda:0", "kind": "", "versions": "torch 2.15"}
    found = doctor._who(
        [rank, {**rank, "device": "cuda:1"}, rank, {**rank, "host": "b", "versions": "torch 2.11"}]
    )
    assert Finding("backend", "nccl") in found
    problems = {finding.name: finding.cure for finding in found if finding.cure}
    assert list(problems) == ["rank 2", "versions"]
    assert "shared with rank 0" in problems["rank 2"]


def test_without_a_launcher_it_says_how_to_start(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["doctor", "--distributed"]) == 2
    assert "torchrun --nproc_per_node 2 -m clipkit doctor --distributed" in capsys.readouterr().err
