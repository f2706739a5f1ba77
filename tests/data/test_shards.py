"""Writers: same samples, same bytes, and files that tarfile, webdataset and the strict index read alike."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from clipkit.data.shard_folder import refuse_foreign
from clipkit.data.shards import (
    EvaluationItem,
    Sample,
    image_extension,
    normalize_caption,
    write_evaluation_set,
    write_train_parts,
    write_train_shards,
)
from clipkit.types import ConfigError, DataError


def png(shade: int, name: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, 0, 0)).save(stream, name)
    return stream.getvalue()


def sample(number: int) -> Sample:
    return Sample(f"k{number:03d}", png(number), "png", (f"caption {number}", "another"), {"n": number})


def part(start: int, stop: int) -> Iterator[Sample]:
    return map(sample, range(start, stop))


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(entry.name, archive.extractfile(entry).read()) for entry in archive]  # type: ignore[union-attr]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_shards_hold_the_samples_in_order(tmp_path: Path) -> None:
    records = write_train_shards(map(sample, range(7)), tmp_path, samples_per_shard=3)
    assert [(record.name, record.samples) for record in records] == [
        ("00000.tar", 3), ("00001.tar", 3), ("00002.tar", 1)
    ]  # fmt: skip
    assert json.loads((tmp_path / "sizes.json").read_text()) == {
        "00000.tar": 3,
        "00001.tar": 3,
        "00002.tar": 1,
    }
    everything = [entry for record in records for entry in members(tmp_path / record.name)]
    assert [name for name, _ in everything] == [
        f"k{n:03d}.{e}" for n in range(7) for e in ("json", "png", "txt")
    ]
    assert everything[1][1] == png(0)
    assert everything[2][1] == b"caption 0"
    assert json.loads(everything[0][1]) == {"captions": ["caption 0", "another"], "n": 0}


def test_manifest_describes_the_bytes_on_disk(tmp_path: Path) -> None:
    write_train_shards(map(sample, range(5)), tmp_path, samples_per_shard=4)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["samples"] == 5
    for entry in manifest["shards"]:
        content = (tmp_path / entry["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])


def test_bytes_do_not_depend_on_run_or_workers(tmp_path: Path) -> None:
    parts = [functools.partial(part, start, start + 2) for start in (0, 2, 4)]
    write_train_shards(map(sample, range(6)), tmp_path / "a", samples_per_shard=2)
    write_train_parts(parts, tmp_path / "b", workers=1)
    write_train_parts(parts, tmp_path / "c", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_shards_are_those_of_webdataset_and_it_reads_them(tmp_path: Path) -> None:
    import webdataset
    from webdataset import tariterators

    write_train_shards(map(sample, range(5)), tmp_path)
    with (tmp_path / "own.tar").open("wb") as stream:
        writer = webdataset.TarWriter(
            stream, encoder=False, mtime=946_684_800, user="clipkit", group="clipkit", mode=0o644
        )
        for number in range(5):
            made = sample(number)
            document = json.dumps({"captions": list(made.captions), "n": number}).encode()
            writer.write(
                {"__key__": made.key, "png": made.image, "txt": made.captions[0].encode(), "json": document}
            )
        writer.close()
    assert (tmp_path / "own.tar").read_bytes() == (tmp_path / "00000.tar").read_bytes()
    # Not WebDataset(path): it leaves the file open, and an unclosed file is an error in these tests.
    with (tmp_path / "00000.tar").open("rb") as stream:
        opened = [{"url": "00000.tar", "stream": stream}]
        read = list(tariterators.group_by_keys(tariterators.tar_file_expander(opened)))
    assert [(entry["__key__"], entry["txt"]) for entry in read] == [
        (f"k{n:03d}", f"caption {n}".encode()) for n in range(5)
    ]


def test_strict_index_counts_the_samples(tmp_path: Path) -> None:
    from clipkit.data.indexing import build_index
    from clipkit.data.source import expand_shards

    write_train_shards(map(sample, range(130)), tmp_path, samples_per_shard=100)
    assert build_index(expand_shards(str(tmp_path))).num_samples == 130


def test_a_failing_sample_leaves_no_shard_of_that_name(tmp_path: Path) -> None:
    broken = [sample(0), Sample("k001", png(1), "png", ("  ",))]
    with pytest.raises(DataError, match="empty caption"):
        write_train_shards(broken, tmp_path)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("key", ["", "a.b", "/a", "x" * 81, "é" * 41])
def test_keys_that_readers_would_misread_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="key"):
        write_train_shards([Sample(key, png(0), "png", ("a",))], tmp_path)


def test_repeated_key_and_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        write_train_shards([sample(1), sample(1)], tmp_path)
    with pytest.raises(DataError, match="no samples"):
        write_train_shards([], tmp_path)


def test_writing_again_leaves_nothing_of_the_earlier_run(tmp_path: Path) -> None:
    write_train_shards(map(sample, range(6)), tmp_path, samples_per_shard=2)
    (tmp_path / "mine.tar").write_bytes(b"another file")
    write_train_shards(map(sample, range(3)), tmp_path, samples_per_shard=2)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar", "mine.tar"]


def test_classification_set_is_the_benchmark_layout(tmp_path: Path) -> None:
    items = [EvaluationItem(png(n), "JPEG" if n == 1 else "png", label=n % 2) for n in range(5)]
    write_evaluation_set(items, tmp_path, classnames=["cat", "dog"], templates=["a {c}"], max_samples=2)
    assert (tmp_path / "classnames.txt").read_text() == "cat\ndog\n"
    assert (tmp_path / "zeroshot_classification_templates.txt").read_text() == "a {c}\n"
    assert (tmp_path / "test" / "nshards.txt").read_text() == "3\n"
    found = [entry for number in range(3) for entry in members(tmp_path / "test" / f"{number}.tar")]
    assert [name for name, _ in found][:4] == ["s0000000.cls", "s0000000.png", "s0000001.cls", "s0000001.jpg"]
    assert [content for name, content in found if name.endswith("cls")] == [b"0", b"1", b"0", b"1", b"0"]


def test_retrieval_captions_survive_splitlines(tmp_path: Path) -> None:
    captions = ("one\nline", "two\x85\u2028parts ", "three")
    write_evaluation_set([EvaluationItem(png(0), "png", captions=captions)], tmp_path)
    assert (tmp_path / "dataset_type.txt").read_text() == "retrieval\n"
    text = dict(members(tmp_path / "test" / "0.tar"))["s0000000.txt"].decode()
    assert text.splitlines() == ["one line", "two parts", "three"]


def test_evaluation_shards_end_at_the_byte_limit(tmp_path: Path) -> None:
    items = [EvaluationItem(b"\xff\xd8\xff" + bytes(600), "jpg", label=0) for _ in range(4)]
    records = write_evaluation_set(items, tmp_path, classnames=["x"], max_bytes=1000)
    assert [record.samples for record in records] == [2, 2]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (EvaluationItem(b"", "png", label=2), "outside 0..1"),
        (EvaluationItem(b"", "png"), "outside 0..1"),
        (EvaluationItem(b"", "gif", label=0), "extension"),
    ],
)
def test_evaluation_items_that_do_not_fit_are_refused(
    tmp_path: Path, item: EvaluationItem, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_evaluation_set([item], tmp_path, classnames=["a", "b"])


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_image_extension_reads_the_content(name: str) -> None:
    assert image_extension(png(0, name)) == {"JPEG": "jpg"}.get(name, name.lower())
    assert image_extension(b"<html>not found</html>") is None


def test_normalize_caption() -> None:
    assert normalize_caption(" a\t b\r\nc\x1c ") == "a b c"


def test_writers_load_no_torch() -> None:
    code = (
        "import sys, clipkit.data.glyphs, clipkit.data.tables\n"
        "from clipkit.data import shards\n"
        "shards._tar_writer()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", '{"name": "a web page", "icons": []}'), ("manifest.json", "["), ("sizes.json", "{}")],
)
def test_files_of_others_are_refused_and_stay(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        write_train_shards(map(sample, range(3)), tmp_path)
    assert contents(tmp_path) == {name: content.encode()}


def test_summaries_of_earlier_shards_are_replaced(tmp_path: Path) -> None:
    write_train_shards(map(sample, range(3)), tmp_path)
    (tmp_path / "00000.tar").unlink()
    refuse_foreign(tmp_path)  # sizes.json beside the manifest
    write_train_shards(map(sample, range(2)), tmp_path)
    (tmp_path / "manifest.json").unlink()
    refuse_foreign(tmp_path)  # sizes.json beside shards, as img2dataset's are kept
    assert write_train_shards(map(sample, range(3)), tmp_path)[0].samples == 3
