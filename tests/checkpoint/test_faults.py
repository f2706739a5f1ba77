"""Kills and full disks at every point inside a save: the last complete checkpoint is always there."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.checkpoint import CheckpointStore, CheckpointWriteError
from clipkit.checkpoint import manifest as manifest_files
from tests.checkpoint.children import (
    KILLED,
    assert_complete,
    die_at_call,
    in_child,
    on_call,
    save,
    single,
)

MOST_CALLS = 400


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Killed processes lose nothing that the kernel has; what a power cut would lose is test_store's subject.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".tmp-" in path.name or ".old-" in path.name]


def folder_with(tmp_path: Path, steps: tuple[int, ...]) -> Path:
    folder = tmp_path / "template"
    folder.mkdir()
    for step in steps:
        save(single(folder), step)
    return folder


SCENARIOS: dict[str, tuple[tuple[int, ...], int]] = {
    "first save": ((), 3),
    "with pruning": ((1, 2), 3),
    "same step again": ((2, 3), 3),
    "after a rollback": ((5, 9), 7),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_call_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path, scenario: str) -> None:
    before, step = SCENARIOS[scenario]
    template = folder_with(tmp_path, before)
    older = before[-1:]
    seen = set()
    for number in range(1, MOST_CALLS):
        folder = tmp_path / str(number)
        shutil.copytree(template, folder)

        def killed(folder: Path = folder, number: int = number) -> None:
            store = single(folder)
            die_at_call(number)
            save(store, step)

        status = os.waitstatus_to_exitcode(in_child(killed))
        assert status in (0, KILLED)
        store = single(folder)
        if older or status == 0:
            seen.add(assert_complete(store, (*older, step)))
        else:
            found = store.newest()
            seen.add(None if found is None else found.step)
        assert all(".tmp-" not in entry.name for entry in store.skipped)
        if status == 0:
            break
        survived_one = store.newest()
        store.prepare()
        assert [name for name in leftovers(folder) if ".tmp-" in name] == []
        if survived_one is not None:
            assert_complete(store, (survived_one.step,))
        save(store, step + 10)
        assert_complete(store, (step + 10,))
        if leftovers(folder):
            save(store, step + 11)
        assert leftovers(folder) == []
        assert len(list(folder.glob("step-*"))) <= 2
        assert store.warnings == []
        shutil.rmtree(folder)
    else:
        raise AssertionError("the save never finished")
    assert number > 25, "the calls of a save are no longer seen"
    assert seen == {*(older or [None]), step}, "kills before and after the commit are both covered"


def test_a_kill_in_the_middle_of_a_tensor_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, (1, 2))

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"\0" * 100)
        os._exit(KILLED)

    monkeypatch.setattr(manifest_files, "save_file", half)
    assert os.waitstatus_to_exitcode(in_child(lambda: save(single(folder), 3))) == KILLED
    monkeypatch.undo()
    assert_complete(single(folder), (2,))
    assert len(leftovers(folder)) == 1
    save(single(folder), 3)
    assert leftovers(folder) == []


def fail_at_call(number: int, fired: Path) -> Callable[[], None]:
    def full() -> None:
        fired.touch()
        raise OSError(28, "No space left on device")

    return on_call(number, full)


@pytest.mark.parametrize("scenario", ["with pruning", "same step again"])
def test_an_error_of_the_disk_at_any_call_costs_at_most_this_save(tmp_path: Path, scenario: str) -> None:
    before, step = SCENARIOS[scenario]
    template = folder_with(tmp_path, before)
    for number in range(1, MOST_CALLS):
        folder = tmp_path / str(number)
        shutil.copytree(template, folder)
        fired = tmp_path / f"fired-{number}"

        def failing(folder: Path = folder, number: int = number, fired: Path = fired) -> None:
            store = single(folder)
            stop = fail_at_call(number, fired)
            cause = ""
            try:
                save(store, step)
            except CheckpointWriteError as error:
                cause = error.cause
            stop()
            # An error after the rename is reported as one, and the checkpoint stands.
            assert_complete(store, (before[-1], step) if cause else (step,))
            assert cause == "" or "No space left on device" in cause
            # The process lives on, and so does the run.
            save(store, step + 1)
            assert_complete(store, (step + 1,))
            save(store, step + 2)
            assert leftovers(folder) == []
            assert len(list(folder.glob("step-*"))) == 2

        assert in_child(failing) == 0
        shutil.rmtree(folder)
        if not fired.exists():
            break
    assert 25 < number < MOST_CALLS, "every call of the save, and no more"


def test_a_file_size_limit_in_the_middle_of_the_weights(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, (1, 2))

    def work() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        store = single(folder)
        for _ in range(3):
            with pytest.raises(CheckpointWriteError):
                save(store, 3, tensors={"model": {"w": torch.zeros(200_000)}})
            assert sorted(p.name for p in folder.glob("[ls]*")) == [
                "latest",
                "step-00000001",
                "step-00000002",
            ]
            assert_complete(store, (2,))
        save(store, 4)
        assert_complete(store, (4,))

    assert in_child(work) == 0


def save_on_a_bad_disk(rank: int, world: int, folder: Path, victim: int, number: int) -> str:
    store = CheckpointStore(folder)
    if rank == victim:
        on_call(number, _raise)
    try:
        save(store, 3)
    except CheckpointWriteError as error:
        return error.cause
    return "saved"


def _raise() -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_never_disagree_about_a_save(
    tmp_path: Path, run_ranks: Callable[..., Any], victim: int
) -> None:
    template = folder_with(tmp_path, (1, 2))
    for number in (2, 6):
        folder = tmp_path / str(number)
        shutil.copytree(template, folder)
        outcomes = run_ranks(2, save_on_a_bad_disk, folder, victim, number)
        assert len(set(outcomes)) == 1
        assert_complete(single(folder), (3,) if outcomes[0] == "saved" else (2,))
