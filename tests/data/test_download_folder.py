"""The folder of a download: what is not clipkit's stays, and shards of an unknown list are not taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipkit.data.download_folder import RECORD, claimed, prepare
from clipkit.types import ConfigError

STATS = {"count": 1, "successes": 1, "failed_to_download": 0, "failed_to_resize": 0, "status_dict": {}}


@pytest.mark.parametrize("name", ["sizes.json", "manifest.json", "download.json", "package.json"])
def test_files_of_others_are_refused_and_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"name": "a web page"}')
    with pytest.raises(ConfigError, match=name), claimed(tmp_path, {"list": "a"}):
        raise AssertionError("was let in")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_own_files_are_kept_until_nothing_strange_is_found(tmp_path: Path) -> None:
    own = {
        "download.json": '{"format": "clipkit download 1"}', "sizes.json": "{}",
        "manifest.json": '{"format": "clipkit shards 1"}', ".clipkit-index-0.json": "{}",
    }  # fmt: skip
    for name, content in {**own, "strange.json": "[]"}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="strange"), claimed(tmp_path, {"list": "a"}):
        raise AssertionError("was let in")
    assert {path.name for path in tmp_path.iterdir()} == {*own, "strange.json"}
    (tmp_path / "strange.json").unlink()
    with claimed(tmp_path, {"list": "a"}):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


@pytest.mark.parametrize("record", [None, '{"list": '])
def test_finished_shards_without_a_record_are_refused(tmp_path: Path, record: str | None) -> None:
    (tmp_path / "00000.tar").write_bytes(b"precious")
    (tmp_path / "00000_stats.json").write_text(json.dumps(STATS))
    if record is not None:
        (tmp_path / RECORD).write_text(record)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="without a record") as found, claimed(tmp_path, {"list": "a"}):
        raise AssertionError("was let in")
    assert "another folder" in str(found.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
