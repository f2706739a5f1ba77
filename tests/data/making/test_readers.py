"""Every layout becomes the pairs that the standard library reads out of it."""

from __future__ import annotations

import csv
import gzip
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from clipkit.cli.app import main
from clipkit.data.making import Making, Reading, make_evaluation_set, make_shards, open_collection
from clipkit.data.making.tables import ParquetImages
from clipkit.evaluation.collections import READERS
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.data.making.makers import (
    CAPTIONS,
    bytes_of,
    picture,
    rejects,
    samples,
    table,
    write_csv,
    write_images,
    write_zip,
)


def made(path: Path, out: Path, kind: str | None = None, **reading: Any) -> dict[str, dict[str, bytes]]:
    collection = open_collection(path, Reading(**reading), kind, None, READERS)
    make_shards(collection, out)
    return samples(out)


def texts(found: dict[str, dict[str, bytes]]) -> list[str]:
    return [members["txt"].decode() for members in found.values()]


def test_captions_of_every_script_arrive_with_single_blanks(tmp_path: Path) -> None:
    path = table(tmp_path)
    found = made(path, tmp_path / "out")
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert texts(found) == [" ".join(row["caption"].split()) for row in rows]
    assert [members["jpg"] for members in found.values()] == [
        (tmp_path / row["filepath"]).read_bytes() for row in rows
    ]
    assert list(found) == [f"{row:09d}" for row in range(len(rows))]


def test_packed_tables_and_other_names_of_columns_change_nothing(tmp_path: Path) -> None:
    path = table(tmp_path)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [[row["caption"], row["filepath"]] for row in csv.DictReader(stream)]
    plain = write_csv(tmp_path / "t.tsv", ["title", "image"], rows, "\t")
    packed = tmp_path / "packed.tsv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    # As spreadsheets save it: a byte-order mark, which must not become part of the first column's name.
    marked = tmp_path / "marked.csv"
    marked.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    expected = made(path, tmp_path / "a")
    for number, other in enumerate((plain, packed, marked)):
        assert made(other, tmp_path / str(number)) == expected, other.name


def test_parquet_keeps_numbers_and_reads_images_inside(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="install clipkit[data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = write_images(tmp_path, [f"{n}.jpg" for n in range(7)])
    columns = {
        "filepath": list(contents),
        "picture": [{"bytes": content, "path": None} for content in contents.values()],
        "caption": [["one", "two"], ["three"], ["four"], [], ["five"], None, ["six", " "]],
        "score": [0.5, float("nan"), 2.0, 0.0, -1.5, 3.25, 4.0],
        "count": list(range(7)),
    }
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    for number, image in enumerate(("filepath", "picture")):
        reading = Reading(image_key=image, keep=("score", "count"))
        out = tmp_path / str(number)
        collection = open_collection(path, reading)
        make_shards(collection, out, Making(max_reject_fraction=1.0))
        found = samples(out)
        assert rejects(out) == [(4, "empty caption"), (6, "empty caption")]
        assert texts(found) == ["one", "three", "four", "five", "six"]
        assert [members["jpg"] for members in found.values()] == [picture(n) for n in (0, 1, 2, 4, 6)]
        documents = [json.loads(members["json"]) for members in found.values()]
        assert [(entry["score"], entry["count"]) for entry in documents] == [
            (0.5, 0), (None, 1), (2.0, 2), (-1.5, 4), (4.0, 6)
        ]  # fmt: skip
        assert documents[0]["captions"] == ["one", "two"]


def test_same_stem_pairs_nested_with_upper_case_extensions(tmp_path: Path) -> None:
    names = ["b/x.JPG", "a.v1.jpeg", "-dash.jpg", "deep/er/ö\n.jpg"]
    contents = write_images(tmp_path / "in", names)
    for number, name in enumerate(names):
        suffix = ".TXT" if number % 2 else ".txt"
        (tmp_path / "in" / name).with_suffix(suffix).write_text(f"{CAPTIONS[number]}\n\nsecond {number}\n")
    (tmp_path / "in" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / "in" / "notes.md").write_text("not data")
    found = made(tmp_path / "in", tmp_path / "out", keep=("path",))
    read = {json.loads(members["json"])["path"]: members for members in found.values()}
    assert sorted(read) == sorted(names)
    for number, name in enumerate(names):
        assert read[name]["jpg"] == contents[name]
        assert json.loads(read[name]["json"])["captions"] == [CAPTIONS[number], f"second {number}"]


def test_images_without_a_text_and_two_of_one_stem_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.jpg", "b.jpg", "b.jpeg", "c.jpg", "d.jpg", "e.jpg"])
    for name, content in (("a", b"fine"), ("b", b"which?"), ("d", b"\xff\xfe"), ("e", b" \n ")):
        (tmp_path / "in" / f"{name}.txt").write_bytes(content)
    collection = open_collection(tmp_path / "in")
    make_shards(collection, tmp_path / "out", Making(max_reject_fraction=1.0))
    assert rejects(tmp_path / "out") == [
        (2, "several images of one stem"), (3, "no caption file"), (4, "caption is not UTF-8"),
        (5, "empty caption"),
    ]  # fmt: skip
    assert texts(samples(tmp_path / "out")) == ["fine"]


def test_hidden_files_of_a_folder_of_pairs_are_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", "._a.jpg", "below/.b.png", ".trash/c.jpg", ".clipkit-cache/d.jpg", ".settings"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(0))
    (tmp_path / "a.txt").write_text("one")
    collection = open_collection(tmp_path)
    assert len(collection) == 1
    assert dict(collection.found.passed_over) == {"hidden images": 2, "hidden folders": 1}
    assert collection.found.describe_passed_over() == "passed over: 1 hidden folders, 2 hidden images"


def coco(folder: Path) -> Path:
    (folder / "annotations").mkdir(parents=True)
    write_images(folder / "train2017", [f"{n:012d}.jpg" for n in range(5)])
    images = [{"id": 40 + n, "file_name": f"{n:012d}.jpg", "width": 12, "license": n} for n in range(5)]
    notes = [{"id": n, "image_id": 40 + n % 5, "caption": f"caption {n}"} for n in range(12)]
    path = folder / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    return path


def test_coco_images_get_all_their_captions(tmp_path: Path) -> None:
    found = made(coco(tmp_path), tmp_path / "out", keep=("license", "file_name"))
    for number, members in enumerate(found.values()):
        assert json.loads(members["json"]) == {
            "captions": [f"caption {n}" for n in range(12) if n % 5 == number],
            "license": number,
            "file_name": f"{number:012d}.jpg",
        }
        assert members["jpg"] == picture(number)


def test_karpathy_files_need_a_split_and_keep_to_it(tmp_path: Path) -> None:
    names = [f"val2014/COCO_{n}.jpg" for n in range(6)]
    write_images(tmp_path / "images", names)
    images = [
        {
            "filepath": "val2014", "filename": f"COCO_{n}.jpg", "cocoid": n,
            "split": ("train", "restval", "test")[n % 3], "sentences": [{"raw": f"{n} a"}, {"raw": f"{n} b"}],
        }
        for n in range(6)
    ]  # fmt: skip
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    with pytest.raises(ConfigError, match="splits train, restval, test"):
        open_collection(path)
    with pytest.raises(ConfigError, match="no split 'val'"):
        open_collection(path, Reading(splits=("val",)))
    found = made(path, tmp_path / "out", splits=("train", "restval"))
    assert texts(found) == ["0 a", "1 a", "3 a", "4 a"]
    collection = open_collection(path, Reading(usual_split="test"))
    make_evaluation_set(collection, tmp_path / "eval")
    assert texts(samples(tmp_path / "eval" / "test")) == ["2 a\n2 b", "5 a\n5 b"]


@pytest.mark.parametrize("style", ["token", "bars", "commas"])
def test_caption_files_of_flickr(tmp_path: Path, style: str) -> None:
    names = [f"10{n}_x.jpg" for n in range(3)]
    write_images(tmp_path / "Images", names)
    captions = [(name, number, f'{name[:3]}, the "{number}" . ') for number in range(2) for name in names]
    lines = {
        "token": [f"{name}#{number}\t{caption}" for name, number, caption in captions],
        "bars": ["image_name| comment_number| comment"]
        + [f"{name}| {number}| {caption}" for name, number, caption in captions],
        "commas": ["image,caption"] + [f"{name},{caption}" for name, _, caption in captions],
    }[style]
    path = tmp_path / {"token": "Flickr8k.token.txt", "bars": "results.csv", "commas": "captions.txt"}[style]
    path.write_text("\n".join(lines) + "\n")
    found = made(path, tmp_path / "out")
    assert [json.loads(members["json"])["captions"] for members in found.values()] == [
        [f'{name[:3]}, the "{number}" .' for number in range(2)] for name in names
    ]


def test_classes_become_labels_or_captions_by_template(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["ant_lion/1.jpg", "ant_lion/2.JPG", "zebra/x/1.jpg"])
    found = made(
        tmp_path / "in", tmp_path / "train", keep=("class_name", "label"), templates=("a {c}", "{}s")
    )
    assert [json.loads(members["json"]) for members in found.values()] == [
        {"captions": [f"a {name}", f"{name}s"], "class_name": name, "label": label}
        for name, label in (("ant lion", 0), ("ant lion", 0), ("zebra", 1))
    ]
    collection = open_collection(tmp_path / "in", Reading(labels_first=True), None, None, READERS)
    make_evaluation_set(collection, tmp_path / "eval", templates=("the {c}",))
    assert [members["cls"] for members in samples(tmp_path / "eval" / "test").values()] == [b"0", b"0", b"1"]
    assert (tmp_path / "eval" / "classnames.txt").read_text() == "ant lion\nzebra\n"


def idx(values: bytes, *shape: int) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values


def test_idx_files_find_their_labels_by_name(tmp_path: Path) -> None:
    import io

    from PIL import Image

    for prefix, count in (("train-", 5), ("t10k-", 3)):
        pixels = bytes(range(count * 6))
        (tmp_path / f"{prefix}images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels, count, 2, 3)))
        (tmp_path / f"{prefix}labels-idx1-ubyte").write_bytes(idx(bytes(n % 2 for n in range(count)), count))
    (tmp_path / "classnames.txt").write_text("even\nodd\n")
    with pytest.raises(ConfigError, match="splits t"):
        made(tmp_path, tmp_path / "none")
    found = made(tmp_path, tmp_path / "out", splits=("train",))
    assert texts(found) == [f"a photo of a {'odd' if n % 2 else 'even'}" for n in range(5)]
    for number, members in enumerate(found.values()):
        image = Image.open(io.BytesIO(members["png"]))
        assert image.tobytes() == bytes(range(6 * number, 6 * number + 6))
    assert len(made(tmp_path / "t10k-images-idx3-ubyte.gz", tmp_path / "test", splits=("test",))) == 3


def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="install clipkit[hf]")
    contents = [picture(n) for n in range(4)]
    columns = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "text": [["one", "uno"], ["two"], ["three"], ["four"]],
        "label": [0, 1, 1, 0],
        "score": [0.25, 1.0, 2.0, 3.0],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Sequence(datasets.Value("string")),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "score": datasets.Value("float32"),
        }
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "set"))
    found = made(tmp_path / "set", tmp_path / "out", keep=("score",))
    assert [members["jpg"] for members in found.values()] == contents
    assert texts(found) == ["one", "two", "three", "four"]
    assert json.loads(found["000000000"]["json"]) == {"captions": ["one", "uno"], "score": 0.25}
    collection = open_collection(tmp_path / "set", Reading(labels_first=True))
    make_evaluation_set(collection, tmp_path / "eval")
    assert [m["cls"] for m in samples(tmp_path / "eval" / "test").values()] == [b"0", b"1", b"1", b"0"]
    assert (tmp_path / "eval" / "classnames.txt").read_text() == "cat\ndog\n"


def test_rows_of_one_image_wherever_they_stand_become_one_sample(tmp_path: Path) -> None:
    names = [f"{n}.jpg" for n in range(70)]
    contents = write_images(tmp_path, names)
    order = [names[(n * 37) % 70] for n in range(70)] + [names[(n * 11) % 70] for n in range(140)]
    path = write_csv(
        tmp_path / "pairs.csv", ["image", "caption"], [[name, f"c{n}"] for n, name in enumerate(order)]
    )
    expected: dict[str, list[str]] = {}
    for number, name in enumerate(order):
        expected.setdefault(name, []).append(f"c{number}")
    found = made(path, tmp_path / "out", group=True)
    assert [json.loads(members["json"])["captions"] for members in found.values()] == list(expected.values())
    assert [members["jpg"] for members in found.values()] == [contents[name] for name in expected]
    assert list(found) == [f"{order.index(name):09d}" for name in expected]


def test_several_caption_columns_the_first_one_first(tmp_path: Path) -> None:
    write_images(tmp_path, ["0.jpg", "1.jpg"])
    rows = [["0.jpg", "long one", "short"], ["1.jpg", "", "only"]]
    path = write_csv(tmp_path / "t.csv", ["filepath", "alt", "title"], rows)
    found = made(path, tmp_path / "out", captions=("title", "alt"))
    assert json.loads(found["000000000"]["json"])["captions"] == ["short", "long one"]
    assert (found["000000001"]["jpg"], found["000000001"]["txt"]) == (picture(1), b"only")
    # Each is a field, too: only so can one of them be chosen later.
    assert json.loads(found["000000000"]["json"])["alt"] == "long one"
    used = open_collection(path, Reading(captions=("title",))).found.used
    assert used == "images in column filepath, captions in title, as fields alt"
    assert made(path, tmp_path / "none", captions=("title", "alt"), keep=())["000000001"] == {
        "jpg": picture(1), "txt": b"only"
    }  # fmt: skip


def test_a_zip_beside_the_table_gives_the_bytes_of_the_folder(tmp_path: Path) -> None:
    path = table(tmp_path)
    expected = bytes_of(tmp_path / "out") if made(path, tmp_path / "out") else {}
    contents = {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "photos").iterdir()}
    (tmp_path / "zipped").mkdir()
    write_zip(tmp_path / "zipped" / "images.zip", contents)
    (tmp_path / "zipped" / "pairs.csv").write_bytes(path.read_bytes())
    made(tmp_path / "zipped", tmp_path / "out2")
    found = bytes_of(tmp_path / "out2")
    assert {name: found[name] for name in found if name.endswith(".tar")} == {
        name: expected[name] for name in expected if name.endswith(".tar")
    }


@pytest.mark.parametrize(
    ("name", "content", "error", "cause"),
    [
        ("a.json", b'{"images": [{"id": 1', DataError, "not a whole JSON"),
        ("a.json", b"[1, 2]", DataError, "not a JSON object"),
        ("a.json", b'{"images": []}', DataError, "no list of images"),
        ("a.json", b'{"images": [{"id": 1}], "annotations": [{"bbox": []}]}', DataError, "no captions"),
        ("a.json", b"\xff\xfe{}", DataError, "not a whole JSON"),
        ("a.json", b"[" * 100_000, DataError, "not a whole JSON"),
        ("a.csv", b"", DataError, r"empty \(0 bytes\)"),
        ("a.csv", b"\nfilepath,caption\n", DataError, "its first line is empty"),
        ("a.csv", b"filepath,caption\n", DataError, "no rows below the names of its columns"),
        ("a.csv", b"filepath,caption\n\n\n", DataError, "no rows below the names of its columns"),
        ("a.csv", "filepath,caption\nä.jpg,x".encode("utf-16"), DataError, "UTF-8"),
        ("a.csv", b"name,words\n1,2\n", DataError, "no column of images is known"),
        ("a.csv", b"filepath,words\n1,2\n", DataError, "no column of captions is known"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00broken", DataError, "cannot be read"),
        ("a.parquet", b"PAR1 no", DataError, "cannot be read"),
        ("a.xlsx", b"PK", ConfigError, "no known layout"),
        ("images-idx3-ubyte", b"\0\0\x08\x03", DataError, "needs both"),
    ],
)
def test_files_that_are_not_what_they_seem(
    tmp_path: Path, name: str, content: bytes, error: type[ClipkitError], cause: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=cause):
        made(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sign", [";", "\t"])
def test_tables_with_another_sign_between_columns_say_so(tmp_path: Path, sign: str) -> None:
    path = write_csv(tmp_path / "t.csv", ["filepath", "caption"], [["a.jpg", "x"]], sign)
    with pytest.raises(DataError) as refused:
        open_collection(path)
    assert "commas" in refused.value.cure


@pytest.mark.parametrize("layout", ["table", "pairs"])
def test_a_split_is_refused_where_there_are_none(tmp_path: Path, layout: str) -> None:
    path = table(tmp_path, 2)
    if layout == "pairs":
        path.unlink()
        for image in list(tmp_path.rglob("*.jpg")):
            image.with_suffix(".txt").write_text("a caption")
        path = tmp_path
    assert open_collection(path).kind in ("csv", "pairs")
    with pytest.raises(ConfigError, match="has no splits"):
        open_collection(path, Reading(splits=("train",)))


def test_folders_and_names_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, kind in ((tmp_path / "none", None), (tmp_path / "empty", None), (tmp_path / "none", "pairs")):
        with pytest.raises(ConfigError):
            made(path, tmp_path / "out", kind)
    with pytest.raises(ConfigError, match="no layout is called"):
        made(tmp_path / "empty", tmp_path / "out", "folder")
    with pytest.raises(DataError, match="no rows"):
        made(tmp_path / "empty", tmp_path / "out", "pairs")


def test_pictures_in_a_large_row_group_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    size, number = 100_000, 300
    cells = [random.Random(row).randbytes(size) for row in range(number)]
    table = tmp_path / "t.parquet"
    options = {"row_group_size": number - 50, "write_batch_size": 8, "data_page_size": 1}
    parquet.write_table(arrow.table({"image": cells}), table, compression="none", **options)
    images = ParquetImages(table, "image")
    before = arrow.total_allocated_bytes()
    peak = 0
    # Forwards, backwards within a group, and into the other one.
    for row in (*range(0, number, 3), 10, 299, 251, 40):
        assert images.read(str(row)) == cells[row]
        peak = max(peak, arrow.total_allocated_bytes() - before)
    assert peak < number * size / 4
    with pytest.raises(ValueError, match="row 300 of 300"):
        images.read("300")


def test_shards_are_not_written_among_the_pairs_that_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "pairs", ["a.jpg"])
    (tmp_path / "pairs" / "a.txt").write_text("a")
    assert main(["data", "make-shards", str(tmp_path / "pairs"), "--out", str(tmp_path / "pairs" / "")]) == 2
    assert "is the folder that is read" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["a.jpg", "a.txt"]
