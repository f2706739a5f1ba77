"""Tables by key against a dictionary, and the memory that they take while they are made."""

from __future__ import annotations

import csv
import random
import tracemalloc
from pathlib import Path

import pytest

from clipkit.data import key_table
from clipkit.data.key_table import KeyTable, TableSpec, build_key_table, text_hash
from clipkit.types import DataError


def write(path: Path, keys: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["key", "n"], *([key, n] for n, key in enumerate(keys))])
    return path


@pytest.mark.parametrize("bucket_bytes", [32 << 20, 700])
def test_rows_by_key_are_those_of_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    monkeypatch.setattr(key_table, "_BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(key_table, "_BATCH", 64)
    monkeypatch.setattr(key_table, "_BLOCK", 100)
    # Half of all hashes fall together, so that keys are told apart by their text.
    monkeypatch.setattr(key_table, "text_hash", lambda key: text_hash(key) & ~0x7FFF_FFFF_FFFF_FFFF | 5)
    keys = [f"{n:04d}" for n in range(300)]
    random.Random(0).shuffle(keys)
    build_key_table(TableSpec(write(tmp_path / "t.csv", keys)), tmp_path / "once", True)
    again = [*keys, keys[7], keys[7], keys[250]]
    build_key_table(TableSpec(write(tmp_path / "t.csv", again)), tmp_path / "often", False)
    for stem in ("once", "often"):
        table = KeyTable(tmp_path / stem)
        assert len(table) == 300
        assert [table.find(key) for key in keys] == [{"n": n} for n in range(300)]
        assert {table.locate(key) for key in keys} == set(range(300))
        assert table.find("0300") is None
    with pytest.raises(DataError, match=f"'{keys[7]}' stands on two rows|'{keys[250]}' stands on two rows"):
        build_key_table(TableSpec(tmp_path / "t.csv"), tmp_path / "refused", True)
    assert not list(tmp_path.glob("*-*"))


def test_the_memory_to_make_a_table_does_not_grow_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_BUCKET_BYTES", 10_000), ("_BATCH", 256), ("_BLOCK", 1024)):
        monkeypatch.setattr(key_table, name, value)
    peaks = []
    for count in (12_000, 2_000, 12_001):  # the first one imports, all that the last one needs
        path = write(tmp_path / f"{count}.csv", [f"{n:09d}" for n in range(count)])
        tracemalloc.start()
        build_key_table(TableSpec(path), tmp_path / f"stem-{len(peaks)}", True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # 10,000 more rows in memory would be 200 kB at the least, and twice that while they are sorted.
    assert peaks[2] - peaks[1] < 100_000, peaks
