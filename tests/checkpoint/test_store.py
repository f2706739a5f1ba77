"""The store: what is saved comes back bit for bit, damage is noticed and named, pruning keeps two."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkit.checkpoint import CheckpointWriteError
from clipkit.types import ClipkitError, ConfigError
from tests.checkpoint.children import assert_complete, flip_byte, save, single, tensors_of

AWKWARD = {
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "fp16": torch.randn(3).half(),
    "fp64": torch.tensor([1 / 3, -0.0, 5e-324], dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "int64": torch.tensor([2**62, -1]),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(4, 3).t(),
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "strided": torch.randn(10)[::3],
    "expanded": torch.randn(1, 3).expand(4, 3),
    "mask": torch.tensor([0.0, -torch.inf]),
}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = single(tmp_path / "checkpoints")
    save(store, 1, tensors={"model": AWKWARD, "optimizer": {}})
    found = store.newest()
    assert found is not None
    read = found.tensors("model")
    assert read.keys() == AWKWARD.keys()
    for name, tensor in AWKWARD.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(read[name]) == bits(tensor), name
    assert found.tensors("optimizer") == {}


def test_tensors_that_share_memory_are_each_saved_under_their_name(tmp_path: Path) -> None:
    table = torch.nn.Parameter(torch.randn(6, 2))
    state = {"a": table, "tied": table, "part": table[2:4], "column": table[:, 0]}
    store = single(tmp_path)
    save(store, 1, tensors={"model": state})
    read = store.newest().tensors("model")  # type: ignore[union-attr]
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_documents_and_identity_come_back(tmp_path: Path) -> None:
    document = {"loss": 0.1 + 0.2, "nested": {"list": [1, None, "é\n"]}, "flag": True}
    store = single(tmp_path)
    path = save(store, 12, documents={"trainer": document}, identity={"betas": (0.9, 0.98)})
    found = store.open(path)
    assert found.document("trainer") == document
    assert found.identity == {"betas": [0.9, 0.98]}
    assert (found.step, found.world_size, found.rank_tensors(1)) == (12, 1, None)
    with pytest.raises(ClipkitError, match=r"holds no data\.json"):
        found.document("data")


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    path = save(single(tmp_path), 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


def test_what_never_changes_is_written_once_and_outlives_pruning(tmp_path: Path) -> None:
    store = single(tmp_path)
    save(store, 1)
    (shared,) = tmp_path.glob("model-*.safetensors")
    written = shared.stat()
    for step in (2, 3, 4):
        save(store, step)
    save(single(tmp_path), 5)
    assert list(tmp_path.glob("model-*.safetensors")) == [shared]
    assert (shared.stat().st_ino, shared.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert load_file(tmp_path / "step-00000005/model.safetensors").keys() == tensors_of(5)["model"].keys()
    assert_complete(single(tmp_path), (5,))
    flip_byte(shared)
    with pytest.raises(ClipkitError, match=rf"\.\./{shared.name} was changed"):
        single(tmp_path).newest()
    shared.unlink()
    with pytest.raises(ClipkitError, match=rf"{shared.name} is missing \(it lies beside"):
        single(tmp_path).open(tmp_path / "step-00000005")


def test_a_damaged_file_of_what_never_changes_is_written_again(tmp_path: Path) -> None:
    save(single(tmp_path), 1)
    (shared,) = tmp_path.glob("model-*.safetensors")
    shared.write_bytes(shared.read_bytes()[:-8])
    save(single(tmp_path), 2)
    assert_complete(single(tmp_path), (2,))
    single(tmp_path).open(tmp_path / "step-00000001")


def test_tensors_that_did_change_after_all_are_not_mistaken(tmp_path: Path) -> None:
    store, trunk = single(tmp_path), torch.zeros(3)
    for step in (1, 2):
        save(store, step, tensors={"model": {}}, fixed={"model": {"trunk": trunk}})
        found = store.newest()
        assert found is not None
        assert torch.equal(found.tensors("model")["trunk"], trunk)
        trunk += 1


def test_mode_bits_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(single(tmp_path / "checkpoints"), 1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert stat.S_IMODE((path.parent / "latest").stat().st_mode) == 0o640


def test_a_fresh_folder_has_no_newest_and_reading_creates_nothing(tmp_path: Path) -> None:
    assert single(tmp_path / "checkpoints").newest() is None
    assert not (tmp_path / "checkpoints").exists()


def test_pruning_keeps_the_newest_and_numbers_beyond_eight_digits_sort(tmp_path: Path) -> None:
    store = single(tmp_path, keep=2)
    for step in (1, 20, 99_999_999, 100_000_000):
        save(store, step)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-100000000", "step-99999999"]
    assert_complete(store, (100_000_000,))
    with pytest.raises(ConfigError, match="keep_checkpoints is 1"):
        single(tmp_path, keep=1)


def test_pruning_does_not_count_damaged_checkpoints_as_kept(tmp_path: Path) -> None:
    store = single(tmp_path)
    for step in (1, 2):
        save(store, step)
    flip_byte(tmp_path / "step-00000002" / "model.safetensors")
    save(store, 3)
    assert (tmp_path / "step-00000001").is_dir(), "the second newest intact one must survive"
    assert any("step-00000002 is damaged" in line for line in store.warnings)
    flip_byte(tmp_path / "step-00000003" / "model.safetensors")
    assert_complete(store, (1,))
    # Another process, which remembers nothing of what was verified, decides the same.
    save(single(tmp_path), 4)
    assert (tmp_path / "step-00000001").is_dir()
    save(single(tmp_path), 5)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004", "step-00000005"]


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    store = single(tmp_path)
    save(store, 4)
    save(store, 5)
    save(store, 5, documents={"trainer": {"again": True}})
    assert store.newest().document("trainer") == {"again": True}  # type: ignore[union-attr]
    assert sorted(p.name for p in tmp_path.glob("[ls]*")) == ["latest", "step-00000004", "step-00000005"]


def test_after_a_rollback_the_lower_step_is_the_newest(tmp_path: Path) -> None:
    store = single(tmp_path)
    for step in (100, 200):
        save(store, step)
    save(store, 150)
    assert_complete(store, (150,))
    save(store, 160)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000150", "step-00000160"]


def test_open_takes_latest_and_refuses_what_is_not_there(tmp_path: Path) -> None:
    store = single(tmp_path)
    save(store, 3)
    assert store.open(tmp_path / "latest").step == 3
    with pytest.raises(ConfigError, match="there is no checkpoint directory"):
        store.open(tmp_path / "step-00000004")


def test_an_unusable_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        single(tmp_path / "file" / "checkpoints").prepare()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_saved(tmp_path: Path, value: float) -> None:
    store = single(tmp_path)
    save(store, 1)
    bad = {"model": {"fine": torch.ones(2), "towers.w": torch.tensor([1.0, value])}}
    with pytest.raises(CheckpointWriteError, match=r"towers\.w holds values that are not finite"):
        save(store, 2, tensors=bad)
    assert_complete(store, (1,))


def test_everything_is_durable_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the rename must find every byte on disk: file, directory, then parent."""
    synced: list[int] = []
    renamed: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(source: Path, target: Path) -> None:
        assert {file.stat().st_ino for file in source.iterdir()} <= set(synced)
        assert synced[-1] == source.stat().st_ino
        renamed.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    save(single(tmp_path), 1)
    assert renamed == ["step-00000001"]
    assert synced[-1] == tmp_path.stat().st_ino
