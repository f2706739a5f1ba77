"""The steps of a reshard and what is kept between them, so that it continues after any end."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.data.engine import Engine
from clipkit.data.finished import Finished
from clipkit.data.indexing import build_index
from clipkit.data.key_table import TableSpec, build_key_table
from clipkit.data.reshard.job import Reshard, write_job
from clipkit.data.reshard.plan import PLAN, Plan, make_plan, plan_of, remove_choices
from clipkit.data.reshard.select import choices_path, choose, fields_stem, subset_stem
from clipkit.data.reshard.write import write_output
from clipkit.data.shard_folder import SUMMARIES, begin_shards, refuse_foreign, refuse_shards
from clipkit.data.shards import ShardRecord, finish_train_shards
from clipkit.data.uid_subset import UidSubset
from clipkit.types import ClipkitError, ConfigError

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_DONE = "done"


@dataclass(frozen=True)
class Written:
    """What lies in one folder, and what was counted while it was written."""

    folder: Path
    records: tuple[ShardRecord, ...]

    @property
    def samples(self) -> int:
        return sum(record.samples for record in self.records)


class Resharding:
    """A reshard in progress; its state lies in the output folder, so that the next one continues.

    Raises ConfigError and DataError for what cannot be done, before anything is written.
    """

    def __init__(self, job: Reshard, engine: Engine, progress: Progress, *, dry_run: bool = False) -> None:
        self.job, self.engine, self.progress, self.dry_run = job, engine, progress, dry_run
        job.check()
        self._stack = ExitStack()
        self._work = Finished(job.out, job.description())

    def __enter__(self) -> Resharding:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stack.close()
        # A full disk, most of the time; a closed pipe is that of the terminal.
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise ClipkitError(
                f"{error.filename or self.job.out}: {error.strerror or error}",
                "make room or repair the storage, then start the same command again: it continues",
            ) from error

    def begin(self, overwrite: bool = False) -> bool:
        """Makes the output folders; returns False when everything is there already.

        ConfigError when they hold shards of another job.
        """
        if self._is_done():
            self._clear()
            return False
        done = self._work.get(_DONE)
        # Others may have put shards where a finished job lost some of its own.
        if not overwrite and (self._holds_others(done) if done else not self._work.begun):
            for folder in self.job.folders:
                refuse_shards(folder)
        for folder in self.job.folders:
            refuse_foreign(folder)
        if self.dry_run:
            return True
        try:
            if done:
                self._work.place(f"{_DONE}.json").unlink(missing_ok=True)
            for folder in self.job.folders:
                begin_shards(folder, *SUMMARIES)
        except OSError as error:
            raise ConfigError(
                f"--out {error.filename} cannot be written ({error.strerror})",
                "choose a folder that you may write to",
            ) from error
        return True

    def plan(self) -> Plan:
        """Returns the plan: the one that an interrupted job left, or a new one from a walk."""
        if self.dry_run:
            scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="clipkit-")))
            self._work = Finished(scratch, self.job.description())
        work, folder = self._work, self._work.place(PLAN).parent
        record = work.get(PLAN)
        if record is None:
            write_job(self.job, folder)
            self._tables(folder)
            try:
                plan = make_plan(self.job, folder, self._walk(folder))
                record = {"cuts": plan.cuts, "counts": plan.counts}
                work.put(PLAN, record)
            except FileNotFoundError:
                # Another machine that shares the job made the same plan meanwhile, and cleaned up.
                record = work.get(PLAN)
                if record is None:
                    raise
            remove_choices(folder, len(self.job.shards))
        return plan_of(self.job, folder, record)

    def write(self, plan: Plan, numbers: range) -> Counter[str]:
        """Writes those of the output shards `numbers` that are not there; returns what was counted in all."""
        counts: Counter[str] = Counter()
        pending = []
        samples = 0
        for number in numbers:
            record = self._written(plan, number)
            if record is None:
                pending.append(number)
            else:
                samples += record["shard"]["samples"]
                counts.update(record["counts"])
        total = sum(plan.parts[number].end - plan.parts[number].begin for number in numbers)
        results = self.engine.map(write_output, ((plan.folder, number) for number in pending))
        for number, record in zip(pending, results, strict=True):
            self._work.put(_output(number), record)
            samples += record["shard"]["samples"]
            counts.update(record["counts"])
            self.progress("samples written", samples, total)
        return counts

    def finish(self, plan: Plan) -> list[Written] | None:
        """Writes manifest.json, sizes.json and the index of each folder, and removes what the job kept.

        Returns None when output shards are missing, which others may be writing.
        """
        found = [self._written(plan, number) for number in range(len(plan.parts))]
        if any(record is None for record in found):
            return None
        written = []
        for side, folder in enumerate(self.job.folders):
            records = [
                ShardRecord(**record["shard"])
                for part, record in zip(plan.parts, found, strict=True)
                if part.side == side and record is not None
            ]
            finish_train_shards(folder, records)
            build_index([str(folder / record.name) for record in records])
            written.append(Written(folder, tuple(records)))
        self._work.put(_DONE, {"shards": [[vars(record) for record in each.records] for each in written]})
        self._clear()
        return written

    def _clear(self) -> None:
        """Removes everything but the record that all is done."""
        for path in self._work.place(_DONE).parent.iterdir():
            if path.name != f"{_DONE}.json":
                path.unlink()

    def _is_done(self) -> bool:
        done = self._work.get(_DONE)
        return done is not None and all(
            (folder / "manifest.json").is_file() and all(_is_there(folder, record) for record in records)
            for folder, records in zip(self.job.folders, done["shards"], strict=True)
        )

    def _holds_others(self, done: dict[str, Any]) -> bool:
        """Whether a folder holds a tar that is not, by name and size, what the finished job wrote."""
        return any(
            set(folder.glob("*.tar")) - {folder / each["name"] for each in records if _is_there(folder, each)}
            for folder, records in zip(self.job.folders, done["shards"], strict=True)
        )

    def _written(self, plan: Plan, number: int) -> dict[str, Any] | None:
        record = self._work.get(_output(number))
        folder = self.job.folders[plan.parts[number].side]
        return record if record is not None and _is_there(folder, record["shard"]) else None

    def _tables(self, folder: Path) -> None:
        specs: list[tuple[TableSpec | None, Path, bool]] = [
            (self.job.subset_table, subset_stem(folder), False),
            (self.job.fields_table, fields_stem(folder), True),
        ]
        if self.job.uids and self.job.subset is not None:
            UidSubset(self.job.subset)  # refused now, not by every worker
        for spec, stem, unique in specs:
            if spec is not None:
                build_key_table(spec, stem, unique, lambda rows: self.progress("table rows", rows, rows))

    def _walk(self, folder: Path) -> list[dict[str, int]]:
        total = len(self.job.shards)
        paths = [choices_path(folder, number) for number in range(total)]
        known = [self._work.get(path.stem) if path.is_file() else None for path in paths]
        pending = [number for number, counts in enumerate(known) if counts is None]
        parts = ((folder, number) for number in pending)
        for done, (number, counts) in enumerate(
            zip(pending, self.engine.map(choose, parts), strict=True), total - len(pending) + 1
        ):
            self._work.put(paths[number].stem, counts)
            known[number] = counts
            self.progress("shards read", done, total)
        return [counts for counts in known if counts is not None]


def _output(number: int) -> str:
    return f"output-{number:06d}"


def _is_there(folder: Path, record: dict[str, Any]) -> bool:
    try:
        return os.stat(folder / record["name"]).st_size == record["bytes"]
    except OSError:
        return False
