"""The folder of a download: what is not clipkit's stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipkit.data.download_folder import LOCK, claimed, prepare
from clipkit.types import ConfigError


@pytest.mark.parametrize("name", ["sizes.json", "manifest.json", "download.json", "package.json"])
def test_files_of_others_are_refused_and_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"name": "a web page"}')
    with pytest.raises(ConfigError, match=name), claimed(tmp_path):
        raise AssertionError("was let in")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_own_files_are_kept_until_nothing_strange_is_found(tmp_path: Path) -> None:
    own = {
        "download.json": '{"format": "clipkit download 1"}', "sizes.json": "{}",
        "manifest.json": '{"format": "clipkit shards 1"}', ".clipkit-index-0.json": "{}",
    }  # fmt: skip
    for name, content in {**own, "strange.json": "[]"}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="strange"), claimed(tmp_path):
        raise AssertionError("was let in")
    assert {path.name for path in tmp_path.iterdir()} == {*own, "strange.json"}
    (tmp_path / "strange.json").unlink()
    with claimed(tmp_path):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
