"""The folder of a download: held by one at a time, free of what img2dataset stumbles over."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipkit.data.shard_folder import MANIFEST_FORMAT, has_format
from clipkit.types import ConfigError

SUMMARY = "download.json"
SUMMARY_FORMAT = "clipkit download "
LOCK = ".clipkit-download"

_STATS = re.compile(r"(\d{5,})_stats\.json")
_COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")
_INDEX = re.compile(r"\.clipkit-index-.*\.json")


def statistics(out: Path) -> Iterator[tuple[Path, int, dict[str, Any] | None]]:
    """Yields (file, number of the shard, content) in order; None for what was cut by a kill."""
    for path in sorted(out.glob("*_stats.json")):
        match = _STATS.fullmatch(path.name)
        if match is None:
            continue
        try:
            stats = json.loads(path.read_bytes())
            whole = isinstance(stats["status_dict"], dict) and all(
                isinstance(stats[name], int) for name in _COUNTS
            )
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        yield path, int(match[1]), stats if whole else None


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[int]:
    """Holds the folder for one download; yields the descriptor of the lock, for the child to hold as well.

    A folder that is refused, here or in the block, stays as it was.
    """
    known = (out / LOCK).exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror})", "choose a folder you may write to"
        ) from error
    try:
        _lock(descriptor, out)
        try:
            _refuse_strange(out)
            yield descriptor
        except ConfigError:
            if not known:
                (out / LOCK).unlink()
            raise
    finally:
        os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"{out}: another download is writing there", "wait for it, or end it first"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be locked ({error.strerror})", "choose a folder of a file system that has locks"
        ) from error


def _refuse_strange(out: Path) -> None:
    own = set(_own(out))
    for path in out.iterdir():
        if path.name.endswith(".json") and path not in own and not _STATS.fullmatch(path.name):
            raise ConfigError(
                f"{path}: img2dataset takes every .json file in its folder for its own",
                "move it away, or choose another folder",
            )


def _own(out: Path) -> list[Path]:
    """Returns the JSON files that clipkit wrote and makes again, in the order of their removal."""
    known = [
        out / name
        for name, form in ((SUMMARY, SUMMARY_FORMAT), ("manifest.json", MANIFEST_FORMAT))
        if has_format(out / name, form)
    ]
    # sizes.json says nothing of its maker: it goes first, while what it lies beside is still there.
    sizes = [out / "sizes.json"] if known or any(out.glob("*.tar")) else []
    return [*sizes, *(path for path in out.iterdir() if _INDEX.fullmatch(path.name)), *known]


def prepare(out: Path) -> None:
    """Removes what img2dataset stumbles over: files that clipkit makes again, statistics without a tar."""
    for path in _own(out):
        path.unlink(missing_ok=True)
    for path, _, stats in statistics(out):
        tar = path.with_name(f"{path.name.removesuffix('_stats.json')}.tar")
        if stats is None or not tar.is_file():
            path.unlink()
