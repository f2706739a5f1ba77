"""Damaged, changed, missing and hostile shards: refused with shard, member and byte; none lost unseen."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

import clipkit.data.http_ranges
import clipkit.data.indexing
import clipkit.data.remote
import clipkit.data.scan
import clipkit.data.tar_index
from clipkit.data.indexing import build_index
from clipkit.data.remote import ShardBytes
from clipkit.data.scan import scan_shard
from clipkit.data.source import expand_shards
from clipkit.dist import World
from clipkit.types import ConfigError, DataError
from tests.checkpoint.children import in_child
from tests.commands import fails, write
from tests.data.makers import global_run, good, same, stream, take, write_shards, write_tar
from tests.data.servers import serving


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
@pytest.mark.fault(
    "F5",
    "a tar cut in a payload, in a header, at a member's border, between picture and caption",
    "error that names shard, member and byte, with a cure; exit 3; nothing is lost in silence",
)
@pytest.mark.fault(
    "F6",
    "0 bytes, a web page, gzip named .tar, 1 KB of zeros in the middle, zeros to the end, a bad checksum",
    "error that names shard, member and byte, with a cure; exit 3; nothing is lost in silence",
)
def test_f05_f06_damage_is_named(shard: Path, damage: object) -> None:
    expected = damage(shard)  # type: ignore[operator]
    with pytest.raises(DataError) as caught:
        build_index([str(shard)])
    assert str(shard) in caught.value.cause
    assert expected in caught.value.cause
    assert "byte" in caught.value.cause or "page" in expected or "gzip" in expected
    assert caught.value.cure
    assert "\n" not in caught.value.cause + caught.value.cure


@pytest.mark.fault("F5", "a tar cut at every 307th length", "refused at each")
def test_f05_every_cut_is_found(shard: Path, tmp_path: Path) -> None:
    """Whatever the length a shard is cut to, short of losing padding only, the index refuses it."""
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end, 307), end - 1, end]:
        cut.write_bytes(data[:length])
        with pytest.raises(DataError):
            scan_shard(str(cut))


@pytest.mark.fault(
    "F5",
    "a cut tar given to `clipkit pretrain` and `clipkit index`",
    "exit 3, one line of cause, one of cure",
)
def test_f05_commands_refuse_a_cut_tar(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    damaged = shards / "00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:9000])
    assert fails(capsys, 3, "00001.tar", "pretrain", write(config, tmp_path / "c.yaml"))
    assert fails(capsys, 3, "00001.tar", "index", shards)


@pytest.mark.fault(
    "F7",
    "samples appended, or a time stamp changed, after the shard was indexed",
    "walked again; other contents are another set, a new time alone is not",
)
def test_f07_the_index_follows_the_files(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.fault(
    "F7",
    "a shard changed after a checkpoint; another seed, batch size, number of lanes or version of the order",
    "refused before step 1, naming what differs",
)
def test_f07_a_position_in_other_shards_is_refused(uneven: Path, tmp_path: Path) -> None:
    opened = stream(uneven, 12)
    state = opened.state(3)
    opened.check_state(state)
    assert opened.world_sizes() == [1, 2, 3, 4, 6, 12]
    assert opened.describe()["exact"] is True
    for key, value in {"seed": 6, "batch_size": 24, "lanes": 4, "index_sha": "x", "order_version": 0}.items():
        with pytest.raises(ConfigError, match=f"{key}: {value} -> "):
            opened.check_state({**state, key: value})
    copy = tmp_path / "copy"
    shutil.copytree(uneven, copy)
    stream(copy, 12, saved=state).check_state(state)
    write_tar(copy / "00001.tar", [good(900)])
    with pytest.raises(ConfigError, match="index_sha"):
        stream(copy, 12, saved=state)
    with pytest.raises(ConfigError, match="started with 12"):
        stream(uneven, 12, saved=state, lanes=6)


@pytest.mark.fault(
    "F7",
    "a shard overwritten or cut while it is read",
    "the run stops, naming the shard and `clipkit index --verify`",
)
def test_f07_a_shard_changed_while_in_use(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "set", [30])
    opened = stream(shards, 3, window_bytes=1)
    batches = opened.batches(0, 10)
    next(batches)
    with open(shards / "00000.tar", "r+b") as file:
        file.write(bytes(30 * 2048))
    with pytest.raises(DataError, match="clipkit index --verify"):
        list(batches)
    os.truncate(shards / "00000.tar", 512)
    with pytest.raises(DataError, match="changed after it was indexed"):
        take(opened, 0, 10)


@pytest.mark.fault(
    "F7", "one byte of a payload flipped on the server after indexing", "refused by its tag before it is used"
)
def test_f07_a_changed_object_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "set", [20, 20])
    with serving(shards) as server:
        spec = expand_shards(f"{server.url}/{{00000..00001}}.tar")
        index = build_index(spec)
        data = bytearray((shards / "00001.tar").read_bytes())
        data[600] ^= 1  # in a payload: the size and every header stay
        (shards / "00001.tar").write_bytes(data)
        source = ShardBytes(index)
        assert source.read(0, 0, 512)
        with pytest.raises(DataError, match=r"changed after it was indexed\nrun: clipkit index --verify"):
            source.read(1, 0, 512)
        # The next start sees it before the first step, and walks the changed shard only.
        server.requests.clear()
        again = build_index(spec)
        assert again.stamps[0] == index.stamps[0]
        assert again.stamps[1] != index.stamps[1]
        asked = [path for path, wanted, _ in server.requests if wanted != "bytes=0-0"]
        assert asked == ["/00001.tar"]
        write_tar(shards / "00001.tar", [good(number) for number in range(9)])
        with pytest.raises(DataError, match="changed after it was indexed"):
            ShardBytes(again).read(1, 20_000, 30_000)


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
@pytest.mark.fault(
    "F12",
    "a key twice in a shard, interleaved members, extensions that differ by case only, names with dots",
    "refused, naming both members",
)
def test_f12_merged_samples_are_refused(
    tmp_path: Path, samples: list[list[tuple[str, bytes]]], words: str
) -> None:
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(DataError, match=words):
        build_index([str(tmp_path / "a.tar")])


@pytest.mark.fault("F12", "one key in two shards", "two samples")
def test_f12_one_key_in_two_shards_is_allowed(tmp_path: Path) -> None:
    paths = [str(write_tar(tmp_path / name, [good(0)])) for name in ("a.tar", "b.tar")]
    assert build_index(paths).num_samples == 2


@pytest.mark.fault(
    "F13",
    "shards of a range that are not there",
    "exit 3, naming the first of them; no checkpoint folder is filled",
)
def test_f13_a_missing_shard(
    capsys: pytest.CaptureFixture[str], config: dict[str, Any], tmp_path: Path
) -> None:
    config["data"]["train"] = str(tmp_path / "shards" / "{00000..00004}.tar")
    assert fails(capsys, 3, "00002.tar", "pretrain", write(config, tmp_path / "c.yaml"))
    assert not (tmp_path / "run" / "checkpoints").exists() or not any(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


@pytest.mark.fault(
    "F13",
    "a directory named .tar, a dangling link, missing files",
    "the first five with their reasons, and how many more",
)
def test_f13_unreadable_shards_are_listed(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to(tmp_path / "gone")
    with pytest.raises(
        DataError, match=r"9 of 9 shards.*not a file.*dangling link.*no such file.* and 4 more"
    ):
        build_index(
            [str(tmp_path / "folder.tar"), str(tmp_path / "link.tar"), *(f"no{n}.tar" for n in range(7))]
        )


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("nothing-*.tar", DataError, "no shard matches"),
        ([], DataError, "no shard is named"),
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
@pytest.mark.fault(
    "F13", "patterns that match nothing, empty lists, repeats, broken braces", "refused with the pattern"
)
@pytest.mark.fault(
    "F27",
    "`pipe:`, `file:`, plain http to other hosts, unknown schemes, listings",
    "refused; only paths, https, s3, gs and hf are read",
)
def test_f13_f27_refused_specifications(spec: str | list[str], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        expand_shards(spec)


@pytest.mark.fault("F27", "`GOPEN_REWRITE` and `${VARIABLES}` in the environment", "ignored: no command runs")
def test_f27_a_specification_is_never_expanded_by_the_environment(
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


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.fault("F28", "links, pipes and devices in a tar", "refused; nothing is ever extracted")
def test_f28_only_files_are_members(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("000.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="only files"):
        build_index([str(tmp_path / "a.tar")])


@pytest.mark.parametrize("name", ["/etc/x.jpg", "../x.jpg", "a/../../x.jpg"])
@pytest.mark.fault("F28", "absolute names and `../` in a tar", "refused")
def test_f28_names_stay_inside(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", [[(name, b"x")]])
    with pytest.raises(DataError, match="leaves its folder"):
        build_index([str(tmp_path / "a.tar")])


@pytest.mark.parametrize(("counts", "batch_size"), [([8], 8), ([8], 3), ([3, 2, 3], 4), ([1], 1), ([5], 5)])
@pytest.mark.fault(
    "F34",
    "1 to 8 samples, as many as the batch or a few more",
    "every sample once an epoch, the same for every number of processes",
)
def test_f34_tiny_sets(tmp_path: Path, counts: list[int], batch_size: int) -> None:
    shards = write_shards(tmp_path / "set", counts)
    total = sum(counts)
    reference = take(stream(shards, batch_size), 0, 3 * (total // batch_size))
    for epoch in range(3):
        steps = total // batch_size
        ids = torch.cat([batch.ids for batch in reference[epoch * steps : (epoch + 1) * steps]])
        assert len(ids.unique()) == steps * batch_size
    assert same(global_run(shards, batch_size, batch_size, 0, len(reference)), reference)


@pytest.mark.fault(
    "F34",
    "no sample, fewer samples than the batch, a batch that the processes do not divide",
    "refused with the numbers",
)
def test_f34_impossible_sizes_are_refused(uneven: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than the set of 120"):
        stream(uneven, 121)
    with pytest.raises(ConfigError, match="not a multiple of the 7 processes"):
        stream(uneven, 12, World(0, 7))
    with pytest.raises(ConfigError, match="lanes=5 does not divide"):
        stream(uneven, 12, lanes=5)
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match="no sample"):
        stream(tmp_path / "empty.tar", 1)


@pytest.mark.fault(
    "F13", "a shard that this user may not read", "error that names it, before a model is built"
)
def test_f13_a_shard_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        # Readable for all down to the shard: what the other user meets is the shard itself.
        os.chmod(name, 0o755)
        shard = write_tar(Path(name) / "a.tar", [good(0)])
        shard.chmod(0)

        def look() -> None:
            if os.getuid() == 0:
                os.seteuid(65534)
            with pytest.raises(DataError, match=r"a\.tar: permission denied|Permission denied"):
                build_index([str(shard)])

        assert in_child(look) == 0


@pytest.mark.fault(
    "F28", "10,000 empty members, and one sparse file", "every member is walked in little memory; refused"
)
def test_f28_many_tiny_members_and_a_sparse_one(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [[(f"{number:06d}.txt", b"")] for number in range(10_000)])
    tracemalloc.start()
    try:
        assert len(scan_shard(str(shard)).starts) == 10_001
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        info = tarfile.TarInfo("000.jpg")
        info.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(info)
    with pytest.raises(DataError, match="only files"):
        build_index([str(tmp_path / "b.tar")])
