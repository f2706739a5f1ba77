"""Lists of shards, folders that img2dataset left, and ranges with holes: what is read and what is said."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from clipkit.data.loader import CaptionField, LoaderOptions, Source, open_train
from clipkit.data.source import expand_shards
from clipkit.data.text import TextView
from clipkit.data.views import ImageView
from clipkit.dist import World
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.data.img2dataset_like import Fetched, failed, write_shard
from tests.data.makers import ByteTokenizer, encoded, png, stream, take, write_shards

HOLES = (0, 2, 3)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What img2dataset leaves of 36 rows in four shards when the second one fails: 20 pairs in three tars."""
    folder = tmp_path_factory.mktemp("img2dataset")
    for number in HOLES:
        rows = []
        for at in range(9):
            url = f"https://host/{number}/{at}.jpg?size=1"
            if at in (1, 4) or (number == 3 and at == 8):
                rows.append(failed(url))
                continue
            picture = encoded(Image.new("RGB", (32, 24), (9 * at, 60 * number, 90)), "JPEG")
            rows.append(Fetched(url, f"picture {at} of {number} äöü", picture, f"{number:016x}{at:016x}"))
        write_shard(folder, number, rows)
    (folder / "_tmp").mkdir()
    return folder


def samples_of(tars: list[str]) -> Iterator[dict[str, Any]]:
    """The samples as webdataset groups them; it leaves files open itself."""
    for path in tars:
        with open(path, "rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))


@pytest.mark.parametrize("field", ["txt", "json.caption", "json.uid"])
def test_a_folder_with_holes_is_read_as_webdataset_reads_it(fetched: Path, field: str) -> None:
    tars = [str(fetched / f"{number:05d}.tar") for number in HOLES]
    assert expand_shards(str(fetched)) == expand_shards(f"{fetched}/*.tar") == tars
    expected = {
        sample["__key__"]: json.loads(sample["json"])["uid"]
        if field == "json.uid"
        else sample["txt"].decode("utf-8")
        for sample in samples_of(tars)
    }
    view = TextView(tokenizer=ByteTokenizer(48), context_length=48)
    source = Source(str(fetched), (CaptionField(field),))
    opened = open_train(LoaderOptions(source, 5, 0), [ImageView(size=(8, 8))], [view], World())
    assert opened.num_samples == len(expected) == 20
    found: dict[str, str] = {}
    for batch in take(opened, 0, 4):
        for row, key in enumerate(batch.keys):
            tokens = [number for number in batch.texts["text"][row].tolist() if number]
            found[key] = bytes(tokens[: tokens.index(300)]).decode("utf-8")
    assert found == expected


def test_a_range_with_holes_names_them_and_the_cure(fetched: Path) -> None:
    with pytest.raises(DataError, match=r"1 of the 4 shards in .* are missing: 00001\.tar") as caught:
        expand_shards(f"{fetched}/{{00000..00003}}.tar")
    assert f"give the folder {fetched} or a list file" in caught.value.cure
    with pytest.raises(DataError, match=r"97 of the 100 shards .*: 00001.tar, 00004.tar, .* and 92 more"):
        expand_shards(f"{fetched}/{{00000..00099}}.tar")
    # Nothing of it there is another mistake: the path.
    with pytest.raises(DataError, match="cannot be read"):
        stream(f"{fetched}/elsewhere/{{00000..00003}}.tar", 2)
    assert len(expand_shards(f"{fetched}/{{00002..00003}}.tar")) == 2
    assert len(expand_shards(f"{fetched}/0000{{0,2,3}}.tar")) == 3


def test_a_range_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a0", "a1"):
        write_shards(tmp_path / name, [1, 1])
    assert len(expand_shards("a{0..1}/{00000..00001}.tar")) == 4
    (tmp_path / "a1" / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of the 4 .*: 00001\.tar"):
        expand_shards("a{0..1}/{00000..00001}.tar")
    assert expand_shards("a{0..1}/*.tar") == ["a0/00000.tar", "a0/00001.tar", "a1/00000.tar"]


def test_a_list_names_what_a_specification_may_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "set", [3, 3, 3])
    write_shards(tmp_path / "more", [2] * 11)
    write_shards(tmp_path / "with space #1", [2])
    absolute = write_shards(tmp_path / "absolute", [1]) / "00000.tar"
    lines = [
        "# shards that passed",
        "",
        "  set/00002.tar  ",
        "set/00000.tar",
        "more",
        "with space #1/{00000..00000}.tar",
        str(absolute),
        "https://host/a/{00..01}.tar?x=1#2",
        "https://host/b.tar",
    ]
    (tmp_path / "shards.list").write_text("\n".join(lines))
    (tmp_path / "lists").mkdir()
    # A byte order mark and the line ends of another system, relative to the folder of the list.
    (tmp_path / "lists" / "shards.txt").write_bytes(b"\xef\xbb\xbf../set/00001.tar\r\n../set/00000.tar")
    expected = [
        *("set/00002.tar", "set/00000.tar"),
        *(f"more/{number:05d}.tar" for number in range(11)),
        "with space #1/00000.tar",
    ]
    remote = ["https://host/a/00.tar?x=1#2", "https://host/a/01.tar?x=1#2", "https://host/b.tar"]
    found = expand_shards(str(tmp_path / "shards.list"))
    assert found == [*(str(tmp_path / name) for name in expected), str(absolute), *remote]
    up = tmp_path / "lists" / ".." / "set"
    assert expand_shards(str(tmp_path / "lists" / "shards.txt")) == [
        f"{up}/00001.tar",
        f"{up}/00000.tar",
    ]
    monkeypatch.chdir(tmp_path)
    assert expand_shards("shards.list") == [*expected, str(absolute), *remote]
    assert len(expand_shards(["shards.list", "set/00001.tar"])) == len(found) + 1


def test_a_list_is_trained_on(tmp_path: Path) -> None:
    write_shards(tmp_path / "set", [8, 8, 8])
    (tmp_path / "two.txt").write_text("set/00002.tar\nset/00000.tar\n")
    opened = stream(tmp_path / "two.txt", 4)
    assert opened.num_samples == 16
    keys = {int(key) for batch in take(opened, 0, 4) for key in batch.keys}
    assert keys == {*range(8), *range(16, 24)}


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"", DataError, "names no shard"),
        (b"# nothing\n\n", DataError, "names no shard"),
        (b"\xff\xfe\x00a", DataError, "no UTF-8"),
        (b"a\x00b.tar\n", DataError, "list.txt:1: not a shard"),
        (b"list.txt\n", DataError, "list.txt:1: not a shard"),
        (b"\n/no/such/*.tar\n", DataError, "list.txt:2: no shard matches"),
        (b"pipe:cat a.tar\n", ConfigError, "list.txt:1: .*shell command"),
        (b"ftp://host/a.tar\n", ConfigError, "list.txt:1: .*scheme 'ftp'"),
        (b"a.tar\na.tar\n", DataError, "named twice"),
        (b"gone.tar\n", DataError, "cannot be read: .*gone.tar"),
    ],
)
def test_bad_lists(tmp_path: Path, content: bytes, kind: type[ClipkitError], words: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(kind, match=words):
        stream(tmp_path / "list.txt", 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything: run pytest as another user")
def test_a_list_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.tar\n")
    (tmp_path / "list.txt").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        expand_shards(str(tmp_path / "list.txt"))


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [2])

    def locked(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", locked)
    with pytest.raises(DataError, match="cannot be listed"):
        expand_shards(str(tmp_path))


def test_an_empty_shard_between_others(tmp_path: Path) -> None:
    """A shard of which every row failed is a whole tar without members."""
    write_shard(tmp_path, 0, [Fetched("u", "one", png(1)), Fetched("u", "two", png(2))])
    write_shard(tmp_path, 1, [failed("u"), failed("u")])
    write_shard(tmp_path, 2, [Fetched("u", "three", png(3))])
    with tarfile.open(tmp_path / "00001.tar") as tar:
        assert tar.getnames() == []
    opened = stream(tmp_path, 3)
    assert sorted(take(opened, 0, 1)[0].keys) == ["000000000", "000000001", "000020000"]
