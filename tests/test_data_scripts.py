"""The programs in data_scripts: what they write, what they print, and their exit codes."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from clipkit.cli.app import main

SCRIPTS = Path(__file__).resolve().parent.parent / "data_scripts"


def script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


make_glyphs = script("make_glyphs")


def make_shards(arguments: list[str]) -> int:
    return main(["data", "make-shards", *arguments])


def jpeg(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def write_table(path: Path, header: list[str], rows: list[list[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """A table of seven rows with its images in a folder beside it."""
    (tmp_path / "images").mkdir()
    for number in range(7):
        (tmp_path / "images" / f"p.{number}.jpeg").write_bytes(jpeg(30 * number))
    rows = [[f"images/p.{number}.jpeg", f"thing {number}, red", str(number)] for number in range(7)]
    return write_table(tmp_path / "pairs.csv", ["filepath", "caption", "price"], rows)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]


def test_table_and_folder_become_training_shards(catalogue: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [str(catalogue), "--out", str(out), "--samples-per-shard", "3", "--keep", "price"]
    assert make_shards(arguments) == 0
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 3, "00002.tar": 1}
    last = members(out / "00002.tar")
    assert sorted(last) == ["000000006.jpg", "000000006.json", "000000006.txt"]
    assert last["000000006.jpg"] == (tmp_path / "images" / "p.6.jpeg").read_bytes()
    assert last["000000006.txt"] == b"thing 6, red"
    assert json.loads(last["000000006.json"])["price"] == "6"
    assert (out / "rejects.jsonl").read_text() == ""


def test_zip_tsv_and_other_columns_give_the_same_bytes(catalogue: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in sorted((tmp_path / "images").iterdir()):
            archive.write(path, f"images/{path.name}")
    rows = [[f"thing {number}, red", f"images/p.{number}.jpeg", str(number)] for number in range(7)]
    table = write_table(tmp_path / "t.tsv", ["title", "file", "price"], rows, "\t")
    arguments = ["--image-key", "file", "--caption-key", "title", "--images", str(tmp_path / "photos.zip")]
    for name, given in (("a", [str(catalogue)]), ("b", [str(table), *arguments]), ("c", [str(catalogue)])):
        workers = "2" if name == "c" else "1"
        options = ["--out", str(tmp_path / name), "--samples-per-shard", "4", "--workers", workers]
        assert make_shards([*given, *options]) == 0
    read = {name: [(tmp_path / name / f"0000{n}.tar").read_bytes() for n in range(2)] for name in "abc"}
    assert read["a"] == read["b"] == read["c"]


def test_unusable_rows_are_counted_and_named(catalogue: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "p.1.jpeg").unlink()
    (tmp_path / "images" / "p.2.jpeg").write_bytes(b"<html>404</html>")
    out = tmp_path / "out"
    assert make_shards([str(catalogue), "--out", str(out)]) == 3
    assert not out.exists()
    assert make_shards([str(catalogue), "--out", str(out), "--max-reject-fraction", "0.5"]) == 0
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in rejects] == [
        (2, "missing image"),
        (3, "not an image"),
    ]
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 5}


def test_dry_run_writes_nothing(catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_shards([str(catalogue), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert "7 usable" in capsys.readouterr().out


def test_existing_shards_are_replaced_only_on_demand(catalogue: Path, tmp_path: Path) -> None:
    arguments = [str(catalogue), "--out", str(tmp_path / "out")]
    assert make_shards(arguments) == 0
    assert make_shards([*arguments, "--samples-per-shard", "2"]) == 2
    assert make_shards([*arguments, "--samples-per-shard", "2", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("change", "code", "cause"),
    [
        (["--caption-key", "title"], 3, "no column 'title'"),
        (["--images", "nowhere"], 2, "neither a folder nor a zip"),
    ],
)
def test_errors_are_one_line_of_cause_and_one_of_cure(
    catalogue: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    code: int,
    cause: str,
) -> None:
    assert make_shards([str(catalogue), "--out", str(tmp_path / "out"), *change]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert cause in lines[0]
    assert lines[1].startswith("  cure: ")


def test_missing_or_ragged_table(tmp_path: Path) -> None:
    assert make_shards([str(tmp_path / "no.csv"), "--out", str(tmp_path / "o")]) == 2
    ragged = tmp_path / "ragged.csv"
    ragged.write_text("filepath,caption\na.jpg,one,two\n")
    assert make_shards([str(ragged), "--out", str(tmp_path / "o")]) == 3


def test_a_folder_stands_for_its_only_table(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_shards([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 7}
    assert make_shards([str(tmp_path / "images"), "--out", str(tmp_path / "o")]) == 2
    assert "a folder of images needs a table" in capsys.readouterr().err
    write_table(tmp_path / "more.tsv", ["filepath", "caption"], [["a", "b"]], "\t")
    assert make_shards([str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "2 tables (more.tsv, pairs.csv)" in capsys.readouterr().err


def test_usage_errors_leave_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        make_glyphs.main(["--nonsense"])
    assert caught.value.code == 2
    assert make_shards(["--nonsense"]) == 2


@pytest.mark.parametrize("name", ["make_shards", "make_glyphs"])
def test_help_shows_examples_and_loads_no_torch(name: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['{name}', '--help']\n"
        f"try: runpy.run_path({str(SCRIPTS / name) + '.py'!r}, run_name='__main__')\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert f"python data_scripts/{name}.py" in done.stdout


def test_labels_become_a_classification_set(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(60 * number))
    rows = [[f"{number}.jpg", str(number % 2)] for number in range(4)]
    write_table(tmp_path / "labels.csv", ["filepath", "label"], rows)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    out = tmp_path / "out"
    assert make_shards([str(tmp_path), "--to", "evaluation", "--out", str(out)]) == 0
    assert (out / "classnames.txt").read_text() == "cat\ndog\n"
    found = members(out / "test" / "0.tar")
    assert found["s0000003.cls"] == b"1"
    assert found["s0000003.jpg"] == jpeg(180)


def test_image_folder_becomes_a_classification_set(tmp_path: Path) -> None:
    for name in ("zebra", "ant"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.jpg").write_bytes(jpeg(len(name)))
    out = tmp_path / "out"
    templates = tmp_path / "templates.txt"
    templates.write_text("a {c}\nthe {c}\n")
    arguments = [
        str(tmp_path / "data"),
        "--to",
        "evaluation",
        "--out",
        str(out),
        "--templates",
        str(templates),
    ]
    assert make_shards(arguments) == 0
    assert (out / "classnames.txt").read_text() == "ant\nzebra\n"
    assert (out / "zeroshot_classification_templates.txt").read_text() == "a {c}\nthe {c}\n"
    assert members(out / "test" / "0.tar")["s0000000.jpg"] == jpeg(3)


def test_captions_become_a_retrieval_set(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    rows = [["1.jpg", "b one"], ["0.jpg", "a one"], ["1.jpg", "b two"]]
    write_table(tmp_path / "captions.csv", ["filepath", "caption"], rows)
    out = tmp_path / "out"
    assert make_shards([str(tmp_path / "captions.csv"), "--to", "evaluation", "--out", str(out)]) == 0
    found = members(out / "test" / "0.tar")
    assert found["s0000000.txt"] == b"b one\nb two"
    assert found["s0000001.jpg"] == jpeg(0)
    assert make_shards([str(out), "--to", "evaluation", "--out", str(tmp_path / "again")]) == 2


@pytest.mark.parametrize("header", ["filepath,caption,label_source", "filepath,caption,unlabelled"])
def test_the_columns_tell_captions_from_labels(tmp_path: Path, header: str) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    table = write_table(tmp_path / "t.csv", header.split(","), [["0.jpg", "a one", "x"]])
    assert make_shards([str(table), "--to", "evaluation", "--out", str(tmp_path / "out")]) == 0
    assert members(tmp_path / "out" / "test" / "0.tar")["s0000000.txt"] == b"a one"


def test_make_glyphs_draws_both_corpora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = ["scenes", "--out", str(tmp_path / "s"), "--train", "6", "--evaluation", "4", "--workers", "1"]
    assert make_glyphs.main(scenes) == 0
    assert "6 training images and 8 evaluation sets" in capsys.readouterr().out
    assert make_glyphs.main([*scenes, "--seed", "1"]) == 2
    characters = ["characters", "--out", str(tmp_path / "c"), "--num-characters", "20", "--workers", "1"]
    assert make_glyphs.main(characters) == 0
    assert json.loads((tmp_path / "c" / "characters.json").read_text())["characters"] == 20


def test_reading_an_evaluation_set_loads_no_torch() -> None:
    code = "import sys, clipkit.evaluation.datasets; print(sorted({'torch', 'open_clip'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
