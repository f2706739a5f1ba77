"""Downloading with img2dataset, in an environment of its own, and what it left behind. Loads no torch.

img2dataset needs another version of webdataset than clipkit does, and a Python before 3.13 (imghdr), so uv
runs it apart. What it does not survive is kept from it: any JSON file but its own in the folder, addresses
with commas in a text file, arguments that look like numbers, characters that fsspec reads as patterns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.data.download_folder import SUMMARY, SUMMARY_FORMAT, claimed, prepare, statistics
from clipkit.data.fingerprints import path_input
from clipkit.data.finished import ELSEWHERE, Ended, Finished
from clipkit.data.shard_folder import shards_in
from clipkit.data.shards import write_text
from clipkit.data.url_list import Columns, UrlList
from clipkit.types import ClipkitError, ConfigError, DataError

IMG2DATASET = "1.47.0"
PYTHON = ">=3.9,<3.13"
RESIZE_MODES = {"shorter": "keep_ratio", "longer": "keep_ratio_largest"}

_TOTAL = re.compile(r"total\s+- .*count: (\d+)\s*$")
_NOISE = re.compile(r"\s*$|worker\s+- |\d*it \[|\d+it$")
_STATUSES = 100  # kinds of failure that the summary lists
_END_S = 10.0  # for img2dataset to leave by itself


@dataclass(frozen=True)
class Download:
    """What is asked for. resize: pixels of the side that `resize_mode` names, in larger pictures only."""

    source: UrlList
    columns: Columns
    out: Path
    resize: int | None = None
    resize_mode: str = "shorter"
    per_shard: int = 10_000
    workers: int = 1
    threads: int = 64
    retries: int = 2
    timeout: int = 10

    def __post_init__(self) -> None:
        if set("*?[]") & set(str(self.out)) or "::" in f"{self.out}{self.source.path}":
            raise ConfigError(
                f"{self.out}: img2dataset reads *, ?, [, ] and :: in names as patterns",
                "choose a name without them",
            )

    def arguments(self) -> list[str]:
        """Returns the arguments of img2dataset; names quoted, it would take a folder 2024 for a number."""
        flags: dict[str, Any] = {
            "url_list": _quoted(os.path.abspath(self.source.path)),
            "input_format": self.source.kind,
            "output_folder": _quoted(os.path.abspath(self.out)),
            "output_format": "webdataset",
            "url_col": _quoted(self.columns.url),
            "caption_col": None if self.columns.caption is None else _quoted(self.columns.caption),
            "save_additional_columns": _quoted(self.columns.kept) if self.columns.kept else None,
            # Its default pads every picture to a square with white borders.
            "resize_mode": "no" if self.resize is None else RESIZE_MODES[self.resize_mode],
            "image_size": self.resize,
            "resize_only_if_bigger": True,
            "skip_reencode": True,
            "number_sample_per_shard": self.per_shard,
            "processes_count": self.workers,
            "thread_count": self.threads,
            "retries": self.retries,
            "timeout": self.timeout,
            "max_shard_retry": 3,
            # Places and names of people, of no use to training.
            "extract_exif": False,
        }
        return [f"--{name}={value}" for name, value in flags.items() if value is not None]

    def description(self) -> dict[str, Any]:
        """Returns what the shards depend on, JSON-able."""
        return {
            "job": "download",
            "options": {
                "url-key": self.columns.url,
                "caption-key": self.columns.caption,
                "keep": list(self.columns.kept),
                "resize": self.resize,
                "resize-mode": self.resize_mode,
                "samples-per-shard": self.per_shard,
            },
            "inputs": [path_input(self.source.path)],
        }


def _quoted(value: Any) -> str:
    """A text or a list of texts as JSON, which is how Python writes them as well."""
    return json.dumps(value, ensure_ascii=False)


def command_of(download: Download) -> list[str]:
    """Returns the whole command. Raises ConfigError where there is no uv."""
    if shutil.which("uvx"):
        runner = ["uvx"]
    elif shutil.which("uv"):
        runner = ["uv", "tool", "run"]
    elif importlib.util.find_spec("uv"):
        runner = [sys.executable, "-m", "uv", "tool", "run"]
    else:
        raise ConfigError(
            "uv is not installed; it runs img2dataset in an environment of its own",
            "run: pip install uv (or run img2dataset elsewhere: training reads its folder as it is)",
        )
    own = ["--python", PYTHON, "--from", f"img2dataset=={IMG2DATASET}", "img2dataset"]
    return [*runner, *own, *download.arguments()]


def shown_command(download: Download) -> str:
    """Returns the command as a shell takes it."""
    return shlex.join(command_of(download))


@dataclass
class Outcome:
    """What lies in the folder of a download.

    statuses    of rows: "success", or the words of a failure -> how many
    shards      finished shards -> samples
    unfinished  numbers of shards that are missing or were left half written
    ended       of a download that had ended before
    """

    rows: int = 0
    successes: int = 0
    failed_to_download: int = 0
    failed_to_resize: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    shards: dict[str, int] = field(default_factory=dict)
    unfinished: list[int] = field(default_factory=list)
    ended: Ended | None = None

    @property
    def failures(self) -> list[tuple[str, int]]:
        """Words of failures and how many rows each, the most frequent first."""
        return [(words, count) for words, count in self.statuses.most_common() if words != "success"]


def read_outcome(out: Path, num_shards: int | None = None) -> Outcome:
    """Returns what img2dataset has finished in `out`; num_shards: how many there will be, where known."""
    found = Outcome()
    numbers: set[int] = set()
    for path, number, stats in statistics(out):
        tar = path.with_name(f"{path.name.removesuffix('_stats.json')}.tar")
        if stats is None or not tar.is_file():
            continue
        numbers.add(number)
        found.shards[tar.name] = stats["successes"]
        found.rows += stats["count"]
        found.successes += stats["successes"]
        found.failed_to_download += stats["failed_to_download"]
        found.failed_to_resize += stats["failed_to_resize"]
        found.statuses.update(stats["status_dict"])
    begun = {int(path.stem) for path in out.glob("*.tar") if path.stem.isdecimal()}
    expected = range(max(numbers | begun, default=-1) + 1 if num_shards is None else num_shards)
    found.unfinished = sorted((set(expected) | begun) - numbers)
    return found


def run_download(
    download: Download, on_line: Callable[[str], None], on_rows: Callable[[int], None]
) -> Outcome:
    """Downloads, or continues after the shards that are finished, and writes sizes.json and download.json;
    a download that has ended is left as it is.

    on_line: called with what img2dataset says; on_rows: with the rows that are done. Raises ConfigError for a
    folder that belongs to something else, DataError (exit 3) when nothing could be fetched, ClipkitError when
    img2dataset failed or shards are left unfinished: the same command goes on with them.
    """
    command = command_of(download)
    out, num_shards = download.out, download.source.num_shards(download.per_shard)
    work = Finished(out, download.description())
    with claimed(out) as lock:
        ended = work.begin(shards_in([out]), cure=ELSEWHERE)
        if ended is not None:
            return Outcome(ended=ended)
        prepare(out)
        done = read_outcome(out, num_shards).rows
        try:
            last, code = _run(command, lock, on_line, lambda rows: on_rows(done + rows))
        finally:
            found = read_outcome(out, num_shards)
            _write_summary(out, found)
    if code:
        raise ClipkitError(
            f"img2dataset ended with exit code {code}" + (f": {last}" if last else ""),
            "see what it said above; the same command continues after the shards that are finished",
        )
    if found.rows and not found.successes:
        words, count = next(iter(found.failures), ("no reason given", found.rows))
        raise DataError(
            f"no picture came from any of {found.rows:,} rows, {count:,} times: {words}",
            "check the column of addresses (--url-key) and the connection; for another attempt take another "
            "folder, this one keeps what failed",
        )
    if found.unfinished:
        first = ", ".join(f"{number:05d}" for number in found.unfinished[:5])
        raise ClipkitError(
            f"{len(found.unfinished):,} shards are unfinished: {first}",
            "run the same command again: finished shards are kept",
        )
    if not found.rows:
        raise DataError("img2dataset found no row to download", "give a list with at least one address")
    work.end((out / name for name in (*found.shards, "sizes.json", SUMMARY)), found.successes)
    return found


def _run(
    command: list[str], lock: int, on_line: Callable[[str], None], on_rows: Callable[[int], None]
) -> tuple[str, int]:
    """Runs img2dataset; returns the last thing it said and its exit code."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    environment |= {
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }
    said: deque[str] = deque(maxlen=1)
    # A group of its own, so that all its processes can be ended; the lock goes with it: should this process
    # be killed, nobody else downloads into the folder before it is gone too.
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        pass_fds=(lock,),
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            with _term_raises():
                assert process.stdout is not None
                for line in process.stdout:
                    total = _TOTAL.match(line)
                    if total is not None:
                        on_rows(int(total[1]))
                    if not _NOISE.match(line):
                        said.append(line.strip())
                        on_line(line.strip())
                return "".join(said), process.wait()
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
            return


@contextlib.contextmanager
def _term_raises() -> Iterator[None]:
    """SIGTERM leaves like Control-C, so that what was started is ended."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_summary(out: Path, found: Outcome) -> None:
    if not found.shards:
        return
    summary = {
        "format": f"{SUMMARY_FORMAT}1",
        "img2dataset": IMG2DATASET,
        "rows": found.rows,
        "successes": found.successes,
        "failed_to_download": found.failed_to_download,
        "failed_to_resize": found.failed_to_resize,
        "failures": dict(found.failures[:_STATUSES]),
        "shards": len(found.shards),
        "unfinished": found.unfinished,
    }
    write_text(out / "sizes.json", json.dumps(found.shards) + "\n")
    write_text(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
