"""The index: what it counts, what damage it names, and when its cache is used."""

from __future__ import annotations

import io
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

import clipkit.data.indexing
import clipkit.data.tar_index
from clipkit.data.indexing import build_index
from clipkit.data.scan import scan_shard
from clipkit.data.source import LocalShards, expand_shards
from clipkit.data.tar_format import split_name
from clipkit.types import DataError
from tests.data.makers import good, stream, write_shards, write_tar


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", [good(number) for number in range(20)])


def test_counts_and_offsets_equal_tarfile(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [5, 1, 7])
    index = build_index(expand_shards(str(folder)))
    assert index.counts.tolist() == [5, 1, 7]
    assert index.num_samples == 13
    source = LocalShards(index.shards)
    for shard, count in enumerate(index.counts.tolist()):
        with tarfile.open(index.shards[shard]) as tar:
            starts = [member.offset for member in tar if member.name.endswith(".png")]
        assert index.offsets[index.first_entry[shard] :][:count].tolist() == starts
        for first in range(count):
            stored, number, begin, end = index.span(shard, first, count - 1)
            assert (stored, number, begin) == (first, count - first, starts[first])
            assert source.read(shard, begin, end)[257:262] == b"ustar"


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_every_tar_dialect(tmp_path: Path, kind: int) -> None:
    """Long names (prefix, GNU and PAX headers), folders, './' and non-ASCII names."""
    path = tmp_path / "a.tar"
    names = ["d" * 90 + "/" + "k" * 60, "./short", "größe/ü"]
    if kind != tarfile.USTAR_FORMAT:
        names.append("x" * 180 + "/" + "y" * 120)
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo("d" * 90)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            for extension in ("jpg", "TXT"):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = 700
                info.mtime = 1.5  # needs a PAX record where the dialect has one
                tar.addfile(info, io.BytesIO(b"x" * 700))
    assert len(scan_shard(str(path)).starts) - 1 == len(names)


def test_reads_webdatasets_writer(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as out:
        for number in range(5):
            out.write({"__key__": f"{number:05d}", "jpg": b"123", "txt": "text"})
    assert build_index([str(tmp_path / "a.tar")]).num_samples == 5


def test_members_without_key_are_ignored_and_counted(tmp_path: Path) -> None:
    extra = [("README", b"x"), (".DS_Store", b"x"), ("__meta__.json", b"{}"), ("._000001.png", b"x")]
    path = write_tar(tmp_path / "a.tar", [good(0), extra, good(1)])
    index = build_index([str(path)])
    assert (index.num_samples, index.ignored) == (2, 4)
    assert split_name("a/b.c/00.seg.PNG") == ("a/b.c/00", "seg.png")


# Damage: every case ends with an error that names the shard and a byte; none loses samples silently.


def test_a_damaged_cache_is_rebuilt(shard: Path) -> None:
    index = build_index([str(shard)])
    assert index.file is not None
    for file in shard.parent.glob(".clipkit-index*"):
        whole = file.read_bytes()
        for damaged in (b"", whole[:-20], b"\x93NUMPY rubbish"):
            file.write_bytes(damaged)
            assert build_index([str(shard)]).sha == index.sha
        assert file.read_bytes() == whole


def test_cache_outside_read_only_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    data = write_shards(tmp_path / "data", [4])
    mkstemp = clipkit.data.tar_index.tempfile.mkstemp

    def refuse(*args: object, **options: object) -> object:
        if options["dir"] == data:
            raise PermissionError("read-only")
        return mkstemp(*args, **options)  # type: ignore[call-overload]

    # chmod would not stop root, which tests often are.
    monkeypatch.setattr(clipkit.data.tar_index.tempfile, "mkstemp", refuse)
    index = build_index(expand_shards(str(data)))
    assert index.file is not None
    assert index.file.startswith(str(tmp_path / "xdg" / "clipkit"))
    assert not list(data.glob(".clipkit*"))
    elsewhere = build_index(expand_shards(str(data)), cache_dir=tmp_path / "mine")
    assert elsewhere.file is not None
    assert elsewhere.file.startswith(str(tmp_path / "mine"))


def test_large_sets_are_sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the dense limit every 16th offset is kept; batches stay what the order says."""
    folder = write_shards(tmp_path / "set", [40, 33, 1, 16, 17])
    dense = build_index(expand_shards(str(folder)), cache_dir=tmp_path / "dense")
    monkeypatch.setattr(clipkit.data.indexing, "DENSE_SAMPLES", 50)
    sparse = build_index(expand_shards(str(folder)), cache_dir=tmp_path / "sparse")
    assert (sparse.stride, sparse.sha) == (16, dense.sha)
    assert sparse.counts.tolist() == dense.counts.tolist()
    for shard, count in enumerate(dense.counts.tolist()):
        for first in range(count):
            stored, number, begin, end = sparse.span(shard, first, first)
            assert stored == first // 16 * 16
            assert (begin, end) == dense.span(shard, stored, stored + number - 1)[2:]
    opened = stream(folder, 16)
    assert opened.describe()["chunk_size"] == 16
    ids = np.concatenate([batch.ids.numpy() for batch in opened.batches(0, opened.steps_per_epoch)])
    keys = [key for batch in opened.batches(0, 2) for key in batch.keys]
    assert [int(key) for key in keys] == ids[:32].tolist()
    assert len(set(ids.tolist())) == 96


def test_index_pickles_by_file(tmp_path: Path) -> None:
    index = build_index(expand_shards(str(write_shards(tmp_path / "set", [300]))))
    copy = pickle.loads(pickle.dumps(index))
    assert np.array_equal(copy.offsets, index.offsets)
    assert len(pickle.dumps(index)) < 300 * 8


def test_processes_share_the_walk(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [2] * 8)
    seen: list[tuple[int, int]] = []
    index = build_index(
        expand_shards(str(folder)), workers=2, on_shard=lambda done, total: seen.append((done, total))
    )
    assert index.num_samples == 16
    assert seen == [(done, 8) for done in range(1, 9)]


def test_indexing_loads_no_torch() -> None:
    program = "import sys, clipkit.data.tar_index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_expanding_specifications(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", [1] * 11)
    names = [str(folder / f"{n:05d}.tar") for n in range(11)]
    assert expand_shards(str(folder)) == names
    assert expand_shards(f"{folder}/{{00000..00010}}.tar") == names
    assert expand_shards(f"{folder}/0000{{0,3}}.tar") == [names[0], names[3]]
    assert expand_shards(f"{folder}/*.tar") == names
    assert expand_shards([names[2], names[1]]) == [names[2], names[1]]
    for number in (2, 10, 1):
        shutil.copy(names[0], tmp_path / f"s{number}.tar")
    assert [Path(name).name for name in expand_shards(str(tmp_path / "s*.tar"))] == [
        "s1.tar",
        "s2.tar",
        "s10.tar",
    ]


def test_names_with_brackets_and_odd_digits(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a[1]", [1, 1])
    names = [str(folder / f"{n:05d}.tar") for n in range(2)]
    assert expand_shards(f"{folder}/{{00000..00001}}.tar") == names
    for name in ("1²3.tar", "1²2.tar"):
        shutil.copy(names[0], tmp_path / name)
    assert [Path(name).name for name in expand_shards(str(tmp_path / "*.tar"))] == ["1²2.tar", "1²3.tar"]


def test_long_lists_are_checked_for_repeats_in_no_time() -> None:
    names = [f"{number}.tar" for number in range(30_000)]
    before = time.process_time()
    assert expand_shards(names) == names
    with pytest.raises(DataError, match=r"twice: 7\.tar\n"):
        expand_shards([*names, "7.tar"])
    assert time.process_time() - before < 1
