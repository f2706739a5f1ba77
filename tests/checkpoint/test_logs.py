"""Log files are cut back to what the checkpoint knew, and never outside the run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipkit.checkpoint import log_lengths, truncate_logs
from clipkit.types import ClipkitError

NAMES = ("metrics.jsonl", "rejects.jsonl")


def test_lines_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2, "é": 1}\n', encoding="utf-8")
    lengths = log_lengths(tmp_path, NAMES)
    assert lengths == {"metrics.jsonl": metrics.stat().st_size, "rejects.jsonl": 0}
    kept = metrics.read_bytes()
    with metrics.open("a") as file:
        file.write('{"step": 3}\n{"st')
    (tmp_path / "rejects.jsonl").write_text('{"key": "a"}\n')
    assert truncate_logs(tmp_path, lengths) == {"metrics.jsonl": 16, "rejects.jsonl": 13}
    assert metrics.read_bytes() == kept
    assert (tmp_path / "rejects.jsonl").read_bytes() == b""
    assert truncate_logs(tmp_path, lengths) == {"metrics.jsonl": 0, "rejects.jsonl": 0}


def test_a_file_that_lost_its_end_is_cut_to_whole_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("one\ntwo\nthr")
    assert truncate_logs(tmp_path, {"metrics.jsonl": 100, "gone.jsonl": 5}) == {"metrics.jsonl": 3}
    assert (tmp_path / "metrics.jsonl").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ""])
def test_names_that_leave_the_run_directory_are_refused(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "outside").write_text("precious")
    with pytest.raises(ClipkitError, match="outside the run directory"):
        truncate_logs(run, {name: 0})
    assert (tmp_path / "outside").read_text() == "precious"
