"""Shards as a whole: the same bytes by every way, complete or absent, counted rejects, peers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipkit.cli.app import main
from clipkit.data.engine import Engine
from clipkit.data.making import (
    ImageRules,
    MakeJob,
    Making,
    Reading,
    make_evaluation_set,
    make_shards,
    open_collection,
)
from clipkit.data.making.samples import Layout
from clipkit.types import ConfigError, DataError
from tests.data.making.makers import bytes_of, picture, rejects, samples, table, write_csv, write_images

ROOT = Path(__file__).resolve().parents[3]


def test_workers_change_no_byte_and_the_manifest_describes_them(tmp_path: Path) -> None:
    path = table(tmp_path, 23)
    making = Making(samples_per_shard=4)
    found = []
    for number, workers in enumerate((1, 3)):
        make_shards(open_collection(path), tmp_path / str(number), making, Engine(workers))
        found.append(bytes_of(tmp_path / str(number)))
    assert found[0] == found[1]
    manifest = json.loads(found[0]["manifest.json"])
    assert (manifest["samples"], manifest["job"]["samples_per_shard"]) == (23, 4)
    for entry in manifest["shards"]:
        content = found[0][entry["name"]]
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert json.loads(found[0]["sizes.json"]) == {f"0000{n}.tar": min(4, 23 - 4 * n) for n in range(6)}


def test_training_finds_the_index_without_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipkit.data import indexing
    from clipkit.data.source import expand_shards

    make_shards(open_collection(table(tmp_path, 23)), tmp_path / "out", Making(samples_per_shard=4))
    monkeypatch.setattr(indexing, "scan_shard", None)
    assert indexing.build_index(expand_shards(str(tmp_path / "out"))).num_samples == 23
    assert not list((tmp_path / "out").glob(".clipkit-shards*"))
    assert [path.name for path in (tmp_path / "out" / ".clipkit-job").iterdir()] == ["done.json"]


def test_shares_of_several_machines_and_a_last_run_give_the_same_set(tmp_path: Path) -> None:
    path = table(tmp_path, 23)
    arguments = ["data", "make-shards", str(path), "--samples-per-shard", "4", "--workers", "1", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    shares = tmp_path / "shares"
    for start, end in ((4, 6), (0, 2), (2, 4)):
        assert main([*arguments, str(shares), "--start", str(start), "--end", str(end)]) == 0
        assert not (shares / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in shares.glob("*.tar")}
    assert len(before) == 6
    assert main([*arguments, str(shares)]) == 0
    assert {path: path.stat().st_mtime_ns for path in shares.glob("*.tar")} == before
    assert bytes_of(shares) == bytes_of(tmp_path / "whole")
    assert main([*arguments, str(tmp_path / "o"), "--start", "6"]) == 2


def test_shards_stay_below_a_number_of_bytes(tmp_path: Path) -> None:
    write_images(tmp_path, [])
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(picture(number, (5 + number * 7 % 90, 60), "PNG"))
    write_csv(tmp_path / "t.csv", ["image", "caption"], [[f"{n}.png", f"c{n}"] for n in range(40)])
    for rules, name in ((ImageRules(), "copied"), (ImageRules(20, format="png"), "resized")):
        out = tmp_path / name
        # Tar files grow in steps of 10,240 bytes: a limit in between leaves room for two of them.
        making = Making(shard_bytes=25_000, samples_per_shard=12, rules=rules)
        records = make_shards(open_collection(tmp_path / "t.csv"), out, making)
        assert sum(record.samples for record in records) == 40
        assert len(records) > 3
        assert all(record.bytes <= 25_000 and record.samples <= 12 for record in records)
    assert main(["data", "make-shards", str(tmp_path / "t.csv"), "--out", "o", "--shard-bytes", "3 lb"]) == 2


def broken(folder: Path) -> Path:
    """Ten rows of which every second cannot be used, each for another reason."""
    write_images(folder, [f"{n}.jpg" for n in range(10)])
    (folder / "1.jpg").unlink()
    (folder / "3.jpg").write_bytes(b"<html>")
    (folder / "5.jpg").unlink()
    os.mkfifo(folder / "5.jpg")
    rows = [[f"{n}.jpg", f"caption {n}"] for n in range(10)]
    rows[7][1], rows[9][0] = " \t", "../9.jpg"
    rows += [["", "no name"], ["nul\0.jpg", "x"], ["a.jpg", "b\0c"], ["0.jpg/x", "y"]]
    return write_csv(folder / "t.csv", ["image", "caption"], rows)


REASONS = [
    (2, "missing image"), (4, "not an image"), (6, "unreadable image"), (8, "empty caption"),
    (10, "outside the image folder"), (11, "missing image"), (12, "unreadable image"), (13, "bad caption"),
    (14, "missing image"),
]  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_rejects_are_counted_listed_and_bounded(tmp_path: Path, workers: int) -> None:
    path = broken(tmp_path)
    collection = open_collection(path)
    with pytest.raises(DataError, match="unusable"):
        make_shards(collection, tmp_path / "out", Making(3, max_reject_fraction=0.5), Engine(workers))
    assert not (tmp_path / "out").exists()
    make_shards(collection, tmp_path / "out", Making(3, max_reject_fraction=0.7), Engine(workers))
    assert rejects(tmp_path / "out") == REASONS
    before = bytes_of(tmp_path / "out")
    # What has ended is measured by the bound of the command that asks again: 9 of 14 rows.
    for bound in (0.7, 9 / 14):
        assert make_shards(collection, tmp_path / "out", Making(3, max_reject_fraction=bound))
    with pytest.raises(DataError, match="9 of 14 rows are unusable"):
        make_shards(collection, tmp_path / "out", Making(3, max_reject_fraction=0.64))
    assert bytes_of(tmp_path / "out") == before
    found = samples(tmp_path / "out")
    assert [members["txt"].decode() for members in found.values()] == [
        f"caption {n}" for n in (0, 2, 4, 6, 8)
    ]
    # Shards that would be empty are left out, and what describes the set says so.
    assert sum(json.loads((tmp_path / "out" / "sizes.json").read_text()).values()) == 5


def test_a_dry_run_finds_the_same_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken(tmp_path)
    before = sorted(tmp_path.iterdir())
    arguments = ["data", "make-shards", str(path), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, "--max-reject-fraction", "0.7"]) == 0
    assert "5 usable of 14; nothing was written" in capsys.readouterr().out
    assert main(arguments) == 3
    assert sorted(tmp_path.iterdir()) == before


def test_missing_images_that_were_brought_are_taken(tmp_path: Path) -> None:
    path = table(tmp_path, 8)
    moved = tmp_path / "photos" / "003 ä.jpg"
    content = moved.read_bytes()
    moved.unlink()
    making = Making(samples_per_shard=2, max_reject_fraction=0.0)
    for _ in range(2):
        with pytest.raises(DataError, match="missing image"):
            make_shards(open_collection(path), tmp_path / "out", making)
    moved.write_bytes(content)
    assert sum(record.samples for record in make_shards(open_collection(path), tmp_path / "out", making)) == 8


def test_other_shards_are_replaced_only_on_demand(tmp_path: Path) -> None:
    path = table(tmp_path, 8)
    make_shards(open_collection(path), tmp_path / "out", Making(samples_per_shard=2))
    before = bytes_of(tmp_path / "out")
    with pytest.raises(ConfigError, match="already holds shards"):
        make_shards(open_collection(path), tmp_path / "out", Making(samples_per_shard=4))
    assert bytes_of(tmp_path / "out") == before
    make_shards(open_collection(path), tmp_path / "out", Making(samples_per_shard=4), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("first", ["train", "evaluation"])
def test_a_folder_holds_shards_for_training_or_for_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str
) -> None:
    second = {"train": "evaluation", "evaluation": "train"}[first]
    command = ["data", "make-shards", str(table(tmp_path, 8)), "--out", str(tmp_path / "out"), "--to"]
    assert main([*command, first]) == 0
    before = bytes_of(tmp_path / "out")
    for more in ([], ["--overwrite"]):
        capsys.readouterr()
        assert main([*command, second, *more]) == 2
        assert "already holds" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_rejects_take_back_only_what_was_made(tmp_path: Path, workers: int) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    out = tmp_path / "out"
    make_shards(open_collection(table(tmp_path / "good", 40)), out, Making(samples_per_shard=2))
    before = bytes_of(out)
    rows = [[f"{n}.jpg", f"caption {n}"] for n in range(40)]
    write_images(tmp_path / "bad", [f"{n}.jpg" for n in range(2)])
    path = write_csv(tmp_path / "bad" / "t.csv", ["image", "caption"], rows)
    with pytest.raises(DataError, match="unusable"):
        make_shards(
            open_collection(path), out, Making(2, max_reject_fraction=0), Engine(workers), overwrite=True
        )
    names = {name for name in before if name.endswith(".tar")}
    # The first shard was replaced and taken back; of the others no row is usable, so none was written.
    assert {path.name for path in out.glob("*.tar")} == names - {"00000.tar"}
    assert all((out / name).read_bytes() == before[name] for name in names - {"00000.tar"})


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="unusable"):
        make_shards(open_collection(broken(tmp_path)), tmp_path / "out", Making(3))
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path, 2)
    (tmp_path / "file").write_text("in the way")
    assert main(["data", "make-shards", str(path), "--out", str(tmp_path / "file" / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_no_row_is_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    with (tmp_path / "t.csv").open("w") as stream:
        stream.write("image,caption\n")
        stream.writelines(f"{n}.jpg,{'word ' * 400}{n}\n" for n in range(4_000))
    # Modules and caches of a first time are not of the table.
    open_collection(tmp_path / "t.csv").close()
    tracemalloc.start()
    collection = open_collection(tmp_path / "t.csv")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(collection) == 4_000
    assert peak < 2_000_000  # the table has 8 MB
    assert [entry.row for entry in collection.part(3_001, 3_070)] == list(range(3_001, 3_070))


def test_webdataset_reads_training_shards(tmp_path: Path) -> None:
    from webdataset import tariterators

    path = table(tmp_path, 23)
    make_shards(open_collection(path), tmp_path / "out", Making(samples_per_shard=10))
    ours = samples(tmp_path / "out")
    read = {}
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        with shard.open("rb") as stream:
            opened = [{"url": shard.name, "stream": stream}]
            for entry in tariterators.group_by_keys(tariterators.tar_file_expander(opened)):
                read[entry["__key__"]] = {"jpg": entry["jpg"], "txt": entry["txt"]}
    assert read == ours


OPEN_CLIP = """
import argparse, sys
import numpy, torch
from open_clip_train.data import get_dataset_size, get_wds_dataset
args = argparse.Namespace(
    val_data=sys.argv[1], val_num_samples=None, train_num_samples=None, seed=0, batch_size=4, workers=1,
    world_size=1, dataset_resampled=False, train_data_upsampling_factors=None,
)
def pixels(image):
    return torch.from_numpy(numpy.asarray(image.convert("RGB")).copy())
info = get_wds_dataset(args, pixels, False, tokenizer=lambda text: [text])
print(get_dataset_size(sys.argv[1])[0])
for images, texts in info.dataloader:
    for image, text in zip(images, texts):
        print(int(image.long().sum()), text)
"""


@pytest.mark.slow  # imports torch and open_clip's training code in a process of its own
def test_open_clip_reads_training_shards(tmp_path: Path) -> None:
    import io

    import numpy as np
    from PIL import Image

    make_shards(open_collection(table(tmp_path, 23)), tmp_path / "out", Making(samples_per_shard=10))
    shards = str(tmp_path / "out" / "{00000..00002}.tar")
    done = subprocess.run(
        [sys.executable, "-c", OPEN_CLIP, shards], capture_output=True, text=True, check=True, timeout=300
    )
    first, *lines = done.stdout.splitlines()
    assert first == "23"
    assert sorted(lines) == sorted(
        f"{np.asarray(Image.open(io.BytesIO(entry['jpg']))).sum()} {entry['txt'].decode()}"
        for entry in samples(tmp_path / "out").values()
    )


def test_a_reader_of_the_benchmark_layout_reads_evaluation_sets(tmp_path: Path) -> None:
    from webdataset import tariterators

    names = [f"{n}.jpg" for n in range(25)]
    write_images(tmp_path, names)
    rows = [[name, f"{name} {number}"] for number in range(3) for name in names]
    path = write_csv(tmp_path / "captions.csv", ["filepath", "caption"], rows)
    collection = open_collection(path, Reading(group=True))
    make_evaluation_set(collection, tmp_path / "out", Making(samples_per_shard=10))
    # The layout's rules: the number of shards in a file, names from 0 without zeros, captions by line.
    assert (tmp_path / "out" / "dataset_type.txt").read_text().strip().lower() == "retrieval"
    read = []
    for number in range(int((tmp_path / "out" / "test" / "nshards.txt").read_text())):
        with (tmp_path / "out" / "test" / f"{number}.tar").open("rb") as stream:
            opened = [{"url": str(number), "stream": stream}]
            for entry in tariterators.group_by_keys(tariterators.tar_file_expander(opened)):
                image = next(entry[name] for name in ("webp", "png", "jpg", "jpeg") if name in entry)
                read.append((entry["__key__"], image, entry["txt"].decode("utf-8").splitlines()))
    assert read == [
        (f"s{n:07d}", picture(n), [f"{names[n]} {number}" for number in range(3)]) for n in range(25)
    ]


def test_an_evaluation_set_leaves_nothing_out_by_itself(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "2.gif").write_bytes(picture(2, name="GIF"))
    rows = [[name, "x"] for name in ("0.jpg", "1.jpg", "2.gif")]
    write_csv(tmp_path / "captions.csv", ["filepath", "caption"], rows)
    arguments = ["data", "make-shards", str(tmp_path), "--to", "evaluation", "--out", str(tmp_path / "o")]
    assert main(arguments) == 3
    # A shard of its own for the reject would leave a gap in names that count without one.
    assert main([*arguments, "--max-reject-fraction", "1", "--samples-per-shard", "1"]) == 3
    assert not (tmp_path / "o").exists()
    assert main([*arguments, "--format", "png"]) == 0
    assert len(samples(tmp_path / "o" / "test")) == 3


def run(path: Path, out: Path) -> subprocess.Popen[bytes]:
    # A session of its own: the workers go with their parent.
    command = [sys.executable, str(ROOT / "data_scripts" / "make_shards.py"), str(path), "--out", str(out)]
    return subprocess.Popen(
        [*command, "--samples-per-shard", "40", "--resize", "16"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    )


def killed_and_continued(tmp_path: Path, kills: int, rows: int) -> None:
    """Kills a job at random points, `kills` times in its midst, and continues it each time."""
    names = [f"{n}.png" for n in range(rows)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(number, (64, 64), "PNG"))
    path = write_csv(tmp_path / "t.csv", ["image", "caption"], [[name, f"c {name}"] for name in names])
    process = run(path, tmp_path / "whole")
    assert b"error" not in process.communicate(timeout=300)[1]
    expected = bytes_of(tmp_path / "whole")
    generator = random.Random(0)
    midst = 0
    # A kill that came too late is checked like the others, and does not count.
    for number in range(3 * kills + 3):
        if midst == kills:
            return
        out = tmp_path / f"out{number}"
        shards = generator.randrange(1, rows // 40 // 2)
        process = run(path, out)
        # By what is there and not by a clock: a busy machine takes seconds more to start a process.
        while process.poll() is None and len(list(out.glob("*.tar"))) < shards:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.02))
        with contextlib.suppress(ProcessLookupError):  # it is done already
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        midst += any(out.glob("*.tar")) and not (out / "sizes.json").exists()
        process = run(path, out)
        process.communicate(timeout=300)
        assert process.returncode == 0
        found = bytes_of(out)
        assert found == expected, f"kill {number}"
        assert not list(out.rglob("*.tmp"))
    pytest.fail(f"{midst} of {number + 1} kills came before the job was done")


def test_a_killed_job_continues_to_the_same_bytes(tmp_path: Path) -> None:
    killed_and_continued(tmp_path, 1, 400)


@pytest.mark.slow
def test_ten_kills_at_random_points(tmp_path: Path) -> None:
    killed_and_continued(tmp_path, 10, 3000)


def test_finished_shards_are_not_made_again(tmp_path: Path) -> None:
    path = table(tmp_path, 12)
    job = MakeJob(open_collection(path), tmp_path / "out", Making(samples_per_shard=2), Layout())
    job.begin(overwrite=False)
    job.run(Engine(), numbers=range(0, 4))
    (tmp_path / "out" / "00002.tar").write_bytes(b"cut short")
    # What a kill in the midst of writing leaves beside them.
    for name in ("00003.tar.0123abcd.tmp", "sizes.json.0123abcd.tmp"):
        (tmp_path / "out" / name).write_bytes(b"half")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    again = MakeJob(open_collection(path), tmp_path / "out", Making(samples_per_shard=2), Layout())
    again.begin(overwrite=False)
    made = again.run(Engine())
    assert made.resumed == 3
    for number in (0, 1, 3):
        assert (tmp_path / "out" / f"0000{number}.tar").stat().st_mtime_ns == times[f"0000{number}.tar"]
    make_shards(open_collection(path), tmp_path / "fresh", Making(samples_per_shard=2))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "fresh")


def test_a_table_that_changed_after_a_kill_is_named(tmp_path: Path) -> None:
    path, out, making = table(tmp_path, 12), tmp_path / "out", Making(samples_per_shard=2)
    job = MakeJob(open_collection(path), out, making, Layout())
    job.begin(overwrite=False)
    job.run(Engine(), numbers=range(0, 2))
    before = bytes_of(out)
    # The same rows at another time are the same input.
    path.write_bytes(path.read_bytes())
    MakeJob(open_collection(path), out, making, Layout()).begin(overwrite=False)
    path.write_bytes(path.read_bytes().rstrip() + b" and more\n")
    with pytest.raises(ConfigError, match=r"made otherwise: pairs\.csv changed\n"):
        make_shards(open_collection(path), out, making)
    assert bytes_of(out) == before


def test_records_are_read_when_their_turn_comes(tmp_path: Path) -> None:
    path, out = table(tmp_path, 12), tmp_path / "out"
    job = MakeJob(open_collection(path), out, Making(samples_per_shard=2), Layout())
    job.begin(overwrite=False)
    job.run(Engine(), numbers=range(0, 6))
    # Nothing of the later shards is held: what goes meanwhile is noticed, and made again.
    seen: list[int] = []

    def spoil(rows: int) -> None:
        if not seen:
            (out / "00005.tar").unlink()
        seen.append(rows)

    job.run(Engine(), spoil)
    make_shards(open_collection(path), tmp_path / "fresh", Making(samples_per_shard=2))
    assert bytes_of(out) == bytes_of(tmp_path / "fresh")
