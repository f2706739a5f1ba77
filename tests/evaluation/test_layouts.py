"""Every DATA layout is read as written, and what is wrong with one is said with its place."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from clipkit.evaluation.datasets import open_classification, open_retrieval
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.evaluation.layouts import (
    benchmark_shards,
    captioned_csv,
    image_bytes,
    labelled_csv,
    write_csv,
    write_tar,
    write_zip,
)

NAMES = ("ant", "bee", "cat")
TEMPLATES = "a photo of a {c}.\nthe {c}\n"


def refused(data: Path, kind: type[ClipkitError], *words: str, retrieval: bool = False) -> None:
    """Asserts that `data` raises `kind`: one line of cause that contains the words, one line of cure."""
    with pytest.raises(kind) as caught:
        (open_retrieval if retrieval else open_classification)(data).images.load(0)
    assert caught.value.exit_code == kind.exit_code
    assert all(word in caught.value.cause for word in words), caught.value.cause
    assert caught.value.cure
    assert "\n" not in caught.value.cause + caught.value.cure


# --- tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("as_file", [True, False])
def test_labels_csv(tmp_path: Path, zipped: bool, as_file: bool) -> None:
    root = labelled_csv(tmp_path / "set", 7, NAMES, zipped)
    dataset = open_classification(root / "labels.csv" if as_file else root)
    assert (dataset.name, dataset.kind, dataset.names) == ("set", "csv", NAMES)
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert dataset.images.load(3).size == (11, 9)
    copy = pickle.loads(pickle.dumps(dataset.images))
    assert list(copy.load(3).tobytes()) == list(dataset.images.load(3).tobytes())


def test_captions_csv_keeps_first_appearance_and_ragged_captions(tmp_path: Path) -> None:
    root = captioned_csv(tmp_path / "set", [["a", "b"], ["c"], ["d", "e", "f"]])
    rows = [
        ("images/2.png", "d"),
        ("images/0.png", "a"),
        ("images/2.png", 'e, "quoted"'),
        ("images/1.png", " "),
    ]
    table = write_csv(root / "more.csv", "filepath,caption", rows)
    dataset = open_retrieval(table)
    assert dataset.captions == ("d", 'e, "quoted"', "a")
    assert dataset.owners.tolist() == [0, 0, 1]
    assert len(dataset.images) == 3
    assert dataset.empty_captions == 1
    assert dataset.name == "set/more"


def test_zip_entries_without_the_images_folder(tmp_path: Path) -> None:
    write_csv(tmp_path / "captions.csv", "filepath,caption", [("images/x.png", "a")])
    write_zip(tmp_path / "images.zip", {"x.png": image_bytes(0)})
    assert open_retrieval(tmp_path).images.load(0).size == (11, 9)


def test_a_byte_order_mark_and_names_in_the_label_column(tmp_path: Path) -> None:
    root = labelled_csv(tmp_path / "set", 3, NAMES)
    (root / "labels.csv").write_text(
        "\ufefffilepath,label\nimages/0.png,cat\nimages/1.png,1\n", encoding="utf-8"
    )
    assert open_classification(root).labels.tolist() == [2, 1]


def test_class_name_column_replaces_a_missing_file(tmp_path: Path) -> None:
    root = labelled_csv(tmp_path / "set", 7, NAMES)
    (root / "classnames.txt").unlink()
    assert open_classification(root).names == NAMES
    write_csv(root / "labels.csv", "filepath,label", [("images/0.png", 0)])
    dataset = open_classification(root)
    assert dataset.names is None
    assert dataset.classnames(["ant"]) == ("ant",)
    with pytest.raises(ConfigError, match="no class names"):
        dataset.classnames()


def test_tables_that_contradict_themselves(tmp_path: Path) -> None:
    root = labelled_csv(tmp_path / "set", 3, NAMES)
    (root / "classnames.txt").write_text("ant\ncat\nbee\n")
    refused(root, DataError, "classnames.txt", "class 1", "'cat'", "row 3", "'bee'")
    (root / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match=r"2\.png: label 2, but .* has 2 names"):
        open_classification(root).classnames()
    (root / "classnames.txt").write_text("ant\n\nbee\n")
    refused(root, ConfigError, "entry 2")
    (root / "classnames.txt").unlink()
    write_csv(
        root / "labels.csv", "filepath,label,class_name", [("images/0.png", 0, "a"), ("images/1.png", 0, "b")]
    )
    refused(root, DataError, "row 3", "'b'")
    write_csv(root / "labels.csv", "filepath,label,class_name", [("images/0.png", 1, "a")])
    refused(root, DataError, "no row has label 0")
    write_csv(root / "labels.csv", "filepath,label", [("images/0.png", "zebra")])
    refused(root, DataError, "row 2", "'zebra'")
    write_csv(root / "labels.csv", "filepath,label", [("images/0.png", -1)])
    refused(root, DataError, "row 2", "'-1'")


def test_tables_with_broken_columns_or_images(tmp_path: Path) -> None:
    root = labelled_csv(tmp_path / "set", 3, NAMES)
    (root / "labels.csv").write_text("file,label\na,0\n")
    refused(root, DataError, "'filepath'", "found: file, label")
    (root / "labels.csv").write_text("filepath,label\nimages/0.png\n")
    refused(root, DataError, "line 2")
    (root / "labels.csv").write_text("filepath,label\nimages/0.png,0,1\n")
    refused(root, DataError, "line 2")
    (root / "labels.csv").write_text("filepath,label\n")
    refused(root, DataError, "no rows")
    (root / "labels.csv").write_text("filepath,label\nimages/77.png,0\n")
    refused(root, DataError, "images/77.png", "images.zip")
    (root / "labels.csv").write_bytes(b"filepath,label\n\xff,0\n")
    refused(root, DataError, "labels.csv")
    (root / "labels.csv").write_text("filepath,label\nimages/0.png,0\n")
    (root / "images.zip").write_bytes(b"no zip")
    refused(root, DataError, "images.zip")
    (root / "images.zip").unlink()
    refused(root, DataError, "1 of 1 images", "images/0.png")


def test_a_damaged_zip_entry_is_named(tmp_path: Path) -> None:
    root = labelled_csv(tmp_path / "set", 2, NAMES)
    content = bytearray((root / "images.zip").read_bytes())
    content[120] ^= 255  # within the first entry, stored uncompressed: its checksum no longer fits
    (root / "images.zip").write_bytes(bytes(content))
    refused(root, DataError, "images.zip:images/0.png")


# --- CLIP_benchmark shards -------------------------------------------------------------------------------


def labelled_shards(root: Path, count: int = 7) -> Path:
    """Writes `count` samples, three a shard."""
    samples = [{"webp": image_bytes(i, "WEBP"), "cls": str(i % 3).encode()} for i in range(count)]
    return benchmark_shards(root, samples, 3, classnames="ant\nbee\ncat\n", templates=TEMPLATES)


def test_benchmark_classification(tmp_path: Path) -> None:
    root = labelled_shards(tmp_path / "set")
    for data in (root, root / "test"):
        dataset = open_classification(data)
        assert (dataset.name, dataset.kind, dataset.split) == ("set", "webdataset", "test")
        assert dataset.names == NAMES
        assert dataset.templates == tuple(TEMPLATES.split("\n")[:2])
        assert dataset.labels.tolist() == [i % 3 for i in range(7)]
        assert dataset.images.name(6).endswith("test/2.tar:s0000006.webp")
        assert dataset.images.load(6).size == (11, 9)


def test_benchmark_captions_split_at_line_feeds_only(tmp_path: Path) -> None:
    texts = ["one\ntwo", "a\u2028b\x85c\x0bd", "", "last\n", "x\r\ny"]
    samples = [{"png": image_bytes(i), "txt": text.encode()} for i, text in enumerate(texts)]
    dataset = open_retrieval(benchmark_shards(tmp_path / "set", samples, 2, dataset_type="Retrieval\n"))
    assert dataset.captions == ("one", "two", "a\u2028b\x85c\x0bd", "last", "x", "y")
    assert dataset.owners.tolist() == [0, 0, 1, 3, 4, 4]
    assert dataset.empty_captions == 0
    assert len(dataset.images) == 5


def test_byte_order_marks_are_no_content(tmp_path: Path) -> None:
    mark = "\ufeff"
    samples = [{"png": image_bytes(0), "txt": f"{mark}a red kite\nred".encode(), "cls": f"{mark}0".encode()}]
    root = benchmark_shards(tmp_path / "set", samples, 1, classnames="ant\n")
    (root / "test/nshards.txt").write_text(f"{mark}1\n", encoding="utf-8")
    assert open_classification(root).labels.tolist() == [0]
    (root / "dataset_type.txt").write_text(f"{mark}retrieval\n", encoding="utf-8")
    assert open_retrieval(root).captions == ("a red kite", "red")


def test_image_members_are_chosen_in_the_order_of_clip_benchmark(tmp_path: Path) -> None:
    sample = {extension: image_bytes(0, "PNG") for extension in ("jpeg", "jpg", "png", "webp")} | {
        "cls": b"0"
    }
    for chosen in ("webp", "png", "jpg", "jpeg"):
        dataset = open_classification(benchmark_shards(tmp_path / chosen, [sample], 1, classnames="ant\n"))
        assert dataset.images.name(0).endswith(f".{chosen}")
        del sample[chosen]


def test_members_need_not_stand_side_by_side(tmp_path: Path) -> None:
    root = labelled_shards(tmp_path / "set", 2)
    images = [(f"b/{i}.JPG", image_bytes(i, "JPEG")) for i in range(3)]
    write_tar(root / "test/0.tar", [*images, *((f"b/{i}.cls", str(i).encode()) for i in range(3))])
    assert open_classification(root).labels.tolist() == [0, 1, 2]


def test_other_splits_are_named(tmp_path: Path) -> None:
    samples = [{"png": image_bytes(0), "cls": b"0"}]
    root = benchmark_shards(tmp_path / "set", samples, 1, split="validation", classnames="ant\n")
    refused(root, ConfigError, "no split 'test'", "validation")
    assert open_classification(root, "validation").split == "validation"
    assert open_classification(root / "validation").split == "validation"


def test_wrong_task_names_the_right_command(tmp_path: Path) -> None:
    root = labelled_shards(tmp_path / "set")
    refused(root, ConfigError, "classification", retrieval=True)
    (root / "dataset_type.txt").write_text("multilabel\n")
    refused(root, ConfigError, "multi-label")
    (root / "dataset_type.txt").write_text("retrieval\n")
    refused(root, ConfigError, "retrieval")
    refused(labelled_csv(tmp_path / "l", 3, NAMES), ConfigError, "labels, not captions", retrieval=True)
    refused(captioned_csv(tmp_path / "c", [["a"]]), ConfigError, "captions, not labels")


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    root = labelled_shards(tmp_path / "set")
    shard, counter = root / "test/1.tar", root / "test/nshards.txt"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(root, DataError, "1.tar")
    second = whole.index(b"s0000004.")  # a header in the middle; lenient readers would end the shard here
    shard.write_bytes(whole[:second] + b"X" + whole[second + 1 :])
    refused(root, DataError, "1.tar", "checksum")
    shard.unlink()
    refused(root, DataError, "1.tar", "missing shard")
    shard.write_bytes(whole)
    counter.write_text("2\n")
    refused(root, DataError, "2.tar", "says 2")
    counter.write_text("many\n")
    refused(root, DataError, "nshards.txt")
    counter.unlink()
    refused(root, DataError, "nshards.txt: missing")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.png", b""), ("a.txt", b"x")], (" .cls",)),
        ([("a.cls", b"0")], ("no image member", "found: cls")),
        ([("a.v1.jpg", b""), ("a.cls", b"0")], ("no image member", "v1.jpg")),
        ([("a.png", b""), ("a.cls", b"zero")], ("no number",)),
        (
            [("a.png", b""), ("a.cls", b"0"), ("b.png", b""), ("b.cls", b"0"), ("a.png", b"")],
            ("'a' occurs twice",),
        ),
        ([("a.png", b""), ("a.cls", b"0")], ("0.tar:a.png", "empty image")),
        ([], ("no images",)),
    ],
)
def test_incomplete_samples_are_named(
    tmp_path: Path, members: list[tuple[str, bytes]], words: tuple[str, ...]
) -> None:
    root = labelled_shards(tmp_path / "set", 2)
    write_tar(root / "test/0.tar", members)
    refused(root, DataError, *words)


# --- folders ---------------------------------------------------------------------------------------------


def image_folder(root: Path, classes: dict[str, int]) -> Path:
    """Writes root/<class>/<number>.png."""
    for folder, count in classes.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            (root / folder / f"{number}.png").write_bytes(image_bytes(number))
    return root


def test_image_folder_in_sorted_order(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", {"b_c": 2, "a": 1, ".hidden": 1})
    (root / "b_c" / "deep").mkdir()
    (root / "b_c" / "deep" / "x.JPEG").write_bytes(image_bytes(9, "JPEG"))
    (root / "a" / "notes.md").write_text("no image")
    dataset = open_classification(root)
    assert dataset.names == ("a", "b c")
    assert dataset.folders == ("a", "b_c")
    assert not dataset.wordnet
    assert dataset.labels.tolist() == [0, 1, 1, 1]
    (root / "classnames.txt").write_text("a thing\nanother\n")
    assert open_classification(root).names == ("a thing", "another")


def test_image_folder_errors(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", {"b": 1, "a": 1})
    (root / "classnames.txt").write_text("b\na\n")
    refused(root, DataError, "order does not match", "'b'")
    (root / "classnames.txt").write_text("a\n")
    refused(root, DataError, "1 class names", "2 classes")
    (root / "classnames.txt").unlink()
    (root / "a" / "0.tiff").write_bytes(b"")
    refused(root, DataError, "0.tiff")
    (root / "a" / "0.tiff").unlink()
    (root / "a" / "0.png").unlink()
    refused(root, DataError, "without images")


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    image_folder(tmp_path / "elsewhere", {"more": 2})
    root = image_folder(tmp_path / "set", {"b": 1, "a": 1})
    (root / "a" / "x").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "b" / "up").symlink_to(root / "b")
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(root / "a")
    dataset = open_classification(root)
    found = [dataset.images.name(row) for row in range(len(dataset.images))]
    assert found == [str(root / name) for name in ("a/0.png", "a/x/0.png", "a/x/1.png", "b/0.png")]


def test_folders_named_like_splits_are_splits(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", {"train/a": 1, "train/b": 2, "val/a": 2, "val/b": 1})
    with pytest.raises(ConfigError, match=r"no split 'test' \(found: train, val\)") as caught:
        open_classification(root)
    assert "--split val" in caught.value.cure
    for split, labels in (("train", [0, 1, 1]), ("val", [0, 0, 1])):
        dataset = open_classification(root, split)
        assert (dataset.name, dataset.split, dataset.names) == ("set", split, ("a", "b"))
        assert dataset.labels.tolist() == labels
        assert open_classification(root / split).labels.tolist() == labels
    (root / "test").mkdir()
    refused(root, ConfigError, "test: not a layout")
    (root / "c").mkdir()
    refused(root, DataError, "without images")


def test_a_split_that_a_layout_lacks_is_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "folder" / "val", {"a": 1, "b": 1})
    table = labelled_csv(tmp_path / "labels", 3, NAMES)
    assert open_classification(folder, "val").labels.tolist() == [0, 1]
    for data in (folder, table, table / "labels.csv"):
        with pytest.raises(ConfigError, match="has no splits, and the split 'train' was asked for"):
            open_classification(data, "train")
    with pytest.raises(ConfigError, match="has no splits"):
        open_retrieval(captioned_csv(tmp_path / "captions", [["a"]]), "train")


def test_wordnet_folders_get_open_clips_names_and_templates(tmp_path: Path) -> None:
    # Sorted ids 0, 65, 999 of ImageNet, from its published list.
    root = image_folder(tmp_path / "set", {"n15075141": 1, "n01440764": 1, "n01751748": 1})
    dataset = open_classification(root)
    assert dataset.wordnet
    assert dataset.names == ("tench", "sea snake", "toilet paper")
    names = dataset.names
    assert dataset.classnames(["a tench", "sea serpent", "paper"]) == ("a tench", "sea serpent", "paper")
    with pytest.raises(DataError, match="order does not match"):
        dataset.classnames([names[1], names[0], names[2]])
    with pytest.raises(DataError, match="1000 class names"):
        dataset.classnames("imagenet")
    (root / "classnames.txt").write_text("tench\ntoilet paper\nsea snake\n")
    refused(root, DataError, "order does not match")


def test_unknown_wordnet_ids_need_names(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", {"n01440764": 1, "n99999999": 1})
    refused(root, DataError, "n99999999")
    (root / "classnames.json").write_text('{"n99999999": "thing", "n01440764": "fish"}')
    assert open_classification(root).names == ("fish", "thing")
    (root / "classnames.json").write_text('{"n99999999": "thing"}')
    refused(root, DataError, "n01440764")


def test_classnames_of_a_split_come_before_those_of_the_root(tmp_path: Path) -> None:
    for split in ("train", "test"):
        image_folder(tmp_path / "set" / split, {"a": 1, "b": 1})
    (tmp_path / "set/classnames.txt").write_text("ant\nbee\n")
    assert open_classification(tmp_path / "set").names == ("ant", "bee")
    (tmp_path / "set/test/classnames.txt").write_text("asp\nboa\n")
    assert open_classification(tmp_path / "set").names == ("asp", "boa")
    assert open_classification(tmp_path / "set", "train").names == ("ant", "bee")


def test_captioned_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", {"x": 3})
    refused(root, ConfigError, "not a layout", retrieval=True)
    (root / "x/0.txt").write_text("one\ntwo\n", encoding="utf-8")
    (root / "x/2.txt").write_text("three\n\n", encoding="utf-8")
    dataset = open_retrieval(root)
    assert dataset.captions == ("one", "two", "three")
    assert dataset.owners.tolist() == [0, 0, 2]
    assert len(dataset.images) == 3
    assert dataset.empty_captions == 1


def idx(pixels: np.ndarray) -> bytes:
    """Returns the gzipped idx file of an array."""
    header = bytes([0, 0, 8, pixels.ndim]) + struct.pack(f">{pixels.ndim}I", *pixels.shape)
    return gzip.compress(header + pixels.tobytes())


def test_idx_files(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    images, labels = tmp_path / "images-idx3-ubyte.gz", tmp_path / "labels-idx1-ubyte.gz"
    images.write_bytes(idx(pixels))
    refused(tmp_path, DataError, "labels-idx1-ubyte")
    labels.write_bytes(idx(np.array([1, 0], dtype=np.uint8)))
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    dataset = open_classification(tmp_path)
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.names == ("ant", "bee")
    assert np.array_equal(np.array(dataset.images.load(1))[..., 0], pixels[1])
    labels.write_bytes(idx(np.array([1], dtype=np.uint8)))
    refused(tmp_path, DataError, "2 images", "1 labels")
    images.write_bytes(idx(pixels)[:-9])
    refused(tmp_path, DataError, "images-idx3-ubyte.gz")
    images.write_bytes(gzip.compress(gzip.decompress(idx(pixels))[:-1]))
    refused(tmp_path, DataError, "promises shape")
    images.write_bytes(idx(pixels[0]))
    refused(tmp_path, DataError, "not an idx file")


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", ConfigError, "nowhere")
    refused(tmp_path, ConfigError, "not a layout")
    (tmp_path / "file.bin").write_bytes(b"")
    refused(tmp_path / "file.bin", ConfigError, "not a layout")
    refused(tmp_path / "file.bin", ConfigError, "not a layout", retrieval=True)


# --- real images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "images", "classes"),
    [
        ("zs_product_type", 1454, 30),
        ("zs_caltech101", 1500, 100),
        ("zs_clothing", 713, 10),
        ("zs_ucmerced", 420, 21),
        ("zs_fashion_mnist_part", 3614, 10),
    ],
)
def test_real_classification_sets(real_data: Path, folder: str, images: int, classes: int) -> None:
    dataset = open_classification(real_data / folder)
    assert (len(dataset.images), len(dataset.classnames())) == (images, classes)
    assert set(dataset.labels.tolist()) == set(range(classes))
    assert dataset.images.load(images - 1).mode == "RGB"


@pytest.mark.parametrize(
    ("folder", "images", "captions"), [("ret_products", 1000, 2000), ("ret_coco_free", 51, 255)]
)
def test_real_retrieval_sets(real_data: Path, folder: str, images: int, captions: int) -> None:
    dataset = open_retrieval(real_data / folder)
    assert (len(dataset.images), len(dataset.captions)) == (images, captions)
    assert np.bincount(dataset.owners).tolist() == [captions // images] * images
    assert dataset.images.load(images - 1).mode == "RGB"
