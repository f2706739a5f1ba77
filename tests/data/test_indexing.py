"""`clipkit index` at scale: continued, shared between machines, forecast, and compared with other counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipkit.data.indexing
import clipkit.data.remote
from clipkit.cli import main
from clipkit.data.indexing import RECORDS, Indexing, build_index, read_record, write_record
from clipkit.data.scan import scan_shard
from clipkit.data.source import expand_shards
from clipkit.types import DataError
from tests.data.makers import good, same, stream, take, write_shards, write_tar
from tests.data.servers import serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "set", [5, 3, 7, 2, 4, 6])


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are walked, in order."""
    names: list[str] = []

    def counting(path: str, *options: Any) -> Any:
        names.append(Path(path).stem)
        return scan_shard(path, *options)

    monkeypatch.setattr(clipkit.data.indexing, "scan_shard", counting)
    return names


def test_a_record_is_the_walk(folder: Path, tmp_path: Path) -> None:
    path = str(folder / "00000.tar")
    scan = scan_shard(path)
    write_record(tmp_path, path, scan)
    now = (scan.size, scan.stamp)
    found = read_record(tmp_path, path, now)
    assert found is not None
    assert np.array_equal(found.starts, scan.starts)
    assert found._replace(starts=scan.starts) == scan
    assert read_record(tmp_path, path, (scan.size, scan.stamp + 1)) is None
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PK\x03\x04rubbish", whole[:-40] + bytes(40)):
        file.write_bytes(damaged)
        assert read_record(tmp_path, path, now) is None
    write_record(tmp_path / "absent", path, scan)  # a folder that takes nothing costs the record only


def test_an_interrupted_walk_continues(folder: Path, walked: list[str]) -> None:
    paths = expand_shards(str(folder))
    whole = (folder / "00003.tar").read_bytes()
    (folder / "00003.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"00003\.tar"):
        build_index(paths)
    assert walked == ["00000", "00001", "00002", "00003"]
    assert len(list((folder / RECORDS).glob("*.npz"))) == 3
    (folder / "00003.tar").write_bytes(whole)
    walked.clear()
    index = build_index(paths)
    assert walked == ["00003", "00004", "00005"]
    assert index.counts.tolist() == [5, 3, 7, 2, 4, 6]
    # Once the whole index is there its parts are not.
    assert not (folder / RECORDS).exists()
    # A set that grew is walked where it grew, and a shard that changed alone is walked again.
    walked.clear()
    write_tar(folder / "00006.tar", [good(99)])
    write_tar(folder / "00001.tar", [good(50), good(51)])
    assert build_index(expand_shards(str(folder))).counts.tolist() == [5, 2, 7, 2, 4, 6, 1]
    assert walked == ["00001", "00006"]


def test_machines_share_a_set(
    folder: Path, tmp_path: Path, walked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    parts = [["--end", "2"], ["--start", "4"], ["--start", "2", "--end", "4"]]
    for part in parts:
        assert main(["index", str(folder), "--out", str(cache), *part]) == 0
    shown = capsys.readouterr()
    assert "2 shards to walk: " in shown.err
    assert "8 samples in 2 shards (numbers 0 to 1 of 6)" in shown.out
    assert len(walked) == 6
    assert not list(cache.glob(".clipkit-index*"))
    assert main(["index", str(folder), "--out", str(cache)]) == 0
    assert "27 samples in 6 shards, " in capsys.readouterr().out
    assert len(walked) == 6
    # Who else may need the records there is not known: they stay.
    assert len(list((cache / RECORDS).glob("*.npz"))) == 6
    # Training finds it there, and nothing was written beside the shards.
    assert "cache" in stream(folder, 4, index_dir=str(cache)).describe()["index"]
    assert same(
        take(stream(folder, 4, index_dir=str(cache)), 0, 3), take(stream(folder, 4, index_dir=None), 0, 3)
    )
    assert main(["index", str(folder), "--out", str(cache), "--verify"]) == 0
    assert len(walked) == 18
    for wrong in (["--start", "6"], ["--start", "3", "--end", "2"], ["--end", "7"]):
        assert main(["index", str(folder), "--out", str(cache), *wrong]) == 2
    assert "choose 0 <= start < end <= 6" in capsys.readouterr().err


def test_processes_leave_records(folder: Path, tmp_path: Path) -> None:
    work = Indexing(expand_shards(str(folder)), tmp_path / "cache")
    alone = [scan.digest for scan in work.walk(range(6), workers=1)]
    again = Indexing(expand_shards(str(folder)), tmp_path / "other")
    assert [scan.digest for scan in again.walk(range(6), workers=2)] == alone
    assert len(list((tmp_path / "other" / RECORDS).glob("*.npz"))) == 6
    assert again.pending(range(6)) == []


def test_what_a_walk_will_read_is_said_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / "sizes.json").write_text(json.dumps({"00000.tar": 5, "00001.tar": 4}))
    with serving(folder) as server:
        assert main(["index", f"{server.url}/{{00000..00005}}.tar", "--out", str(tmp_path / "here")]) == 0
        shown = capsys.readouterr()
        asked = [wanted for _, wanted, _ in server.requests if wanted]
    lines = shown.err.splitlines()
    total = sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert lines[0] == f"6 shards to walk: {total / 1000:.1f} KB in at most 12 requests"
    # One look at each shard before, then the walk itself.
    assert len(asked) <= 6 + 12
    assert lines[1].startswith("about ")
    assert lines[2:] == [f"warning: {server.url}/00001.tar: 3 samples were found, sizes.json states 4"]
    assert "27 samples in 6 shards" in shown.out


def test_other_counts_are_compared_and_never_believed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sizes.json").write_text(json.dumps({"00000.tar": 9, "00001.tar": 3}))
    (folder / "00002_stats.json").write_text(json.dumps({"count": 10, "successes": 8}))
    (folder / "00003_stats.json").write_text("[broken")
    assert main(["index", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "27 samples in 6 shards" in shown.out
    assert [line for line in shown.err.splitlines() if line.startswith("warning")] == [
        f"warning: {folder}/00000.tar: 5 samples were found, sizes.json states 9",
        f"warning: {folder}/00002.tar: 7 samples were found, 00002_stats.json states 8",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": [5, 3]},
        {"counts": [500, 3, 7, 2, 4, 6]},
        {"counts": ["5", {}, 7, 2, 4, 6]},
        {"stride": 0},
        {"digests": None},
        {"sizes": [1 << 80] * 6},
        "[" * 100_000,
    ],
)
def test_a_header_that_is_not_that_of_its_offsets_is_rebuilt(folder: Path, changes: Any) -> None:
    shards = expand_shards(str(folder))
    expected = build_index(shards)
    (header,) = (path for path in folder.glob(".*.json") if "offsets" in json.loads(path.read_text()))
    document = json.loads(header.read_text())
    header.write_text(changes if isinstance(changes, str) else json.dumps({**document, **changes}))
    found = build_index(shards)
    assert (found.sha, found.num_samples) == (expected.sha, 27)
    assert np.array_equal(found.offsets, expected.offsets)
    assert json.loads(header.read_text()) == document
