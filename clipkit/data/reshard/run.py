"""The steps of a reshard and what is kept between them, so that it continues after any end."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from clipkit.data.engine import Engine
from clipkit.data.finished import Ended, Finished, beginning, is_whole, storing
from clipkit.data.indexing import build_index
from clipkit.data.key_table import TableSpec, build_key_table
from clipkit.data.reshard.job import Reshard, write_job
from clipkit.data.reshard.plan import PLAN, Plan, make_plan, plan_of, remove_choices
from clipkit.data.reshard.select import choices_path, choose, fields_stem, subset_stem
from clipkit.data.reshard.write import write_output
from clipkit.data.shard_folder import SUMMARIES, begin_shards, refuse_foreign, shards_in
from clipkit.data.shards import ShardRecord, finish_train_shards
from clipkit.data.uid_subset import UidSubset
from clipkit.types import DataError

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


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
        self._stack.enter_context(storing(self.job.out))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def begin(self, overwrite: bool = False) -> Ended | None:
        """Takes the output folder, or continues there; returns what is there when the job has ended.

        ConfigError when they hold shards of another job.
        """
        for folder in self.job.folders:
            refuse_foreign(folder)
        held = shards_in(self.job.folders)
        return self._work.begin(held, overwrite=overwrite, take=not self.dry_run)

    def plan(self) -> Plan:
        """Returns the plan: the one that an interrupted job left, or a new one from a walk.

        Raises DataError, and leaves nothing behind, when a side of it would be empty.
        """
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
                record = {"cuts": plan.cuts, "counts": plan.counts, "examples": plan.examples}
                work.put(PLAN, record)
            except FileNotFoundError:
                # Another machine that shares the job made the same plan meanwhile, and cleaned up.
                record = work.get(PLAN)
                if record is None:
                    raise
            except DataError:
                work.clear()  # of no use to the command that is corrected
                raise
            remove_choices(folder, len(self.job.shards))
        return plan_of(self.job, folder, record)

    def write(self, plan: Plan, numbers: range) -> Counter[str]:
        """Writes those of the output shards `numbers` that are not there; returns what was counted in all."""
        with beginning(self.job.out):
            for folder in self.job.folders:
                begin_shards(folder, *SUMMARIES)
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
        outputs = [
            each.folder / name
            for each in written
            for name in (*SUMMARIES, *(record.name for record in each.records))
        ]
        self._work.end(outputs, sum(each.samples for each in written))
        return written

    def _written(self, plan: Plan, number: int) -> dict[str, Any] | None:
        record = self._work.get(_output(number))
        folder = self.job.folders[plan.parts[number].side]
        if record is None:
            return None
        shard = record["shard"]
        return record if is_whole(folder / shard["name"], shard["bytes"]) else None

    def _tables(self, folder: Path) -> None:
        specs: list[tuple[TableSpec | None, Path, bool]] = [
            (self.job.subset_table, subset_stem(folder), False),
            (self.job.fields_table, fields_stem(folder), True),
        ]
        if self.job.uids and self.job.subset is not None:
            UidSubset(self.job.subset).check_sorted()  # once, not by every worker
        for spec, stem, unique in specs:
            if spec is not None:
                build_key_table(spec, stem, unique, lambda rows: self.progress("table rows", rows, rows))

    def _walk(self, folder: Path) -> list[dict[str, dict[str, Any]]]:
        total = len(self.job.shards)
        paths = [choices_path(folder, number) for number in range(total)]
        known = [self._work.get(path.stem) if path.is_file() else None for path in paths]
        pending = [number for number, record in enumerate(known) if record is None]
        parts = ((folder, number) for number in pending)
        for done, (number, record) in enumerate(
            zip(pending, self.engine.map(choose, parts), strict=True), total - len(pending) + 1
        ):
            self._work.put(paths[number].stem, record)
            known[number] = record
            self.progress("shards read", done, total)
        return [record for record in known if record is not None]


def _output(number: int) -> str:
    return f"output-{number:06d}"
