"""Several ranks write one checkpoint, and no two of them ever disagree about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipkit.checkpoint import CheckpointStore, CheckpointWriteError
from clipkit.checkpoint import manifest as manifest_files
from clipkit.types import ClipkitError
from tests.checkpoint.children import flip_byte, save, single


def save_and_read(rank: int, world: int, folder: Path) -> dict[str, Any]:
    store = CheckpointStore(folder)
    store.prepare()
    path = save(store, 3)
    found = store.newest()
    assert found is not None
    own = found.rank_tensors(rank)
    assert own is not None
    return {
        "path": path.name,
        "own": own["state"].tolist(),
        "beyond": found.rank_tensors(world),
        "files": sorted(file.name for file in path.iterdir()),
    }


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_write_into_one_checkpoint(tmp_path: Path, run_ranks: Any, world: int) -> None:
    results = run_ranks(world, save_and_read, tmp_path / "checkpoints")
    assert [result["own"] for result in results] == [[3, rank] for rank in range(world)]
    assert {result["path"] for result in results} == {"step-00000003"}
    assert results[0]["beyond"] is None
    assert {f"rng-rank{rank}.safetensors" for rank in range(world)} <= set(results[0]["files"])
    found = single(tmp_path / "checkpoints").newest()
    assert found is not None
    assert found.world_size == world


def fail_on(rank: int, world: int, folder: Path, failing: int) -> list[str]:
    store = CheckpointStore(folder)
    save(store, 1)
    messages = []
    write = manifest_files.write_tensors
    if rank == failing:

        def no_space(path: Path, tensors: Any) -> Any:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        manifest_files.write_tensors = no_space
    try:
        save(store, 2)
    except CheckpointWriteError as error:
        messages.append(error.cause)
    manifest_files.write_tensors = write
    kept = store.newest()
    assert kept is not None
    assert kept.step == 1
    assert [p.name for p in folder.glob("*.tmp-*")] == []
    save(store, 3)
    newest = store.newest()
    assert newest is not None
    assert newest.step == 3
    return messages


@pytest.mark.parametrize("failing", [0, 1])
def test_one_failing_rank_fails_the_save_on_all_alike(tmp_path: Path, run_ranks: Any, failing: int) -> None:
    messages = run_ranks(2, fail_on, tmp_path / "checkpoints", failing)
    assert messages[0] == messages[1]
    assert f"(rank {failing}: OSError: [Errno 28] No space left on device)" in messages[0][0]


def read_damaged(rank: int, world: int, folder: Path) -> tuple[str, int, str, str]:
    store = CheckpointStore(folder)
    found = store.newest()
    assert found is not None
    skipped = str(store.skipped)
    causes = []
    for path in (folder / "step-00000002", folder / "step-00000099"):
        with pytest.raises(ClipkitError) as refused:
            store.open(path)
        causes.append(f"{refused.value.exit_code} {refused.value}")
    return skipped, found.step, causes[0], causes[1]


def test_all_ranks_agree_on_what_is_newest_and_what_is_refused(tmp_path: Path, run_ranks: Any) -> None:
    store = single(tmp_path)
    save(store, 1)
    flip_byte(save(store, 2) / "model.safetensors")
    first, second = run_ranks(2, read_damaged, tmp_path)
    assert first == second
    assert first[1] == 1
    assert "model.safetensors was changed" in first[0]
