"""The index: what it counts, what damage it names, and when its cache is used."""

from __future__ import annotations

import gzip
import io
import os
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
from clipkit.types import ConfigError, DataError
from tests.data.makers import good, stream, write_shards, write_tar


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "a.tar", [good(number) for number in range(20)])


def header_of(path: Path, name: str) -> int:
    """Byte offset of a member's header."""
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def rewrite(path: Path, change: object) -> None:
    data = bytearray(path.read_bytes())
    change(data)  # type: ignore[operator]
    path.write_bytes(data)


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


def cut_in_payload(path: Path) -> str:
    rewrite(path, lambda data: data.__delitem__(slice(header_of(path, "000010.png") + 600, None)))
    return "000010.png"


def cut_in_header(path: Path) -> str:
    rewrite(path, lambda data: data.__delitem__(slice(header_of(path, "000010.png") + 100, None)))
    return "000009.txt"


def cut_at_border(path: Path) -> str:
    rewrite(path, lambda data: data.__delitem__(slice(header_of(path, "000010.png"), None)))
    return "member border"


def cut_inside_sample(path: Path) -> str:
    rewrite(path, lambda data: data.__delitem__(slice(header_of(path, "000010.txt"), None)))
    return "000010.png"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "0 bytes"


def web_page(path: Path) -> str:
    path.write_text("<html>" + "404 " * 500)
    return "web page"


def zeros_in_the_middle(path: Path) -> str:
    at = header_of(path, "000010.png")
    rewrite(path, lambda data: data.__setitem__(slice(at, at + 1024), bytes(1024)))
    return "after the end-of-archive marker"


def zeros_to_the_end(path: Path) -> str:
    at = header_of(path, "000002.png")
    rewrite(path, lambda data: data.__setitem__(slice(at, None), bytes(len(data) - at)))
    return "more than one record of padding"


def bad_checksum(path: Path) -> str:
    rewrite(path, lambda data: data.__setitem__(header_of(path, "000010.png") + 3, 65))
    return "checksum"


def gzip_named_tar(path: Path) -> str:
    path.write_bytes(gzip.compress(path.read_bytes()))
    return "gzip data"


def huge_claim(path: Path) -> str:
    """A member that claims 8 EB, checksum and all."""
    at = header_of(path, "000010.png")

    def change(data: bytearray) -> None:
        block = data[at : at + 512]
        block[124:136] = b"\x80" + bytes(3) + (2**63 - 1).to_bytes(8, "big")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        data[at : at + 512] = block

    rewrite(path, change)
    return "claims 9223372036854775807 bytes"


DAMAGES = [
    cut_in_payload, cut_in_header, cut_at_border, cut_inside_sample, empty, web_page, zeros_in_the_middle,
    zeros_to_the_end, bad_checksum, gzip_named_tar, huge_claim,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named(shard: Path, damage: object) -> None:
    expected = damage(shard)  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        build_index([str(shard)])
    assert str(shard) in caught.value.cause
    assert expected in caught.value.cause
    assert "byte" in caught.value.cause or "page" in expected or "gzip" in expected
    assert caught.value.cure
    assert "\n" not in caught.value.cause + caught.value.cure


def test_every_cut_is_found(shard: Path, tmp_path: Path) -> None:
    """Whatever the length a shard is cut to, short of losing padding only, the index refuses it."""
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end, 307), end - 1, end]:
        cut.write_bytes(data[:length])
        with pytest.raises(DataError):
            scan_shard(str(cut))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_only_files_are_members(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("000.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="only files"):
        build_index([str(tmp_path / "a.tar")])


@pytest.mark.parametrize("name", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg"])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [[(name, b"x")]])
    with pytest.raises(DataError, match="leaves its folder"):
        build_index([str(tmp_path / "a.tar")])


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([good(0), good(1), good(0)], "000000.*000000.*used twice"),
        ([[("a.png", b"x"), ("b.png", b"x"), ("a.txt", b"x"), ("b.txt", b"x")]], "a.png.*a.txt.*interleaved"),
        ([[("a.png", b"x"), ("a.PNG", b"x")]], "a.PNG.*repeats.*a.png"),
        (
            [[("p.001.jpg", b"x"), ("p.001.txt", b"x")], [("p.002.jpg", b"x")]],
            "p.001.jpg.*p.002.jpg.*first dot",
        ),
    ],
)
def test_merged_samples_are_refused(
    tmp_path: Path, samples: list[list[tuple[str, bytes]]], words: str
) -> None:
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match=words):
        build_index([str(tmp_path / "a.tar")])


def test_one_key_in_two_shards_is_allowed(tmp_path: Path) -> None:
    paths = [str(write_tar(tmp_path / name, [good(0)])) for name in ("a.tar", "b.tar")]
    assert build_index(paths).num_samples == 2


def test_unreadable_shards_are_listed(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(
        DataError, match=r"9 of 9 shards.*not a file.*dangling link.*no such file.* and 4 more"
    ):
        build_index(
            [str(tmp_path / "folder.tar"), str(tmp_path / "link.tar"), *(f"no{n}.tar" for n in range(7))]
        )


def test_cache_is_used_and_follows_the_files(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_index([str(shard)])
    assert first.file is not None
    assert Path(first.file).parent == shard.parent
    with monkeypatch.context() as patch:
        patch.setattr(clipkit.data.indexing, "scan_shard", None)
        again = build_index([str(shard)])
    assert again.sha == first.sha
    write_tar(shard, [good(number) for number in range(21)])
    assert build_index([str(shard)]).num_samples == 21
    # A flipped byte in a header field changes the identity of the set, a new time alone does not.
    os.utime(shard, (1, 1))
    changed = build_index([str(shard)])
    shutil.copy(shard, shard.parent / "copy.tar")
    assert build_index([str(shard.parent / "copy.tar")]).sha == changed.sha != first.sha


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


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("nothing-*.tar", DataError, "no shard matches"),
        ([], DataError, "names no shard"),
        (["a.tar", "a.tar"], DataError, "twice"),
        ("a{0..x}.tar", ConfigError, "neither a range nor a list"),
        ("pipe:cat a.tar", ConfigError, "shell command"),
        ("PIPE:touch canary", ConfigError, "shell command"),
        ("file:///etc/passwd", ConfigError, "file:"),
        ("http://169.254.169.254/a.tar", ConfigError, "read over http"),
        ("http://localhost@host/a.tar", ConfigError, "read over http"),
        ("http://{localhost,host}/a.tar", ConfigError, "read over http"),
        ("ftp://host/a.tar", ConfigError, "scheme 'ftp'"),
        ("s3://bucket/*.tar", ConfigError, "not listed"),
        ("https://host/folder/", ConfigError, "not listed"),
    ],
)
def test_refused_specifications(spec: str | list[str], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        expand_shards(spec)


def test_a_specification_is_never_expanded_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither webdataset's rewriting nor variables turn a path into a command."""
    canary = tmp_path / "canary"
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {canary};")
    monkeypatch.setenv("EVIL", "x")
    with pytest.raises(DataError, match="cannot be read"):
        stream(f"{tmp_path}/${{EVIL,x}}.tar", 2)
    with pytest.raises(DataError, match="cannot be read"):
        stream(f"{tmp_path}/a.tar.gz", 2)
    assert not canary.exists()
