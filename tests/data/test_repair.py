"""Repairs when storage fails, outputs disappear, or several evaluation sets meet in one folder."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import clipkit.data.checking.repair as repair
from clipkit.data.checking.beside import find_shards
from clipkit.data.checking.job import SetCheck, check_set
from clipkit.data.checking.samples import SampleRules
from clipkit.data.engine import Engine
from clipkit.data.shards import EvaluationItem, write_evaluation_set
from clipkit.data.source import Unreadable
from clipkit.types import ConfigError, DataError
from tests.data.damages import SAMPLES, sample, tar_bytes
from tests.data.makers import png
from tests.data.servers import serving

RULES = SampleRules()
CONTENT = tar_bytes([sample(number) for number in range(SAMPLES)])


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[list[str], SetCheck]:
    """Two shards; the second one is cut in the middle."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "00000.tar").write_bytes(tar_bytes([sample(100)]))
    (tmp_path / "set" / "00001.tar").write_bytes(CONTENT[: len(CONTENT) // 2])
    shards = sorted(map(str, (tmp_path / "set").iterdir()))
    return shards, check_set(shards, range(2), RULES, Engine())


def test_a_read_that_fails_ends_a_repair_and_costs_no_shard(
    damaged: tuple[list[str], SetCheck], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, found = damaged
    assert found.torn == [1]
    failures = [OSError(errno.EIO, "Input/output error"), Unreadable("503; 5 attempts", "try again")]
    opened = repair.opened_shard

    @contextmanager
    def failing(path: str) -> Iterator[object]:
        if path == shards[1]:
            raise failures.pop()
        with opened(path) as shard:
            yield shard

    while failures:
        with monkeypatch.context() as patch:
            patch.setattr(repair, "opened_shard", failing)
            with pytest.raises(Unreadable):
                repair.repair_set(shards, found, RULES, tmp_path / "out", Engine())
        assert not (tmp_path / "out" / "manifest.json").exists()
    done = repair.repair_set(shards, found, RULES, tmp_path / "out", Engine())
    assert done.lost == ()
    # One per caption, the last member of a sample, that ends before the cut.
    cut = Path(shards[1]).stat().st_size
    with tarfile.open(fileobj=io.BytesIO(CONTENT)) as tar:
        whole = [member for member in tar if member.offset_data + -(-member.size // 512) * 512 <= cut]
    assert done.samples == 1 + sum(member.name.endswith(".txt") for member in whole) > 1


def test_a_removed_or_cut_output_is_written_again(
    damaged: tuple[list[str], SetCheck], tmp_path: Path
) -> None:
    shards, found = damaged
    whole, out = tmp_path / "whole", tmp_path / "out"
    repair.repair_set(shards, found, RULES, whole, Engine())

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    for cut in (False, True):
        with pytest.raises(KeyboardInterrupt):
            repair.repair_set(shards, found, RULES, out, Engine(), on_shard=stop)
        if cut:
            (out / "00001.tar").write_bytes(b"")
        else:
            (out / "00001.tar").unlink()
    repair.repair_set(shards, found, RULES, out, Engine())
    assert (out / "00001.tar").read_bytes() == (whole / "00001.tar").read_bytes()


def test_a_shard_of_which_nothing_is_kept_is_listed_and_none_kept_is_an_error(tmp_path: Path) -> None:
    for name, content in (("0", b""), ("1", tar_bytes([])), ("2", tar_bytes([[("a.txt", b"no image")]]))):
        (tmp_path / f"{name}.tar").write_bytes(content)
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    found = check_set(shards, range(3), RULES, Engine())
    out = tmp_path / "out"
    for _ in range(2):  # no record of the first is in the way of the second
        with pytest.raises(DataError, match=r"nothing in 3 shard\(s\) could be kept") as refused:
            repair.repair_set(shards, found, RULES, out, Engine())
        assert "table" not in refused.value.cure
        assert [path.name for path in out.iterdir()] == ["dropped.jsonl"]
        lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
        assert [(line["shard"], line["kind"]) for line in lines] == list(
            zip(shards, ("empty file", "no sample", "missing image"), strict=True)
        )


def test_texts_of_evaluation_sets_that_differ_are_refused(tmp_path: Path) -> None:
    for name, label in (("a", "dog"), ("b", "cat")):
        items = [EvaluationItem(png(0), "png", label=0)]
        write_evaluation_set(items, tmp_path / name, classnames=[label], split=f"of_{name}")
    shards = find_shards([str(tmp_path / "a"), str(tmp_path / "b")])
    found = check_set(shards, range(2), RULES, Engine())
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"classnames\.txt differ"):
        repair.repair_set(shards, found, RULES, out, Engine())
    assert not out.exists()
    (tmp_path / "b" / "classnames.txt").write_text("dog\n")
    repair.repair_set(shards, found, RULES, out, Engine())
    assert (out / "classnames.txt").read_text() == "dog\n"


def test_a_shard_elsewhere_that_changed_is_no_longer_what_was_repaired(tmp_path: Path) -> None:
    folder, out = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    (folder / "0.tar").write_bytes(tar_bytes([sample(100)]))
    with serving(folder) as server:
        shards = [f"{server.url}/0.tar"]
        repair.repair_set(shards, check_set(shards, range(1), RULES, Engine()), RULES, out, Engine())
        ended = repair.repaired(shards, RULES, out)
        assert ended is not None
        assert ended.samples == 1
        (folder / "0.tar").write_bytes(tar_bytes([sample(101)]))
        with pytest.raises(ConfigError, match=r"0\.tar changed"):
            repair.repaired(shards, RULES, out)
