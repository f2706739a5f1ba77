"""The shards of raw data: where they are kept, who makes them, and when they are made again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.data.engine import Engine
from clipkit.data.finished import is_whole
from clipkit.data.making import MakeJob, Making
from clipkit.data.making.collection import collect
from clipkit.data.making.samples import Layout
from clipkit.data.raw.reading import Plan, Raw, describe, planned
from clipkit.data.shards import write_text
from clipkit.lock import HeldError, held
from clipkit.types import ConfigError, DataError

CACHE = ".clipkit-cache"
RECORD = "made.json"
REJECTS = "rejects.jsonl"
LOCK = "making.lock"

_FORMAT = 1
# So many at most a killed making repeats, and few pairs still feed several processes.
_SAMPLES_PER_SHARD = 2000
_POLL_S = 0.5
# Where locks do not reach other machines, a holder there counts as gone when its files stand still so long.
_STALLED_S = 900.0
_KEYS = {
    "--image-key": "image_key",
    "--caption-key": "captions",
    "--images": "image_root",
    "--max-reject-fraction": "data.max_reject_fraction",
    " and --keep": "",
    ", or pass --to evaluation": "",
}

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


@dataclass(frozen=True)
class Made:
    """Shards that stand for raw data.

    folder   where they lie
    content  a hash of all their bytes: equal for equal data, wherever and whenever they were made
    fields   for each entry of `Raw.captions` the field of the shards that holds it
    samples  how many they hold; rejected: how many entries could not be used (rejects.jsonl in the folder)
    """

    folder: Path
    content: str
    fields: tuple[str, ...]
    samples: int
    rejected: int


@dataclass(frozen=True)
class Rules:
    """How shards are made: where they are kept (None: beside the data, or in the user's cache folder), with
    how many processes, and the largest share of entries that may be unusable.
    """

    cache: Path | None = None
    workers: int = 1
    max_reject_fraction: float = 0.01


def check_columns(raw: Raw) -> None:
    """Raises what `made_shards` would for columns that are not there, after a look at the first rows."""
    with in_words(_KEYS):
        planned(raw)


def made_shards(raw: Raw, rules: Rules, say: Say, progress: Progress) -> Made:
    """Returns the shards of raw data, made now unless they are there already.

    Of several processes that ask at the same time one makes them and the others wait. Raises ConfigError for
    a cache that cannot be written or is too small, DataError for data that cannot be used.
    """
    with in_words(_KEYS), _room():
        plan = planned(raw)
        facts, volume = describe(raw, plan)
        name = f"{_stem(plan.place)}-{_digest(facts)}"
        roots = cache_roots(plan.place, rules.cache)
        for root in roots:
            made = read_record(root / name)
            if made is not None:
                return _accepted(raw, made, rules, say)
        folder = _writable(roots) / name
        with _alone(folder, say) as made:
            if made is None:
                _refuse_full_disk(folder, volume)
                say(f"making shards of {raw.path}, this once: {plan.found.used}; into {folder}")
                made = _make(raw, plan, folder, rules, say, progress)
                if describe(raw, plan)[0] != facts:
                    (folder / RECORD).unlink()
                    raise DataError(
                        f"{raw.path}: it changed while its shards were made", "start again when it is at rest"
                    )
                _mention_older(raw, folder, say)
        return _accepted(raw, made, rules, say)


def _make(raw: Raw, plan: Plan, folder: Path, rules: Rules, say: Say, progress: Progress) -> Made:
    """Makes the shards and leaves the record that says so."""
    (folder / RECORD).unlink(missing_ok=True)
    collection = collect(str(raw.path), plan.found, plan.reading, folder)
    if plan.found.passed_over:
        say(f"{raw.path}: {plan.found.describe_passed_over()}")
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        progress("making shards", done, len(collection))

    try:
        making = Making(_SAMPLES_PER_SHARD, max_reject_fraction=rules.max_reject_fraction)
        job = MakeJob(collection, folder, making, Layout())
        job.begin(overwrite=True)
        outcome = job.run(Engine(rules.workers), count)
    finally:
        collection.close()
    shards = {record.name: record.bytes for record in outcome.records}
    hashes = "".join(f"{record.name} {record.sha256}\n" for record in outcome.records)
    made = Made(
        folder=folder,
        content=hashlib.blake2b(hashes.encode(), digest_size=16).hexdigest(),
        fields=plan.fields,
        samples=sum(record.samples for record in outcome.records),
        rejected=outcome.rejects.total(),
    )
    # Last: what is not recorded is made again.
    record = {**vars(made), "shards": shards, "source": _source(raw)}
    del record["folder"]
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return made


def _mention_older(raw: Raw, folder: Path, say: Say) -> None:
    """Says where shards of an earlier state of the data lie: a run may still continue on them."""
    for other in sorted(folder.parent.glob(f"*/{RECORD}")):
        # What cannot be read is not worth a word.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            source = json.loads(other.read_text(encoding="utf-8"))["source"]
            if other.parent != folder and source == _source(raw):
                say(f"earlier shards of it lie in {other.parent}; remove them when no run needs them")


def _source(raw: Raw) -> str:
    return str(raw.path.resolve())


def _accepted(raw: Raw, made: Made, rules: Rules, say: Say) -> Made:
    """The shards, unless more entries were left out of them than this run allows; says how many were."""
    total = made.samples + made.rejected
    if made.rejected > rules.max_reject_fraction * total:
        raise DataError(
            f"{raw.path}: {made.rejected:,} of {total:,} entries are unusable (see {made.folder / REJECTS})",
            "correct them, or raise data.max_reject_fraction",
        )
    if made.rejected:
        say(f"{raw.path}: {made.rejected:,} of {total:,} entries left out (see {made.folder / REJECTS})")
    return made


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Says in words what the storage refuses while shards are made."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or 'the cache of shards'}: {error.strerror or error}",
            "make room or repair the storage, or set data.cache to another folder; what is made is kept",
        ) from error


@contextlib.contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """Lets the cures of errors name what the caller calls the options of make-shards."""
    try:
        yield
    except (ConfigError, DataError) as error:
        cure = error.cure
        for option, word in words.items():
            cure = cure.replace(option, word)
        if cure == error.cure:
            raise
        raise type(error)(error.cause, cure) from error


def _stem(path: Path) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in path.resolve().stem)[:40] or "data"


def _digest(facts: Mapping[str, Any]) -> str:
    ours = {"format": _FORMAT, "samples_per_shard": _SAMPLES_PER_SHARD}
    text = json.dumps({**ours, **facts}, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def cache_roots(path: Path, cache: Path | None) -> list[Path]:
    """Returns where shards of the data at `path` may lie, the first place first."""
    if cache is not None:
        return [cache]
    beside = path if path.is_dir() else path.parent
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [beside / CACHE, Path(home, "clipkit", "shards")]


def read_record(folder: Path) -> Made | None:
    """Returns what a finished making left in `folder`; None without it, or without its shards."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        made = Made(folder, record["content"], tuple(record["fields"]), record["samples"], record["rejected"])
        whole = all(is_whole(folder / name, size) for name, size in record["shards"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # made again: the same bytes
    return made if whole else None


def _writable(roots: Sequence[Path]) -> Path:
    problems = []
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                return root
        except OSError as error:
            problems.append(f"{root} ({(error.strerror or str(error)).lower()})")
    raise ConfigError(
        f"shards cannot be written to {' nor to '.join(problems)}", "set data.cache to a folder that can be"
    )


@contextlib.contextmanager
def _alone(folder: Path, say: Say) -> Iterator[Made | None]:
    """Holds the making of `folder` while the block runs; yields what another process has made meanwhile."""
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, folder)
        waiting, seen, since = "", -1, time.monotonic()
        while True:
            try:
                stack.enter_context(held(folder / LOCK))
                break
            except HeldError as error:
                if waiting != error.holder:
                    waiting = error.holder
                    say(f"{waiting} is making these shards ({folder}); waiting for it")
            except FileNotFoundError:
                waiting = waiting or "a process"  # it has just left, and taken an empty folder along
            except OSError as error:
                raise ConfigError(
                    f"{folder} cannot be written to ({error.strerror})", "set data.cache to another folder"
                ) from error
            newest = _newest(folder)
            if newest != seen:
                seen, since = newest, time.monotonic()
            if time.monotonic() - since > _STALLED_S:
                raise ConfigError(
                    f"{waiting} is making {folder} and nothing has changed there for {_STALLED_S:.0f} s",
                    f"stop it and start again, or if it is surely gone, remove {folder / LOCK}",
                )
            time.sleep(_POLL_S)
        yield read_record(folder)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something, or another process is in it
        folder.rmdir()


def _newest(folder: Path) -> int:
    """The latest time of change in a folder, in ns; files may vanish while one looks."""
    newest = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            newest = max(newest, path.stat().st_mtime_ns)
    return newest


def _refuse_full_disk(folder: Path, volume: int) -> None:
    there = sum(path.stat().st_size for path in folder.glob("*.tar"))
    free = shutil.disk_usage(folder).free
    if volume - there > free:
        raise ConfigError(
            f"the shards need about {volume / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB",
            "free some space, or set data.cache to a folder on another disk",
        )
