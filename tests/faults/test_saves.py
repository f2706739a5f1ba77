"""Kills and full disks at every point inside a save: the last complete checkpoint is always there."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clipkit.checkpoint import CheckpointStore, CheckpointWriteError, run_lock
from clipkit.checkpoint import manifest as manifest_files
from clipkit.cli import main
from clipkit.dist import World
from clipkit.train import pretrain
from clipkit.types import ClipkitError, ConfigError
from tests.checkpoint.children import (
    KILLED,
    assert_complete,
    die_at_call,
    flip_byte,
    in_child,
    on_call,
    save,
    single,
)
from tests.commands import fails, write
from tests.train.runs import values

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
@pytest.mark.fault(
    "F2",
    "kill -9 before every call to the disk of a save: the first, one that prunes, one of the same step, one "
    "after a rollback",
    "the newest complete checkpoint is found, and later saves clear what was left",
)
def test_f02_a_kill_at_any_call_of_a_save_leaves_a_complete_checkpoint(tmp_path: Path, scenario: str) -> None:
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


@pytest.mark.fault(
    "F2",
    "kill -9 in the middle of a file of weights",
    "the checkpoint before it; the rest is cleared by the next save",
)
def test_f02_a_kill_in_the_middle_of_a_tensor_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
@pytest.mark.fault(
    "F15",
    '"No space left" at every call to the disk of a save',
    "this save fails at most; the process goes on and the next one succeeds",
)
def test_f15_an_error_of_the_disk_at_any_call_costs_at_most_this_save(tmp_path: Path, scenario: str) -> None:
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


@pytest.mark.fault(
    "F15",
    "a limit of the kernel on file sizes, three saves in a row",
    "each fails and leaves nothing; the old checkpoints stand",
)
def test_f15_a_file_size_limit_in_the_middle_of_the_weights(tmp_path: Path) -> None:
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
@pytest.mark.fault(
    "F15", "an I/O error on one of two ranks", "both ranks report the same failed save, or the same saved one"
)
def test_f15_ranks_never_disagree_about_a_save(
    tmp_path: Path, run_ranks: Callable[..., Any], victim: int
) -> None:
    template = folder_with(tmp_path, (1, 2))
    for number in (2, 6):
        folder = tmp_path / str(number)
        shutil.copytree(template, folder)
        outcomes = run_ranks(2, save_on_a_bad_disk, folder, victim, number)
        assert len(set(outcomes)) == 1
        assert_complete(single(folder), (3,) if outcomes[0] == "saved" else (2,))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change_step(path: Path) -> None:
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))


def newer_format(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "flipped byte": ("model.safetensors", flip_byte, r"model\.safetensors was changed"),
    "flipped byte in the random states": ("rng-rank0.safetensors", flip_byte, "rng-rank0"),
    "cut file": ("optimizer.safetensors", truncate, r"optimizer\.safetensors has \d+ bytes instead of \d+"),
    "empty file": ("data.json", lambda path: path.write_bytes(b""), r"data\.json has 0 bytes"),
    "missing file": ("rng-rank0.safetensors", Path.unlink, r"rng-rank0\.safetensors is missing"),
    "directory in its place": (
        "trainer.json",
        lambda path: (path.unlink(), path.mkdir()),
        r"trainer\.json (has|cannot)",
    ),
    "no manifest": ("manifest.json", Path.unlink, r"has no manifest\.json"),
    "empty manifest": ("manifest.json", lambda path: path.write_bytes(b""), "is not JSON"),
    "garbage manifest": ("manifest.json", lambda path: path.write_bytes(b"\xff\x00{"), "is not JSON"),
    "deep manifest": ("manifest.json", lambda path: path.write_text("[" * 100_000), "is not JSON"),
    "other JSON": ("manifest.json", lambda path: path.write_text('["format"]'), "is not that of"),
    "edited manifest": ("manifest.json", change_step, "its own hash differs"),
    "newer format": ("manifest.json", newer_format, "newer clipkit"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.fault(
    "F24",
    "a checkpoint written by a newer format",
    "passed over with the reason; asked for by its path, an error with a cure",
)
@pytest.mark.fault(
    "F25",
    "a checkpoint with a flipped byte, a cut, empty or missing file (random states among them), without a "
    "manifest or with another one",
    "passed over with the reason for the one before; asked for by its path, an error; a new save takes "
    "its place",
)
def test_f24_f25_damage_is_passed_over_with_its_reason_and_refused_when_asked_for(
    tmp_path: Path, kind: str
) -> None:
    name, harm, reason = DAMAGE[kind]
    store = single(tmp_path)
    save(store, 1)
    path = save(store, 2)
    harm(path / name)
    assert_complete(store, (1,))
    assert [entry.name for entry in store.skipped] == ["step-00000002"]
    with pytest.raises(ClipkitError, match=reason) as refused:
        store.open(path)
    assert (refused.value.exit_code, str(path) in refused.value.cause) == (1, True)
    assert "--resume auto" in refused.value.cure
    assert "\n" not in refused.value.cause
    harm(tmp_path / "step-00000001" / name)
    with pytest.raises(ClipkitError, match=r"no checkpoint in .* is intact: .*step-00000002.*step-00000001"):
        store.newest()
    # The run goes on: a new save of a damaged step takes its place.
    save(store, 2)
    assert_complete(store, (2,))


@pytest.mark.parametrize("content", [b"", b"step-00000077\n", b"\xff\xfe", b"../../etc\n"])
@pytest.mark.fault(
    "F25", "`latest` empty, garbage, pointing to what is gone or outside", "reported; the manifests decide"
)
def test_f25_a_broken_latest_is_reported_and_not_needed(tmp_path: Path, content: bytes) -> None:
    store = single(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / "latest").write_bytes(content)
    assert_complete(store, (2,))
    assert [entry.name for entry in store.skipped] == ["latest"]
    (tmp_path / "latest").unlink()
    assert_complete(store, (2,))
    assert store.skipped == []


@pytest.mark.fault("F25", "a checkpoint renamed by hand", "passed over with the reason")
def test_f25_a_checkpoint_renamed_by_hand(tmp_path: Path) -> None:
    store = single(tmp_path)
    save(store, 1)
    save(store, 2).rename(tmp_path / "step-00000009")
    assert_complete(store, (1,))
    assert "step 2" in str(store.skipped)


@pytest.mark.fault(
    "F25",
    "only what killed saves left behind, beside files of others",
    "removed; files of others stay; a run begins anew",
)
def test_f25_foreign_entries_are_left_alone_and_leftovers_removed(tmp_path: Path) -> None:
    store = single(tmp_path)
    for name in ("step-00000009.tmp-0123456789ab", "notes", "step-9", "best.tmp-0123456789ab"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest.tmp-0123456789ab").write_text("x")
    store.prepare()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.tmp-0123456789ab", "notes", "step-9"]
    assert store.newest() is None


@pytest.mark.fault(
    "F15", "less free space than 1.2 times the checkpoint", "nothing is begun; the old ones stay"
)
def test_f15_too_little_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = single(tmp_path)
    save(store, 1)
    state = {"model": {"w": torch.zeros(1000)}}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4799))
    with pytest.raises(CheckpointWriteError, match="MB are wanted"):
        save(store, 2, tensors=state, rank_tensors={})
    assert_complete(store, (1,))
    assert sorted(p.name for p in tmp_path.glob("[ls]*")) == ["latest", "step-00000001"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4800))
    save(store, 2, tensors=state, rank_tensors={})


@pytest.mark.fault(
    "F15",
    "a disk that is full at two saves, has room, and is full at three",
    "training goes on with a warning; three in a row end the run; the last checkpoint is intact",
)
def test_f15_a_disk_that_is_full_in_the_background(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, tried = CheckpointStore.save, []

    def full(self: CheckpointStore, step: int, **parts: Any) -> Path:
        tried.append(step)
        if step in (2, 3, 5, 6, 7):
            raise CheckpointWriteError(f"no space for {step}", "free some space")
        return save(self, step, **parts)

    monkeypatch.setattr(CheckpointStore, "save", full)
    with pytest.raises(CheckpointWriteError, match="no space for 7"):
        pretrain(values(tiny_shards, tmp_path / "run", run__checkpoint_every=1))
    assert tried == [1, 2, 3, 4, 5, 6, 7]
    assert "warning: no space for 2" in capsys.readouterr().err
    newest = CheckpointStore(tmp_path / "run" / "checkpoints", World()).newest()
    assert newest is not None
    assert newest.step == 4


@pytest.mark.fault("F15", "a disk that is full at the last save", "the run fails")
def test_f15_a_failed_last_save_ends_the_run(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saves: list[int] = []

    def full_disk(self: Any, step: int, **parts: Any) -> Path:
        saves.append(step)
        raise CheckpointWriteError("no space left on device", "free some space")

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointStore, "save", full_disk)
        with pytest.raises(CheckpointWriteError, match="no space"):
            pretrain(values(tiny_shards, tmp_path / "run", run__steps=6, run__checkpoint_every=3))
    assert saves == [3, 6], "the failure at step 3 was survived, the one at the end was not"
    assert "warning: no space left" in capsys.readouterr().err


@pytest.mark.fault(
    "F25",
    "`--resume PATH` of a cut checkpoint",
    "exit 1; nothing is written over: with the bytes back the run is complete",
)
def test_f25_a_cut_checkpoint_named_by_hand(
    capsys: pytest.CaptureFixture[str], tiny_shards: Path, tmp_path: Path
) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=2)
    pretrain(config)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    model = checkpoint / "model.safetensors"
    kept = model.read_bytes()
    model.write_bytes(kept[: len(kept) // 2])
    path = write(config, tmp_path / "c.yaml")
    assert fails(capsys, 1, "model.safetensors", "pretrain", path, "--resume", checkpoint)
    # Nothing was written over: with the bytes back, the run is as complete as before.
    model.write_bytes(kept)
    assert main(["pretrain", str(path)]) == 0


@pytest.mark.fault(
    "F16",
    "a run directory without permission to write, or whose name is a file",
    "refused before shards are opened or a model is built",
)
def test_f16_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written to"):
        pretrain(values(tmp_path / "no shards", tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)

        def start() -> None:
            if os.getuid() == 0:
                os.seteuid(65534)
            with pytest.raises(ConfigError, match="cannot be written to"), run_lock(Path(name) / "run"):
                pass

        assert in_child(start) == 0
        assert list(Path(name).iterdir()) == []


@pytest.mark.fault(
    "F24",
    "a checkpoint of another width, its configuration gone",
    "error that names the first ten tensors that differ; nothing is loaded, nothing written over",
)
def test_f24_a_checkpoint_of_another_model(tiny_shards: Path, tmp_path: Path) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=2, run__weight_ema=False)
    pretrain(config)
    (tmp_path / "run" / "config.yaml").unlink()
    config["model"] = {**config["model"], "embed_dim": 24}
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*.*")}
    with pytest.raises(ClipkitError, match="the checkpoint is of another model: ") as caught:
        pretrain(config)
    assert "towers.clip.visual.proj is (32, 16) in the checkpoint and (32, 24)" in caught.value.cause
    assert caught.value.cause.count(";") <= 10
    assert {path: path.read_bytes() for path in before} == before
