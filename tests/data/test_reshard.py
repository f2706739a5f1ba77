"""Shards from shards, against tarfile, json and csv: every sample once, images untouched, the same bytes."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit.cli.app import main
from clipkit.data import uid_subset
from clipkit.data.engine import Engine
from clipkit.data.reshard import Reshard, Resharding, Written, input_shards, plan
from clipkit.data.uid_subset import UID_DTYPE, UidSubset
from clipkit.types import ConfigError, DataError
from tests.commands import fails, misused
from tests.data.killing import in_a_child
from tests.data.makers import Members, write_tar

Sample = tuple[str, dict[str, bytes]]


def uid(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()


def sample(number: int, key: str | None = None) -> Members:
    """Image (bytes of its own), caption and fields of sample `number`; a product has three samples."""
    key = f"{number:09d}" if key is None else key
    document = {
        "uid": uid(number),
        "width": 100 + number,
        "product_id": number // 3,
        "similarity": number / 100,
    }
    image = random.Random(number).randbytes(200 + 37 * (number % 11))
    return [
        (f"{key}.jpg", image),
        (f"{key}.json", json.dumps(document, indent=4).encode()),
        (f"{key}.txt", f"caption {number}".encode()),
    ]


def write_inputs(folder: Path, counts: Sequence[int], first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        write_tar(folder / f"{shard:05d}.tar", map(sample, range(first, first + count)))
        first += count
    return folder


def read(*folders: Path) -> list[Sample]:
    """Key and members of all samples in order, by tarfile."""
    found: list[Sample] = []
    for folder in folders:
        for path in sorted(folder.glob("*.tar")):
            with tarfile.open(path) as tar:
                for entry in tar:
                    key, _, extension = entry.name.partition(".")
                    stream = tar.extractfile(entry)
                    assert stream is not None
                    if not found or found[-1][0] != key:
                        found.append((key, {}))
                    found[-1][1][extension] = stream.read()
    return found


def number_of(members: dict[str, bytes]) -> int:
    return int(json.loads(members["json"])["width"]) - 100


def numbers(*folders: Path) -> list[int]:
    return [number_of(members) for _, members in read(*folders)]


def run(
    out: Path, *inputs: Path | str, workers: int = 1, **options: Any
) -> tuple[list[Written], Counter[str]]:
    """Runs a whole job and returns what it wrote and counted."""
    overwrite = options.pop("overwrite", False)
    job = Reshard(input_shards([str(each) for each in inputs]), out, **options)
    with Resharding(job, Engine(workers), lambda *_: None) as work:
        work.begin(overwrite)
        plan = work.plan()
        counts = Counter(plan.counts) + work.write(plan, range(len(plan.parts)))
        written = work.finish(plan)
    assert written is not None
    return written, counts


def visible_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of all files without a leading dot (the index tells ages)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "in", [10, 1, 25, 14])


def test_every_sample_once_with_the_same_members_in_a_new_order(tmp_path: Path, inputs: Path) -> None:
    out = tmp_path / "out"
    (written,), counts = run(out, inputs, samples_per_shard=16)
    before, after = read(inputs), read(out)
    assert sorted(before) == sorted(after)
    assert [key for key, _ in before] != [key for key, _ in after]
    assert counts["samples read"] == counts["kept"] == 50
    assert [record.samples for record in written.records] == [16, 16, 16, 2]
    assert json.loads((out / "sizes.json").read_text()) == {
        "00000.tar": 16, "00001.tar": 16, "00002.tar": 16, "00003.tar": 2
    }  # fmt: skip
    for entry in json.loads((out / "manifest.json").read_text())["shards"]:
        content = (out / entry["name"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    other = tmp_path / "other"
    run(other, inputs, samples_per_shard=16, seed=1)
    assert sorted(numbers(other)) == sorted(numbers(out))
    assert numbers(other) != numbers(out)


def test_the_shuffle_is_over_all_samples(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out, write_inputs(tmp_path / "in", [250] * 4), samples_per_shard=1000)
    order = np.array(numbers(out))
    from_first = np.flatnonzero(order < 250)
    # Of 250 of 1000 uniform positions: mean 499.5 with a deviation of 15.8, spread 288.7 with one of about 7.
    assert abs(from_first.mean() - 499.5) < 5 * 15.8
    assert abs(from_first.std() - 288.7) < 5 * 7
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 5 / 1000**0.5
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 expected


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_do_not_depend_on_the_workers(tmp_path: Path, inputs: Path, workers: int) -> None:
    for name, count in (("one", 1), ("many", workers)):
        run(tmp_path / name, inputs, samples_per_shard=9, split=(0.6, 0.4), workers=count)
    assert visible_bytes(tmp_path / "one") == visible_bytes(tmp_path / "many")


def test_without_a_shuffle_inputs_follow_each_other(tmp_path: Path, inputs: Path) -> None:
    second = write_inputs(tmp_path / "second", [7], first=50)
    run(tmp_path / "out", second, inputs, seed=None, samples_per_shard=20)
    assert numbers(tmp_path / "out") == [*range(50, 57), *range(50)]


def test_shards_keep_to_a_number_of_bytes(tmp_path: Path, inputs: Path) -> None:
    spans = {}
    for path in inputs.glob("*.tar"):
        with tarfile.open(path) as tar:
            for entry in tar:
                taken = 512 + -(-entry.size // 512) * 512
                spans[entry.name[:9]] = spans.get(entry.name[:9], 0) + taken
    limit = 8_000
    (written,), _ = run(tmp_path / "out", inputs, shard_bytes=limit)
    held = []
    for record in written.records:
        with tarfile.open(tmp_path / "out" / record.name) as tar:
            held.append([spans[name[:9]] for name in tar.getnames() if name.endswith(".txt")])
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in held)
    # As few as that allows without a change of order: the first of the next shard did not fit.
    assert all(sum(sizes) + following[0] > limit for sizes, following in pairwise(held))


def test_small_blocks_give_the_same_bytes(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What large sets do block by block: rows, hashes of keys and uids; keys that repeat among them."""
    second = tmp_path / "second"
    second.mkdir()
    write_tar(second / "0.tar", [sample(100 + n, f"{3 * n:09d}") for n in range(20)])
    ids = datacomp(tmp_path / "ids.npy", [uid(n) for n in [*range(4, 50), 7, 7, *range(100, 118)]])
    options: dict[str, Any] = {"shard_bytes": 4000, "subset": ids, "split": (0.7, 0.3)}
    run(tmp_path / "whole", inputs, second, **options)
    monkeypatch.setattr(plan, "_BLOCK", 7)
    monkeypatch.setattr(plan, "_HASHES", 5)
    monkeypatch.setattr(uid_subset, "_BLOCK", 3)
    run(tmp_path / "parts", inputs, second, **options)
    assert len(visible_bytes(tmp_path / "whole")) > 8
    assert visible_bytes(tmp_path / "parts") == visible_bytes(tmp_path / "whole")
    for at in range(1, 11):
        uids = sorted(uid(n) for n in range(11))
        uids[at - 1], uids[at] = uids[at], uids[at - 1]
        with pytest.raises(DataError, match=rf"entry {at} is smaller"):
            UidSubset(datacomp(tmp_path / "unsorted.npy", uids, np.array)).check_sorted()


def datacomp(path: Path, uids: Iterable[str], order: Callable[[Any], Any] = np.sort) -> Path:
    entries = np.array([(int(each[:16], 16), int(each[16:], 16)) for each in uids], dtype=UID_DTYPE)
    np.save(path, order(entries))
    return path


def test_a_subset_of_uids_is_that_subset(tmp_path: Path, inputs: Path) -> None:
    wanted = [3, 4, 11, 49]
    file = datacomp(tmp_path / "ids.npy", [uid(number) for number in [*wanted, 4, 4, 777]])
    _, counts = run(tmp_path / "out", inputs, subset=file)
    found = read(tmp_path / "out")
    assert sorted(number_of(members) for _, members in found) == sorted([*wanted, 4, 4])
    # DataComp's resharder repeats what stands several times; here the first copy keeps its key.
    assert sorted(key for key, _ in found if "4" in key[:9] and key.startswith("000000004")) == [
        "000000004", "000000004-1", "000000004-2"
    ]  # fmt: skip
    assert counts["outside the subset"] == 46


def test_uids_can_be_the_keys(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "0.tar", [[(f"{uid(n)}.jpg", b"x"), (f"{uid(n)}.txt", b"a")] for n in range(6)]
    )
    file = datacomp(tmp_path / "ids.npy", [uid(2), uid(5), "0" * 32, "f" * 32])
    run(tmp_path / "out", tmp_path / "in", subset=file)
    assert sorted(key for key, _ in read(tmp_path / "out")) == sorted([uid(2), uid(5)])


def test_searches_of_uids_are_those_of_a_counter(tmp_path: Path) -> None:
    rng = random.Random(3)
    # Few different halves: equal first halves, equal entries, both ends.
    pool = [
        f"{rng.choice([0, 1, 2**64 - 1]):016x}{rng.choice([0, 5, 2**63, 2**64 - 1]):016x}" for _ in range(90)
    ]
    held = Counter(pool[:60])
    subset = UidSubset(datacomp(tmp_path / "ids.npy", pool[:60]))
    asked = [*pool, None, "xyz", "0" * 31, "A" * 32]
    first, end = subset.locate(asked).T
    assert (end - first).tolist() == [held[each] if each else 0 for each in asked]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: datacomp(path, map(uid, range(9)), lambda entries: np.sort(entries)[::-1]),
            "not sorted",
        ),
        (lambda path: np.save(path, np.arange(4)), "dtype int64"),
        (lambda path: np.save(path, np.zeros((2, 2), UID_DTYPE)), "shape"),
        (lambda path: np.save(path, np.zeros(0, UID_DTYPE)), "no uids"),
        (lambda path: path.write_bytes(b"uid\n1\n"), "cannot be read as .npy"),
        (lambda path: np.save(path, np.array([{}], dtype=object)), "cannot be read as .npy"),
        (lambda path: path.mkdir(), "no such file"),
    ],
)
def test_subsets_that_are_none_are_refused(
    tmp_path: Path, inputs: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "ids.npy")
    with pytest.raises(ConfigError if message == "no such file" else DataError, match=message):
        run(tmp_path / "out", inputs, subset=tmp_path / "ids.npy")
    assert not list((tmp_path / "out").glob("*.tar"))


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


def test_a_subset_by_a_table_and_a_condition(tmp_path: Path, inputs: Path) -> None:
    listed = write_csv(
        tmp_path / "keep.tsv", [["name", "uid"], *(["x", uid(n)] for n in range(0, 50, 2)), ["", "?"]]
    )
    _, counts = run(
        tmp_path / "out",
        inputs,
        subset=listed,
        match="json.uid",
        where="json.similarity >= 0.3 and json.similarity < 0.4 or json.absent == 1",
    )
    assert sorted(numbers(tmp_path / "out")) == [30, 32, 34, 36, 38]
    assert counts["outside the subset"] == 25
    # `false or unknown` is unknown.
    assert counts["where: unknown"] == 20


def test_new_fields_leave_every_other_member_as_it_is(tmp_path: Path, inputs: Path) -> None:
    rows = [
        [f"{n:09d}", f'a "new", caption {n}\nü', n * 1.5, f"00{n}", "" if n % 2 else n] for n in range(0, 40)
    ]
    listed = write_csv(
        tmp_path / "new.csv", [["key", "recaption", "score", "code", "gaps"], *rows, ["zz", "", 1, 2, 3]]
    )
    _, counts = run(tmp_path / "out", inputs, fields=listed)
    after, table = dict(read(tmp_path / "out")), {row[0]: row for row in rows}
    for key, members in read(inputs):
        for extension, content in members.items():
            if extension != "json" or key not in table:
                assert after[key][extension] == content
        if key in table:
            _, recaption, score, code, gaps = table[key]
            # Numbers where a column holds nothing else; product codes with zeros in front stay text.
            added = {
                "recaption": recaption,
                "score": score,
                "code": code,
                "gaps": None if gaps == "" else gaps,
            }
            assert json.loads(after[key]["json"]) == {**json.loads(members["json"]), **added}
    assert counts["without a row in the table"] == 10
    assert counts["samples with new fields"] == 40


def test_a_column_as_caption(tmp_path: Path, inputs: Path) -> None:
    rows = [[uid(n), f"  new\t caption {n} ", "x"] for n in range(20)] + [[uid(20), "  ", "x"]]
    listed = write_csv(tmp_path / "new.csv", [["uid", "text", "other"], *rows])
    options: dict[str, Any] = {"fields": listed, "columns": ("text",), "match": "json.uid", "as_text": True}
    _, counts = run(tmp_path / "out", inputs, **options)
    after = dict(read(tmp_path / "out"))
    for key, members in read(inputs):
        caption = f"new caption {int(key)}".encode() if int(key) < 20 else members["txt"]
        assert after[key] == {**members, "txt": caption}
    assert counts["empty captions in the table"] == 1


def test_conditions_and_groups_see_the_new_fields(tmp_path: Path, inputs: Path) -> None:
    listed = write_csv(tmp_path / "s.csv", [["key", "clip"], *([f"{n:09d}", 0.01 * n] for n in range(50))])
    run(tmp_path / "out", inputs, fields=listed, where="json.clip > 0.245")
    assert sorted(numbers(tmp_path / "out")) == list(range(25, 50))


def test_parquet_tables_keep_their_types(tmp_path: Path, inputs: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    values = {
        "key": [f"{n:09d}" for n in range(50)],
        "clip": [None if n == 3 else float("nan") if n == 4 else n / 7 for n in range(50)],
        "captions": [[f"a {n}", "b"] for n in range(50)],
    }
    parquet.write_table(pyarrow.table(values), tmp_path / "t.parquet", row_group_size=7)
    run(tmp_path / "out", inputs, fields=tmp_path / "t.parquet")
    for key, members in read(tmp_path / "out"):
        document = json.loads(members["json"])
        number = int(key)
        assert document["clip"] == (None if number in (3, 4) else number / 7)
        assert document["captions"] == [f"a {number}", "b"]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        run(tmp_path / "other", inputs, fields=tmp_path / "bad.parquet")


def test_a_split_keeps_groups_together_wherever_they_lie(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", [170, 31, 99, 300])
    out = tmp_path / "out"
    written, _ = run(out, inputs, split=(0.7, 0.2, 0.1), group="json.product_id", samples_per_shard=50)
    assert [each.folder.name for each in written] == ["train", "validation", "test"]
    sides = [numbers(each.folder) for each in written]
    assert sorted(chain(*sides)) == list(range(600))
    groups = [{number // 3 for number in side} for side in sides]
    assert sum(map(len, groups)) == 200
    # 200 groups drawn: five deviations around the expected shares.
    for side, share in zip(groups, (0.7, 0.2, 0.1), strict=True):
        assert abs(len(side) - 200 * share) < 5 * (200 * share * (1 - share)) ** 0.5
    # The side is a property of the group alone: other shards, other seed, a part of the samples.
    again = write_inputs(tmp_path / "again", [80], first=120)
    run(tmp_path / "part", again, split=(0.7, 0.2, 0.1), group="json.product_id", seed=9)
    for side, name in zip(sides, ("train", "validation", "test"), strict=True):
        assert set(numbers(tmp_path / "part" / name)) == set(side) & set(range(120, 200))


def test_samples_without_a_group_are_counted(tmp_path: Path, inputs: Path) -> None:
    bare = [[(name, data) for name, data in sample(n) if not name.endswith(".json")] for n in range(60, 64)]
    (tmp_path / "bare").mkdir()
    write_tar(tmp_path / "bare" / "0.tar", bare)
    _, counts = run(tmp_path / "out", inputs, tmp_path / "bare", split=(0.5, 0.5), group="json.product_id")
    assert counts["without a group"] == 4
    with pytest.raises(DataError, match="holds no sample"):
        run(tmp_path / "other", inputs, where="key == '000000001'", split=(0.5, 0.5))


def test_keys_used_twice_get_the_number_of_their_shard(tmp_path: Path, inputs: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    write_tar(second / "0.tar", [sample(100 + n, f"{40 + n:09d}") for n in range(20)])
    _, counts = run(tmp_path / "out", inputs, second)
    found = {key: number_of(members) for key, members in read(tmp_path / "out")}
    expected = {f"{n:09d}": n for n in range(40)}
    expected |= {f"00003-{n:09d}": n for n in range(40, 50)}
    expected |= {f"00004-{40 + n:09d}": 100 + n for n in range(10)}
    expected |= {f"{40 + n:09d}": 100 + n for n in range(10, 20)}
    assert found == expected
    assert counts["keys used more than once"] == 10
    run(tmp_path / "new", inputs, second, rekey=True, samples_per_shard=32)
    assert [key for key, _ in read(tmp_path / "new")] == [f"{n:09d}" for n in range(70)]
    assert numbers(tmp_path / "new") == [found[key] for key, _ in read(tmp_path / "out")]


def test_odd_names_and_members_survive(tmp_path: Path) -> None:
    keys = ["-rf", "a b", "ü/ö", "x" * 200, "line\nbreak", "back\\slash", "n\udcffo"]
    (tmp_path / "in dir").mkdir()
    samples = [
        [(f"{key}.jpg", b"1"), (f"{key}.cls", b"3"), (f"{key}._x", b"kept"), (f"{key}.txt", b"")]
        for key in keys
    ]
    write_tar(tmp_path / "in dir" / "-a b.tar", samples)
    run(tmp_path / "out", tmp_path / "in dir")
    found = dict(read(tmp_path / "out"))
    assert found == {key: {"jpg": b"1", "cls": b"3", "_x": b"kept", "txt": b""} for key in keys}


def test_killed_anywhere_and_started_again_gives_the_same_bytes(tmp_path: Path, inputs: Path) -> None:
    listed = write_csv(tmp_path / "new.csv", [["key", "more"], *([f"{n:09d}", n] for n in range(50))])
    options: dict[str, Any] = {"fields": listed, "split": (0.7, 0.3), "samples_per_shard": 9}

    def job(out: Path) -> Callable[[], None]:
        return lambda: main_like(out, inputs, options)

    calls = in_a_child(job(tmp_path / "whole"), tmp_path / "whole")
    expected = visible_bytes(tmp_path / "whole")
    points = sorted(random.Random(0).sample(range(1, calls + 1), 12))
    for point in points:
        out = tmp_path / f"killed-{point}"
        assert in_a_child(job(out), out, point) == -1
        again = in_a_child(job(out), out)
        assert again >= 0
        assert visible_bytes(out) == expected, f"killed at call {point} of {calls}"
        assert [path.name for path in (out / ".clipkit-job").rglob("*.json")] == ["done.json"]
    # And killed again and again, a little later each time.
    out, runs = tmp_path / "often", 0
    while in_a_child(job(out), out, calls // 3) == -1:
        runs += 1
        assert runs < 20
    assert runs >= 2
    assert visible_bytes(out) == expected


def main_like(out: Path, inputs: Path, options: dict[str, Any]) -> None:
    """The command's steps, at the end of which all is there."""
    job = Reshard(input_shards([str(inputs)]), out, **options)
    with Resharding(job, Engine(1), lambda *_: None) as work:
        if work.begin() is None:
            plan = work.plan()
            work.write(plan, range(len(plan.parts)))
            assert work.finish(plan) is not None


def command(*arguments: object) -> int:
    return main(["data", "reshard", *map(str, arguments)])


def test_the_command_shares_continues_and_says_when_nothing_is_left(
    tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    whole = [inputs, "--out", tmp_path / "whole", "--samples-per-shard", "9"]
    assert command(*whole) == 0
    shared = [inputs, "--out", out, "--samples-per-shard", "9"]
    for start, end in ((0, 1), (3, 6), (1, 3)):
        assert command(*shared, "--start", start, "--end", end) == 0
        assert not (out / "manifest.json").exists()
    assert "output shards 1 to 2 of 6 are written" in capsys.readouterr().out
    assert command(*shared, "--start", 6, "--end", 7) == 2
    assert command(*shared) == 0
    assert visible_bytes(out) == visible_bytes(tmp_path / "whole")
    capsys.readouterr()
    assert command(*shared) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert command(*shared, "--shuffle-seed", 5) == 2
    assert "already holds shards, made otherwise: --shuffle-seed 0 -> 5" in capsys.readouterr().err
    assert command(*shared, "--shuffle-seed", 5, "--overwrite") == 0
    assert visible_bytes(out) != visible_bytes(tmp_path / "whole")
    (out / "00001.tar").unlink()
    assert command(*shared, "--shuffle-seed", 5) == 0
    assert sorted(numbers(out)) == list(range(50))


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert (
        command(
            inputs,
            "--out",
            tmp_path / "new",
            "--split",
            "0.8/0.2",
            "--where",
            "json.width < 120",
            "--dry-run",
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "30 where: false" in printed
    assert str(tmp_path / "new" / "validation") in printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{in}", "--out", "{in}"], 2, "would be replaced"),
        (["{in}", "--out", "{tmp}/o", "--split", "0.9/0.3"], 2, "no division of the whole"),
        (["{in}", "--out", "{tmp}/o", "--split", "a/b"], 2, "holds no shares"),
        (["{in}", "--out", "{tmp}/o", "--split", "nan/nan"], 2, "no division"),
        (["{in}", "--out", "{tmp}/o", "--group", "json.a"], 2, "--group without --split"),
        (["{in}", "--out", "{tmp}/o", "--split", "0.5/0.5", "--group", "shop"], 2, "no field"),
        (["{in}", "--out", "{tmp}/o", "--where", "width > 3"], 2, "did you mean json.width"),
        (["{in}", "--out", "{tmp}/o", "--where", "json.width > 9999"], 3, "no sample is left of 50"),
        (["{in}", "--out", "{tmp}/o", "--where", "json.widht > 1"], 3,
         "never found: json.widht | did you mean json.width?"),
        (["{in}", "--out", "{tmp}/o", "--where", "json.clop > 1", "--add-fields", "{tmp}/c.csv"], 3,
         "never found: json.clop | did you mean json.clip?"),
        (["{in}", "--out", "{tmp}/o", "--where", "json.width > '9'"], 3, "fitted: json.width > '9'"),
        (["{in}", "--out", "{tmp}/o", "--shard-bytes", "much"], 2, "is no number of bytes"),
        (["{in}", "--out", "{tmp}/o", "--shard-bytes", "0"], 2, "is no number of bytes"),
        (["{in}", "--out", "{tmp}/o", "--columns", "a"], 2, "need a table"),
        (["{in}", "--out", "{tmp}/o", "--add-fields", "{tmp}/no.csv"], 2, "no.csv"),
        (["{in}", "--out", "{tmp}/o", "--add-fields", "{tmp}/t.csv", "--key", "sku"], 2, "no column 'sku'"),
        (["{in}", "--out", "{tmp}/o", "--add-fields", "{tmp}/t.csv", "--columns", "x"], 2, "no column 'x'"),
        (["{in}", "--out", "{tmp}/o", "--add-fields", "{tmp}/t.csv", "--as", "txt"], 2, "takes one column"),
        (["{in}", "--out", "{tmp}/o", "--add-fields", "{tmp}/twice.csv"], 3, "stands on two rows"),
        (["{in}", "--out", "{tmp}/o", "--add-fields", "{tmp}/t.csv"], 3, "no key of it is that of a sample"),
        (["{in}", "--out", "{tmp}/o", "--subset", "{tmp}/ids.txt"], 2, "not a table by its name"),
        (["{tmp}/absent.tar", "--out", "{tmp}/o"], 3, "absent.tar"),
        (["{tmp}/empty", "--out", "{tmp}/o"], 3, "no .tar file"),
        (["{tmp}/cut.tar", "--out", "{tmp}/o"], 3, "cut"),
        (["{tmp}/text.tar", "--out", "{tmp}/o"], 3, "not a tar file"),
        (["https://host/a.tar", "--out", "{tmp}/o"], 2, "read at random"),
        (["{in}", "{in}/00000.tar", "--out", "{tmp}/o"], 3, "twice"),
        (["{in}", "--out", "{tmp}/t.csv/o"], 2, "cannot be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_of_cause_and_one_of_cure(
    tmp_path: Path,
    inputs: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    write_csv(tmp_path / "t.csv", [["key", "a", "b"], ["1", "2", "3"]])
    write_csv(tmp_path / "c.csv", [["key", "clip"], ["000000001", "2"]])
    write_csv(tmp_path / "twice.csv", [["key", "a"], ["1", "2"], ["2", "2"], ["1", "3"]])
    (tmp_path / "ids.txt").write_text("1\n")
    (tmp_path / "text.tar").write_text("hello" * 500)
    (tmp_path / "cut.tar").write_bytes((inputs / "00000.tar").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    given = [each.format(**{"in": inputs, "tmp": tmp_path}) for each in arguments]
    cause, _, cure = message.partition(" | ")
    assert cure in fails(capsys, code, cause, "data", "reshard", *given)


def test_an_option_that_cannot_be_parsed_is_named(
    tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ("data", "reshard", inputs, "--out", tmp_path / "out")
    misused(capsys, "--samples-per-shard", *job, "--samples-per-shard", "0")
    assert not (tmp_path / "out").exists()


def test_inputs_that_change_meanwhile_are_refused(tmp_path: Path, inputs: Path) -> None:
    job = Reshard(input_shards([str(inputs)]), tmp_path / "out", samples_per_shard=9)
    with Resharding(job, Engine(1), lambda *_: None) as work:
        work.begin()
        plan = work.plan()
        write_tar(inputs / "00002.tar", map(sample, range(11, 36)[::-1]))
        with pytest.raises(DataError, match=r"the shard changed|does not fit the index"):
            work.write(plan, range(len(plan.parts)))


def test_loads_no_torch(tmp_path: Path, inputs: Path) -> None:
    code = (
        "import sys; from clipkit.cli.app import main;"
        f"assert main(['data', 'reshard', {str(inputs)!r}, '--out', {str(tmp_path / 'out')!r}]) == 0;"
        "print(sorted({'torch', 'open_clip', 'pyarrow'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"
