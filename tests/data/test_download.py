"""Downloads: what is asked of img2dataset, what is read of it, and every way in which it ends.

The default tests put a stand-in in its place; the slow one installs and runs the real one.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clipkit.cli.app import main
from clipkit.data.url_list import choose_columns, read_list
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.data.makers import png, stream, take

ROOT = Path(__file__).parents[2]
Rows = list[list[str]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `uvx` that comes first on the PATH; returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "uvx"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.data.img2dataset_like import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def table_of(path: Path, rows: Rows, header: tuple[str, ...] = ("uid", "URL", "TEXT")) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as out:
        csv.writer(out, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])
    return path


def good_rows(pictures: Path) -> Rows:
    return [
        [f"u{number}", str(pictures / f"{number}.png"), f"caption {number}, “quoted”"] for number in range(8)
    ]


def download(*arguments: str | Path) -> int:
    """`arguments`: the list, the folder, options."""
    urls, out, *options = map(str, arguments)
    return main(["data", "download", urls, "--out", out, *options])


def test_a_download_trains_as_it_is(
    stand_in: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = good_rows(pictures)
    rows[1][1] = "http://127.0.0.1:1/404.png"
    rows[4][1] = "http://127.0.0.1:1/torn.png"
    out = tmp_path / "out ü" / "2024"
    urls = table_of(tmp_path / "list.csv", rows)
    assert download(urls, out, "--samples-per-shard", "3", "--resize", "64", "--resize-mode", "longer") == 0
    said = capfd.readouterr()
    assert "rows: 8, addresses: 'URL', captions: 'TEXT', kept: uid" in said.out
    assert "--resize_mode=keep_ratio_largest" in json.loads((out / "arguments").read_text())
    assert "--image_size=64" in json.loads((out / "arguments").read_text())
    assert re.search(r"^pairs +6 +75.0%$", said.out, re.MULTILINE)
    assert re.search(r"^  HTTP Error 404: Not Found +1$", said.out, re.MULTILINE)
    assert f"next: clipkit data check-shards {out}" in said.out
    assert "Starting the downloading" in said.err
    assert "worker" not in said.err
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 2, "00002.tar": 2}
    summary = json.loads((out / "download.json").read_text())
    assert summary["failures"] == {"HTTP Error 404: Not Found": 1, "Image decoding error": 1}
    assert (summary["rows"], summary["successes"], summary["unfinished"]) == (8, 6, [])
    opened = stream(out, 3)
    assert opened.num_samples == 6
    keys = sorted(key for batch in take(opened, 0, 2) for key in batch.keys)
    assert keys == ["000000", "000002", "000010", "000012", "000020", "000021"]
    assert main(["index", str(out)]) == 0
    assert "warning" not in capfd.readouterr().err


def test_what_img2dataset_is_asked_for(
    stand_in: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = table_of(tmp_path / "list.tsv", good_rows(pictures))
    out = tmp_path / "it's 'out'"
    assert download(urls, out, "--workers", "3", "--dry-run") == 0
    assert not out.exists()
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:6] == ["uvx", "--python", ">=3.9,<3.13", "--from", "img2dataset==1.47.0", "img2dataset"]
    assert download(urls, out, "--workers", "3") == 0
    assert json.loads((out / "arguments").read_text()) == command[1:]
    for flag in (
        "--input_format=tsv",
        "--output_format=webdataset",
        '--url_col="URL"',
        '--caption_col="TEXT"',
        '--save_additional_columns=["uid"]',
        "--resize_mode=no",
        "--skip_reencode=True",
        "--processes_count=3",
        "--retries=2",
    ):
        assert flag in command
    assert not [flag for flag in command if "border" in flag]


def test_the_same_command_continues(
    stand_in: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = good_rows(pictures)
    rows[4][1] = str(tmp_path / "crash")
    urls, out = table_of(tmp_path / "list.csv", rows), tmp_path / "out"
    every = (urls, out, "--samples-per-shard", "3")
    assert download(*every) == 1
    said = capfd.readouterr()
    assert "img2dataset ended with exit code 1: shard failed\\u001b[2J with error" in said.err
    assert "\x1b" not in said.err
    assert json.loads((out / "download.json").read_text())["unfinished"] == [1, 2]
    # An index beside the shards, statistics cut by a kill, a tar that somebody has thrown away.
    assert main(["index", str(out / "00000.tar")]) == 0
    (out / "00001_stats.json").write_text('{"count": 3, ')
    (tmp_path / "crash").write_bytes(png(4))
    finished = (out / "00000.tar").stat().st_mtime_ns
    assert download(*every) == 0
    assert (out / "00000.tar").stat().st_mtime_ns == finished
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 3, "00002.tar": 2}
    ended = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capfd.readouterr()
    assert download(*every) == 0
    said = capfd.readouterr()
    assert f"nothing to do: {out} was made by this very command" in said.out
    assert "(3 shards, 8 samples)" in said.out
    assert "Starting the downloading" not in said.err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == ended
    (out / "00002.tar").unlink()
    assert download(*every) == 0
    assert (out / "00002.tar").is_file()
    for other in (("--samples-per-shard", "4"), (*every[2:], "--caption-key", "uid")):
        assert download(urls, out, *other) == 2
    assert "made otherwise: --samples-per-shard 3 -> 4" in capfd.readouterr().err
    table_of(urls, rows[:5])
    assert download(*every) == 2
    assert re.search(r"made otherwise: \S+list\.csv changed$", capfd.readouterr().err, re.MULTILINE)
    assert json.loads((out / "sizes.json").read_text())["00000.tar"] == 3


def test_unfinished_shards_are_a_failure(
    stand_in: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = good_rows(pictures)
    rows[3][1] = "partial"
    out = tmp_path / "out"
    assert download(table_of(tmp_path / "list.csv", rows), out, "--samples-per-shard", "3") == 1
    said = capfd.readouterr()
    assert "error: 1 shards are unfinished: 00001" in said.err
    assert "run the same command again" in said.err
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 3, "00002.tar": 2}


def test_a_download_that_dies_at_once_says_so(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    urls = table_of(tmp_path / "list.csv", [["u", "crash", "text"]])
    assert download(urls, tmp_path / "out") == 1
    assert "img2dataset ended with exit code 1" in capfd.readouterr().err
    assert not (tmp_path / "out" / "sizes.json").exists()
    urls = table_of(tmp_path / "other.csv", [["u", "partial", "text"]])
    assert download(urls, tmp_path / "other") == 1
    assert "1 shards are unfinished: 00000" in capfd.readouterr().err


def test_nothing_fetched_is_bad_data(
    stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [["u", f"https://host/404/{number}", "text"] for number in range(5)]
    assert download(table_of(tmp_path / "list.csv", rows), tmp_path / "out") == 3
    assert "no picture came from any of 5 rows, 5 times: HTTP Error 404" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_ended_download_leaves_nobody_behind(
    stand_in: Path, pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    rows = good_rows(pictures)
    rows[5][1] = str(tmp_path / "asleep")
    out = tmp_path / "out"
    urls = table_of(tmp_path / "list.csv", rows)
    arguments = ["data", "download", str(urls), "--out", str(out), "--samples-per-shard", "3"]
    command = [sys.executable, "-m", "clipkit", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        assert any(b"asleep" in line for line in process.stderr)
        # The folder belongs to one download at a time.
        assert main(arguments) == 2
        process.send_signal(number)
        code = process.wait(60)
    sleepers = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if _reads(pid, str(out))]
    if number == signal.SIGTERM:
        assert code == 130
        assert sleepers == []
        assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 3}
        return
    # Killed: what it started lives on for a while, and keeps the folder for itself.
    assert len(sleepers) == 1
    assert main(arguments) == 2
    os.kill(sleepers[0], signal.SIGKILL)
    (tmp_path / "asleep").write_bytes(png(5))
    deadline = time.monotonic() + 20
    while _reads(sleepers[0], str(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert main(arguments) == 0


def _reads(pid: int, out: str) -> bool:
    """Whether a process is the stand-in for a download into `out`."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f'--output_folder="{out}"'.encode() in words


def test_without_uv_there_is_a_cure(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("clipkit.data.download.importlib.util.find_spec", lambda name: None)
    assert download(table_of(tmp_path / "list.csv", good_rows(pictures)), tmp_path / "out") == 2
    assert "run: pip install uv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_its_own(
    stand_in: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    urls = table_of(tmp_path / "list.csv", good_rows(pictures))
    made = tmp_path / "made"
    made.mkdir()
    (made / "00000.tar").write_bytes(b"precious")
    (made / "sizes.json").write_text("{}")
    assert download(urls, made) == 2
    assert "already holds shards" in capsys.readouterr().err
    assert sorted(path.name for path in made.iterdir()) == ["00000.tar", "sizes.json"]
    own = tmp_path / "own"
    own.mkdir()
    (own / "notes.json").write_text("{}")
    assert download(urls, own) == 2
    assert "notes.json: img2dataset takes every .json file" in capsys.readouterr().err
    assert download(urls, tmp_path / "a[1]") == 2
    assert download(urls, tmp_path / "list.csv") == 2
    assert download(urls, tmp_path / "out", "--resize", "0") == 2


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("gone.csv", None, ConfigError, "no such file"),
        ("a.doc", b"x", ConfigError, "not a list of addresses"),
        ("a.csv", b"", DataError, "no address"),
        ("a.csv", b"url,caption\n", DataError, "no address"),
        ("a.csv", b"url,caption\n\xff,x\n", DataError, "not a readable csv"),
        ("a.csv", b'url,caption\nx,"two\nlines"\n', DataError, "a.csv:2: a line break"),
        ("a.txt", b"https://h/1\nhttps://h/a,b\n", DataError, "a.txt:2: an address with a comma"),
        ("a.jsonl", b"[1]\n", DataError, "no JSON object"),
        ("a.jsonl", b"{\n", DataError, "no JSON"),
        ("a.parquet", b"PAR1", DataError, "a.parquet: cannot be read"),
        ("a.csv.gz", b"no gzip", DataError, "not a readable csv.gz"),
        ("folder", b"", ConfigError, "no list of addresses"),
    ],
)
def test_lists_that_cannot_be_downloaded_from(
    tmp_path: Path, name: str, content: bytes | None, kind: type[ClipkitError], words: str
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "notes.md").write_text("x")
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=words):
        read_list(path)


def test_formats_columns_and_counts(tmp_path: Path) -> None:
    rows = [["a", "https://h/1,2", "one"], ["b", "https://h/2", "two"]]
    table = table_of(tmp_path / "list.csv", rows)
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress(table.read_bytes()))
    records = [dict(zip(("uid", "URL", "TEXT"), row, strict=True)) for row in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    table_of(tmp_path / "list.tsv", rows)
    names = ["list.csv", "list.csv.gz", "list.jsonl", "list.tsv"]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        pass
    else:
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "list.parquet")
        names.append("list.parquet")
    for name in names:
        found = read_list(tmp_path / name)
        assert (found.kind, found.columns, found.rows) == (name[5:], ("uid", "URL", "TEXT"), (2,))
        assert found.num_shards(2) == 1
        chosen = choose_columns(found, None, None, ())
        assert (chosen.url, chosen.caption, chosen.kept) == ("URL", "TEXT", ("uid",))
    (tmp_path / "plain.txt").write_text("https://h/1\n\nhttps://h/2\n")
    plain = read_list(tmp_path / "plain.txt")
    assert (plain.columns, plain.rows) == (None, (2,))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("1.csv", "2.csv"):
        table_of(folder / name, rows)
    assert read_list(folder).num_shards(2) == 2
    assert read_list(folder).num_shards(10) == 2
    (folder / "3.txt").write_text("https://h/1\n")
    with pytest.raises(ConfigError, match="different formats"):
        read_list(folder)


@pytest.mark.parametrize(
    ("header", "options", "words"),
    [
        (("uid", "where", "caption"), {}, "no column is named like urls"),
        (("uid", "url", "words"), {}, "no column is named like captions"),
        (("uid", "url", "caption"), {"caption": "nope"}, "no column 'nope'"),
        (("uid", "url", "caption"), {"kept": ("sha256",)}, "no column 'sha256'"),
        (("width", "url", "caption"), {"kept": ("width",)}, "cannot be kept"),
        (("caption", "url", "TEXT"), {"caption": "TEXT"}, "renames 'TEXT' to 'caption'"),
    ],
)
def test_columns_that_cannot_be_read(
    tmp_path: Path, header: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    found = read_list(table_of(tmp_path / "list.csv", [["a", "b", "c"]], header))
    with pytest.raises(ConfigError, match=words):
        choose_columns(found, **{"url": None, "caption": None, "kept": (), **options})


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(pictures: Path) -> Iterator[str]:
    """The pictures on a port of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(pictures))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.slow  # installs img2dataset and its 50 packages, 30 to 60 s
def test_the_real_img2dataset(
    pictures: Path, server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [[f"u{number}", f"{server}/{number}.png", f"caption {number}, ü"] for number in range(8)]
    (pictures / "torn.png").write_bytes(png(1)[:60])
    rows[1][1], rows[4][1] = f"{server}/gone.png", f"{server}/torn.png"
    urls, out = table_of(tmp_path / "list.csv", rows), tmp_path / "it's 2024"
    every = (urls, out, "--samples-per-shard", "3", "--retries", "0")
    assert download(*every) == 0
    assert "Downloading starting now" in capfd.readouterr().err
    summary = json.loads((out / "download.json").read_text())
    assert (summary["rows"], summary["successes"]) == (8, 6)
    assert (summary["failed_to_download"], summary["failed_to_resize"]) == (1, 1)
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 2, "00001.tar": 2, "00002.tar": 2}
    opened = stream(out, 3)
    keys = sorted(key for batch in take(opened, 0, 2) for key in batch.keys)
    assert keys == ["000000", "000002", "000010", "000012", "000020", "000021"]
    # Again, with an index and sizes.json in the way and one shard to be fetched.
    (out / "00001.tar").unlink()
    assert download(*every) == 0
    assert stream(out, 3).num_samples == 6
