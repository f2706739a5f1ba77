"""check-shards: every damage of a generated matrix is found and repaired, clean shards have no finding."""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import os
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import clipkit.data.checking.job
import clipkit.data.checking.repair
import clipkit.data.checking.shard
from clipkit.cli import main
from clipkit.data.checking.beside import find_shards
from clipkit.data.checking.findings import ERROR, NOTE, Finding
from clipkit.data.checking.job import SetCheck, check_parts, check_set, records_beside
from clipkit.data.checking.repair import repair_set
from clipkit.data.checking.samples import SampleRules
from clipkit.data.checking.shard import AGAINST_LISTS, Stated, check_shard
from clipkit.data.engine import Engine
from clipkit.data.glyphs import make_scenes
from clipkit.data.indexing import build_index
from clipkit.data.scan import scan_shard
from clipkit.data.shard_records import known
from clipkit.data.shards import EvaluationItem, Sample, write_evaluation_set, write_train_shards
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.commands import fails
from tests.data.damages import DAMAGES, SAMPLES, Damage, header_of, key, sample, tar_bytes, write_damaged
from tests.data.makers import npy, png, stream, take
from tests.data.servers import serving

RULES = SampleRules()
PLACES = (0, 4, SAMPLES - 1)


def contents(path: Path) -> dict[str, bytes]:
    """Member name -> bytes, by tarfile."""
    with tarfile.open(path) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def check(
    folder: Path, engine: Engine | None = None, report: Path | None = None
) -> tuple[list[str], SetCheck]:
    shards = sorted(map(str, folder.glob("*.tar")))
    found = check_set(shards, range(len(shards)), RULES, engine or Engine(), report=report, show=10_000)
    return shards, found


CLEAN = tar_bytes([sample(number) for number in range(SAMPLES)])
# Met behind what is wrong (zeros pass over to the next header, a key comes again), or all over the shard.
STANDS_ELSEWHERE = {"zeros", "key used twice", "unread members"}


def stands_there(finding: Finding, damage: Damage, place: int, size: int) -> bool:
    """Whether a finding names the member that was damaged, or the last one before it, and its header.

    size: bytes of the damaged shard. A cut behind a whole last member stands where the bytes end, in whole
    blocks of a tar.
    """
    if damage.lost == "all":
        return (finding.member, finding.byte) == ("", 0)
    if damage.kind in STANDS_ELSEWHERE:
        return True
    headers = {header_of(CLEAN, name) for name, _ in sample(place)}
    before = f"{key(place - 1)}.txt" if place else ""
    if damage.kind == "cut tar" and finding.byte not in headers:
        last = f"{key(place if damage.lost == 'later' else SAMPLES - 1)}.txt"
        return finding.member == last and finding.byte is not None and 0 <= size - finding.byte < 512
    return finding.byte in headers and (key(place) in finding.member or finding.member == before)


def one_case(folder: Path, damage: Damage, place: int) -> list[str]:
    """What is wrong with the check or the repair of one damage; empty: nothing."""
    folder.mkdir()
    for number in (0, 2):
        (folder / f"{number:05d}.tar").write_bytes(tar_bytes([sample(100 + number)]))
    shard = write_damaged(folder / "00001.tar", damage, place)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    shards, found = check(folder)
    about = [finding for finding in found.first if finding.shard == str(shard)]
    problems = []
    kinds = {finding.kind for finding in about if (finding.severity != ERROR) == damage.note}
    kind = (damage.first if place == 0 else "") or damage.kind
    if kind not in kinds:
        problems.append(f"not found: {kind!r}, only {sorted(kinds)}")
    elif not any(
        stands_there(finding, damage, place, len(before[shard])) for finding in about if finding.kind == kind
    ):
        problems.append(f"found elsewhere: {[(found.member, found.byte) for found in about]}")
    if damage.note and any(finding.severity == ERROR for finding in about):
        problems.append("an error where a note was due")
    if len(about) != len(found.first):
        problems.append("a finding on a clean neighbour")
    out = folder / "out"
    try:
        repaired = repair_set(shards, found, RULES, out, Engine())
    except DataError as error:
        return [*problems, f"repair: {error}"]
    if {path: path.read_bytes() for path in before} != before:
        problems.append("an original was changed")
    again = check(out)[1]
    if again.errors:
        problems.append(f"the repaired set has errors: {again.first[:3]}")
    gone = damage.lost_at(place)
    copy = out / shard.name
    kept = {name.lower(): data for name, data in contents(copy).items()} if copy.exists() else {}
    for number in set(range(SAMPLES)) - gone:
        # What was damaged may be lost or another image; its neighbours must be what they were.
        names = [f"{key(number)}.txt"] if number == place else [name for name, _ in sample(number)]
        if any(name not in kept for name in names):
            problems.append(f"the repair lost sample {number}")
        if number != place and any(kept.get(name) != data for name, data in sample(number)):
            problems.append(f"the repair changed sample {number}")
    if damage.kind == "dots in names":
        renamed = {f"{key(place)}_{version}.{name}" for version in ("v1", "v2") for name in ("jpg", "txt")}
        if not renamed <= kept.keys():
            problems.append("dots were not taken out of the names")
    elif gone and not repaired.dropped:
        problems.append("nothing is listed as dropped")
    return problems


def test_every_damage_of_the_matrix_is_found_and_repaired(tmp_path: Path) -> None:
    """`pytest -n 0 -s -k matrix tests/data/test_check_shards.py` prints the numbers."""
    made: Counter[str] = Counter()
    wrong = []
    for number, damage in enumerate(DAMAGES):
        for place in PLACES:
            made[damage.row] += 1
            problems = one_case(tmp_path / f"{number}-{place}", damage, place)
            wrong += [f"{damage.row} {damage.name} at {place}: {problem}" for problem in problems]
    bad = Counter(line.split()[0] for line in wrong)
    print("\nrow  damages  found and repaired")
    for row, count in made.items():
        print(f"{row:4} {count:7}  {count - bad[row]:7}")
    print(f"{sum(made.values())} damages, {len(DAMAGES)} kinds at {len(PLACES)} places; wrong: {len(wrong)}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("missing", ["end", "blocks", "padding", "all padding"])
def test_a_whole_last_member_without_the_bytes_behind_it(tmp_path: Path, missing: str) -> None:
    """One finding, of that member, and and no sample is lost."""
    samples = [sample(number) for number in range(3)]
    whole = tar_bytes(samples)
    name, caption = samples[-1][-1]
    data = header_of(whole, name) + 512
    kept = {
        "end": data + 512 + 5,
        "blocks": data + 512,
        "padding": data + 300,
        "all padding": len(caption) + data,
    }
    shard = tmp_path / "00000.tar"
    shard.write_bytes(whole[: kept[missing]])
    assert shard.read_bytes()[data : data + len(caption)] == caption
    shards, found = check(tmp_path)
    (finding,) = found.first
    assert (finding.kind, finding.member, finding.severity) == ("cut tar", name, ERROR)
    assert finding.detail.startswith("no end-of-archive marker")
    assert "--repair" in finding.cure
    with pytest.raises(DataError, match=f"no end-of-archive marker.*after member '{name}'"):
        scan_shard(str(shard))
    assert repair_set(shards, found, RULES, tmp_path / "out", Engine()).samples == 3
    assert contents(tmp_path / "out" / shard.name) == dict(entry for members in samples for entry in members)


def test_a_member_that_is_cut_is_the_one_that_is_named(tmp_path: Path) -> None:
    """In the findings and in dropped.jsonl: the member before it is whole, and kept."""
    whole = tar_bytes([sample(number) for number in range(3)])
    shard = tmp_path / "00000.tar"
    shard.write_bytes(whole[: header_of(whole, f"{key(2)}.txt") + 515])
    shards, found = check(tmp_path)
    names = {(finding.kind, finding.member) for finding in found.first}
    assert ("size beyond the file", f"{key(2)}.txt") in names
    repair_set(shards, found, RULES, tmp_path / "out", Engine())
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert ("size beyond the file", f"{key(2)}.txt") in {(line["kind"], line["member"]) for line in dropped}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clean shards with their lists, by clipkit's own writer."""
    images = {number: dict(sample(number))[f"{key(number)}.jpg"] for number in range(30)}
    samples = (Sample(key(number), image, "jpg", (f"caption {number}",)) for number, image in images.items())
    write_train_shards(samples, tmp_path / "set", samples_per_shard=10)
    return tmp_path / "set"


def kinds(found: SetCheck) -> set[tuple[str, str]]:
    return {(Path(finding.shard).name, finding.kind) for finding in found.first}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_clean_shards_have_no_finding(folder: Path, tiny_shards: Path, tmp_path: Path) -> None:
    build_index(sorted(map(str, folder.glob("*.tar"))))
    for place in (folder, tiny_shards):
        _, found = check(place)
        assert not found.kinds, found.first
    assert found.samples == 96


def test_drawn_and_real_sets_have_no_finding(tmp_path: Path, real_data: Path) -> None:
    make_scenes(tmp_path / "scenes", train=60, evaluation=12, size=32, seed=1, workers=1)
    for name in ("pretrain_products", "pretrain_clipart", "pretrain_emoji_noto"):
        with zipfile.ZipFile(real_data / name / "images.zip") as archive:
            table = csv.DictReader(io.StringIO((real_data / name / "pairs.csv").read_text(encoding="utf-8")))
            rows = list(itertools.islice(table, 0, None, 97))[:60]
            samples = [
                Sample(key(n), archive.read(row["filepath"]), Path(row["filepath"]).suffix, (row["caption"],))
                for n, row in enumerate(rows)
            ]
        write_train_shards(samples, tmp_path / name, samples_per_shard=25)
    sets = [*(tmp_path / "scenes").iterdir(), *(path for path in tmp_path.iterdir() if path.name != "scenes")]
    for folder in filter(Path.is_dir, sets):
        shards = find_shards([str(folder)])
        found = check_set(shards, range(len(shards)), RULES, Engine())
        assert found.samples
        assert not found.kinds, found.first


def test_remote_shards_are_checked_like_local_ones(tmp_path: Path) -> None:
    for number, damage in enumerate(DAMAGES[10:13]):
        write_damaged(tmp_path / f"{number}.tar", damage, 4)
    _, local = check(tmp_path)
    with serving(tmp_path) as server:
        shards = find_shards([f"{server.url}/{{0..3}}.tar?key=hidden-word"])
        report = tmp_path / "report.jsonl"
        found = check_set(shards, range(4), RULES, Engine(), report=report, show=10_000)
    gone = [finding for finding in found.first if finding.shard.startswith(f"{server.url}/3.tar")]
    assert [finding.kind for finding in gone] == ["unreadable"]
    assert [(f.kind, f.member, f.byte) for f in found.first if f not in gone] == [
        (f.kind, f.member, f.byte) for f in local.first
    ]
    assert "hidden-word" not in report.read_text()


def test_what_lies_beside_the_shards_is_compared(folder: Path) -> None:
    """F7 and rot: changed bytes, wrong counts, lost shards, and an index of earlier contents."""
    shards = sorted(map(str, folder.glob("*.tar")))
    build_index(shards)
    image = header_of(Path(shards[1]).read_bytes(), "000012.txt") + 512
    flip(Path(shards[1]), image)  # one bit of a caption: it decodes, only the hash can tell
    Path(shards[2]).unlink()
    (folder / "00005.tar").write_bytes(tar_bytes([sample(99)]))
    sizes = json.loads((folder / "sizes.json").read_text())
    (folder / "sizes.json").write_text(json.dumps({**sizes, "00000.tar": 11, "00005.tar": 1}))
    (folder / "00005_stats.json").write_text(json.dumps({"successes": 2}))
    shards, found = check(folder)
    assert kinds(found) == {
        ("00000.tar", "wrong count"),
        ("00001.tar", "bytes changed"),
        ("00001.tar", "changed after indexing"),
        ("00002.tar", "missing shard"),
        ("00005.tar", "wrong count"),
        ("set", "number left out"),
    }
    assert found.kinds["note", "changed after indexing"] == 1, "the headers are the same"
    assert found.kinds["error", "missing shard"] == 2, "in both lists"
    # Appended behind a finished shard: other headers, other bytes, another count.
    (folder / "00000.tar").write_bytes(tar_bytes([sample(number) for number in range(11)]))
    _, found = check(folder)
    about = {finding.kind: finding.severity for finding in found.first if finding.shard == shards[0]}
    assert about == dict.fromkeys(("wrong count", "bytes changed", "changed after indexing"), ERROR)


def test_rot_is_taken_over_by_a_repair_and_said(folder: Path, tmp_path: Path) -> None:
    shards = sorted(map(str, folder.glob("*.tar")))
    flip(Path(shards[1]), header_of(Path(shards[1]).read_bytes(), "000012.txt") + 512)
    _, found = check(folder)
    out = tmp_path / "out"
    done = repair_set(shards, found, RULES, out, Engine())
    assert (done.rewritten, done.taken_over, done.samples, done.dropped) == (0, 3, 30, 1)
    (line,) = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert (line["kind"], line["shard"]) == ("bytes changed", shards[1])
    assert not check(out)[1].kinds
    assert (out / "00000.tar").stat().st_ino == Path(shards[0]).stat().st_ino


def test_keys_in_several_shards_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number, keys in enumerate(([1, 2, 3], [4, 5], [2, 6, 5])):
        (folder / f"{number}.tar").write_bytes(tar_bytes([sample(n) for n in keys]))
    _, found = check(folder)
    assert found.errors == 0
    assert [(Path(f.shard).name, f.kind, f.member, f.detail) for f in found.first] == [
        ("2.tar", "key in several shards", key(2), "also in 0.tar"),
        ("2.tar", "key in several shards", key(5), "also in 1.tar"),
    ]
    assert found.first[1].byte == header_of((folder / "2.tar").read_bytes(), f"{key(5)}.jpg")


def test_shards_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    shards = [tmp_path / name / "0.tar" for name in "ab"]
    for shard in shards:
        shard.parent.mkdir()
        shard.write_bytes(tar_bytes([sample(1)]))
    (finding,) = check_set([*map(str, shards)], range(2), RULES, Engine()).first
    assert (finding.shard, finding.detail) == (str(shards[1]), f"also in {shards[0]}")


@pytest.fixture(params=["classes", "captions"])
def evaluation(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A set in CLIP_benchmark layout with two shards, by clipkit's own writer."""
    labelled = request.param == "classes"
    items = (
        EvaluationItem(
            png(n), "png", label=n % 3 if labelled else None, captions=() if labelled else ("a", "b")
        )
        for n in range(9)
    )
    names = ("cat", "dog", "cow") if labelled else None
    write_evaluation_set(items, tmp_path / "set", classnames=names, max_samples=5)
    return tmp_path / "set"


def test_evaluation_sets_are_checked_by_their_own_rules(evaluation: Path, tmp_path: Path) -> None:
    labelled = (evaluation / "classnames.txt").exists()
    shards = find_shards([str(evaluation)])
    assert [Path(shard).name for shard in shards] == ["0.tar", "1.tar"]
    assert not check_set(shards, range(2), RULES, Engine()).kinds
    # Outside its layout the set is for training, where a label is no caption.
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "0.tar").write_bytes(Path(shards[0]).read_bytes())
    assert check(moved)[1].kinds == ({(ERROR, "missing caption"): 5} if labelled else {})
    broken = [
        [("s0.png", png(0)), ("s0.cls" if labelled else "s0.txt", b"3" if labelled else b"")],
        [("s1.png", png(1)), ("s1.cls" if labelled else "s1.txt", b"x" if labelled else "a\u2028b".encode())],
        [("s2.gif", png(2)), ("s2.cls" if labelled else "s2.txt", b"1")],
        [("s3.png", png(3)[:50]), ("s3.npy", npy(np.array([0, 1, 2]))), ("s3.txt", b"a")],
        [("s4.png", png(4)), ("s4.npy", npy(np.array([0.0, 1.0]))), ("s4.txt", b"a")],
        [("s5.png", png(5)), ("s5.npy", b"\x93NUMPY\x01\x00 no header"), ("s5.txt", b"a")],
        [("s6.png", png(6)), ("s6.cls", b"2"), ("s6.txt", b"a")],
    ]
    Path(shards[1]).write_bytes(tar_bytes(broken))
    (evaluation / "test" / "nshards.txt").write_text("3\n")
    found = check_set(shards, range(2), RULES, Engine())
    got = Counter((finding.kind, finding.member.partition(".")[0]) for finding in found.first)
    common = {
        ("missing image", "s2"): 1,
        ("bad image", "s3"): 1,
        ("wrong label", "s3"): 1,
        ("missing shard", ""): 1,
    }
    common[("wrong label", "s5")] = 1
    if labelled:
        common |= {("wrong label", "s0"): 1, ("wrong label", "s1"): 1, ("wrong label", "s4"): 1}
    else:
        common |= {("empty caption", "s0"): 1, ("phantom captions", "s1"): 1}
    assert got == common
    done = repair_set(shards, found, RULES, tmp_path / "out", Engine())
    assert done.samples == 5 + (1 if labelled else 3)
    again = find_shards([str(tmp_path / "out")])
    assert not check_set(again, range(len(again)), RULES, Engine()).errors


def test_the_report_does_not_depend_on_workers_and_interruptions(tmp_path: Path) -> None:
    """Killed in the middle, shared by two callers, or in one go: the same lines, and no record left."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(6):
        write_damaged(folder / f"{number}.tar", DAMAGES[5 * number], number)
    report = tmp_path / "report.jsonl"
    shards, _ = check(folder, report=report)
    expected = report.read_bytes()
    lines = [json.loads(line) for line in expected.decode().splitlines()]
    assert {line["severity"] for line in lines} <= {"error", "note"}
    assert all(line["cure"] and line["kind"] and line["detail"] for line in lines)
    report.unlink()
    check(folder, Engine(3), report)
    assert report.read_bytes() == expected
    report.unlink()
    # Two shares leave records; the whole puts them together without looking at a shard again.
    for share in (range(0, 4), range(4, 6)):
        check_set(shards, share, RULES, Engine(), report=report)
        assert not report.exists()
    assert known(check_parts(shards, RULES), records_beside(report, RULES)) == 6
    first, status = Path(shards[0]).read_bytes(), os.stat(shards[0])
    for content in (bytes(len(first)), first):
        Path(shards[0]).write_bytes(content)
        os.utime(shards[0], ns=(status.st_atime_ns, status.st_mtime_ns))
        if content != first:
            check(folder, report=report)
    assert report.read_bytes() == expected
    report.unlink()

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_set(shards, range(6), RULES, Engine(), report=report, on_shard=stop)
    assert not report.exists()
    assert known(check_parts(shards, RULES), records_beside(report, RULES)) == 3
    check(folder, report=report)
    assert report.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir() if path.name != "set"] == ["report.jsonl"]


def test_an_interrupted_repair_continues_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(5):
        write_damaged(folder / f"{number}.tar", DAMAGES[10 + 7 * number], number)
    shards, found = check(folder)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    repair_set(shards, found, RULES, whole, Engine(2))
    with pytest.raises(KeyboardInterrupt):
        repair_set(shards, found, RULES, parts, Engine(), on_shard=stop)
    shown: list[int] = []
    repair_set(shards, found, RULES, parts, Engine(), on_shard=lambda done, _: shown.append(done))
    assert shown == [3, 4, 5], "the first two were there"
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(parts) for path in parts.rglob("*") if path.is_file())
    assert all((whole / name).read_bytes() == (parts / name).read_bytes() for name in names)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "00077.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="already holds shards"):
        repair_set(shards, found, RULES, tmp_path / "other", Engine())
    assert (tmp_path / "other" / "00077.tar").exists()
    with pytest.raises(ConfigError, match="would be replaced"):
        repair_set(shards, found, RULES, folder, Engine())


def test_a_full_disk_ends_a_repair_and_costs_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    write_damaged(folder / "0.tar", DAMAGES[22], 3)
    shards, found = check(folder)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(clipkit.data.checking.repair, "write_copied_shard", full)
        with pytest.raises(ClipkitError, match=r"No space(.|\n)*it continues"):
            repair_set(shards, found, RULES, out, Engine())
    assert repair_set(shards, found, RULES, out, Engine()).samples == SAMPLES - 1


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_to_the_bytes(tmp_path: Path, seed: int) -> None:
    """Bytes flipped, cut out, doubled: no crash; no tar error exactly where the strict walk passes."""
    draws = np.random.default_rng(seed)
    whole = tar_bytes([sample(number) for number in range(SAMPLES)])
    path = tmp_path / "a.tar"
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(draws.integers(1, 4)):
            at, size = int(draws.integers(len(data))), int(draws.integers(1, 1500))
            match draws.integers(4):
                case 0:
                    data[at] ^= 1 << int(draws.integers(8))
                case 1:
                    del data[at : at + size]
                case 2:
                    data[at:at] = data[at : at + size]
                case 3:
                    data[at : at + size] = bytes(min(size, len(data) - at))
        path.write_bytes(data)
        found = check_shard(str(path), RULES, Stated())
        walked = check_shard(str(path), replace(RULES, decode=False), Stated())
        try:
            strict = len(scan_shard(str(path)).starts) > 1
        except DataError:
            strict = False
        torn = found.error_kinds - OF_SAMPLES
        assert bool(torn) is not strict, (torn, strict)
        assert walked.error_kinds <= found.error_kinds
        assert not found.error_kinds & AGAINST_LISTS


# Kinds that the strict walk does not look for: it reads no payload, and training rejects such samples.
OF_SAMPLES = {
    *("bad image", "empty image", "missing image", "missing caption", "empty caption", "bad JSON"),
    *("bad caption", "caption is not UTF-8", "extreme aspect ratio", "too many pixels", "dots in names"),
}


def test_training_rejects_what_the_check_finds_and_nothing_after_a_repair(tmp_path: Path) -> None:
    """Of every damage that the strict index passes: the same samples, for the same reasons."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number, damage in enumerate(DAMAGES):
        shard = write_damaged(folder / f"{number:02d}.tar", damage, 4)
        try:
            scan_shard(str(shard))
        except DataError:
            shard.unlink()
    shards, found = check(folder)
    assert len(shards) > 20
    done = repair_set(shards, found, RULES, tmp_path / "out", Engine())
    clean = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    opened = stream(clean, done.samples)
    (batch,) = take(opened, 0, 1)
    assert batch.rejects == ()
    assert len(set(batch.ids.tolist())) == done.samples
    (batch,) = take(stream(shards, found.samples, max_reject_fraction=1.0), 0, 1)
    # No caption is in the JSON here: training does not read it.
    assert {(reject.shard, reject.key, reject.reason) for reject in batch.rejects} == {
        (finding.shard, finding.member.partition(".")[0], finding.kind)
        for finding in found.first
        if finding.severity == ERROR and finding.kind != "bad JSON"
    }


def test_findings_beyond_the_limit_are_counted_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        broken = [[(f"{key(n)}.jpg", b"x"), (f"{key(n)}.txt", b"")] for n in range(SAMPLES)]
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(broken))
    whole = check(tmp_path)[1]
    assert whole.kinds[ERROR, "bad image"] == whole.kinds[ERROR, "empty caption"] == 2 * SAMPLES
    assert whole.kinds[NOTE, "key in several shards"] == SAMPLES
    monkeypatch.setattr(clipkit.data.checking.shard, "MAX_FINDINGS", 3)
    monkeypatch.setattr(clipkit.data.checking.job, "MAX_SHARED_KEYS", 2)
    report = tmp_path / "report.jsonl"
    found = check(tmp_path, report=report)[1]
    assert {kind: count for kind, count in found.kinds.items() if kind[0] == ERROR} == {
        kind: count for kind, count in whole.kinds.items() if kind[0] == ERROR
    }
    assert found.damaged == found.torn == [0, 1]
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    per_shard = Counter(line["shard"] for line in lines if line["severity"] == ERROR)
    assert set(per_shard.values()) == {3 + 2}, "three findings, then a line for each kind"
    assert [line["detail"][:11] for line in lines if line["kind"] == "key in several shards"] == [
        "also in 0.t", "also in 0.t", "7 more keys"
    ]  # fmt: skip


def test_what_is_no_shard_is_a_finding_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to("nowhere")
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    (tmp_path / "good.tar").write_bytes(tar_bytes([sample(0)]))
    _, found = check(tmp_path, Engine(2))
    assert {Path(finding.shard).stem: finding.kind for finding in found.first} == dict.fromkeys(
        ("pipe", "folder", "link", "loop"), "unreadable"
    )


def test_the_command_says_what_is_wrong_and_where(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check-shards", str(folder)]) == 0
    assert "30 samples in 3 shards" in capsys.readouterr().out
    odd = tmp_path / "-odd \n\u202e<b>\u00e9.tar"
    odd.write_bytes(tar_bytes([sample(77), [("\x1b[2J.jpg", b"x"), ("\x1b[2J.txt", b"x")]]))
    report, out = tmp_path / "report.jsonl", tmp_path / "out"
    cure = fails(capsys, 3, "1 error, 1 of 4 shards", "data", "check-shards", folder, odd, "--out", report)
    assert str(report) in cure
    (line,) = [json.loads(line) for line in report.read_text().splitlines()]
    assert (line["shard"], line["member"], line["kind"]) == (str(odd), "\x1b[2J.jpg", "bad image")
    assert main(["data", "check-shards", str(odd)]) == 3
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    listing = sorted(tmp_path.iterdir())
    assert (
        main(["data", "check-shards", str(odd), "--dry-run", "--repair", str(out), "--out", str(out / "r")])
        == 0
    )
    assert sorted(tmp_path.iterdir()) == listing
    assert main(["data", "check-shards", str(odd), "--repair", str(out)]) == 0
    assert main(["data", "check-shards", str(out)]) == 0
    assert fails(capsys, 2, "same name", "data", "check-shards", odd, folder, out, "--repair", tmp_path / "x")
    assert fails(capsys, 2, "whole check", "data", "check-shards", odd, "--repair", tmp_path / "x", "--fast")
    assert fails(capsys, 2, "--out", "data", "check-shards", odd, "--out", folder)
    (tmp_path / "empty").mkdir()
    assert fails(capsys, 3, "no .tar file", "data", "check-shards", tmp_path / "empty")
    assert main(["data", "check-shards", str(tmp_path / "gone.tar")]) == 3
    assert "unreadable" in capsys.readouterr().out
