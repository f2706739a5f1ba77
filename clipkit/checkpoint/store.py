"""The commit protocol: a checkpoint is either complete or not there, whenever the power goes.

    step-00001200.tmp-<id>/    every rank writes its files here: written, flushed, fsynced
        manifest.json          names, sizes, hashes; written last
    all ranks vote             one failure anywhere: the directory is removed and training goes on
    step-00001200/             one rename, then fsync of the parent, then `latest`, then pruning
    model-<hash>.safetensors   what never changes in the run, written once, named by every manifest

All ranks call `prepare`, `save`, `newest` and `open` together; rank 0 decides, and every rank gets the same
answer or the same exception. The folder must be on a file system that all ranks share.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from clipkit.checkpoint import manifest as files
from clipkit.checkpoint.manifest import Defect
from clipkit.checkpoint.record import (
    LATEST,
    Candidate,
    Checkpoint,
    Skipped,
    candidates,
    newest_in,
    open_path,
    rank_file,
)
from clipkit.checkpoint.rows import Piece, places_of, rows_file, rows_of
from clipkit.dist import World, gather_objects
from clipkit.types import ClipkitError, ConfigError

T = TypeVar("T")
StateTensors = Mapping[str, Tensor]
Records = dict[str, dict[str, Any]]

MIN_KEEP = 2
FREE_SPACE_FACTOR = 1.2
ROWS = "rows"
_LEFTOVER = re.compile(r"(step-\d{8,}|latest|probe|[a-z0-9_]+-[0-9a-f]{16}\.safetensors)\.tmp-[0-9a-f]{12}")
_STEM = re.compile(r"[a-z0-9_]+")


class CheckpointWriteError(ClipkitError):
    """A save that failed on some rank. The earlier checkpoints are intact and training can go on."""


class CheckpointStore:
    """The checkpoints of one run.

    `folder` is `RUN/checkpoints`; the `keep` (at least 2) newest valid ones survive pruning. `skipped` holds
    what the last `newest` passed over. `warnings` (rank 0) collects lines about what went wrong without
    costing a checkpoint; the caller prints and clears it. `group`: what its collectives run in.
    """

    def __init__(
        self, folder: Path | str, world: World | None = None, keep: int = MIN_KEEP, group: Any = None
    ) -> None:
        if keep < MIN_KEEP:
            raise ConfigError(
                f"run.keep_checkpoints is {keep}",
                f"keep at least {MIN_KEEP}: a damaged newest checkpoint falls back to the one before it",
            )
        self.folder = Path(folder)
        self.world = World.current() if world is None else world
        self.keep = keep
        self._group = group
        self.skipped: list[Skipped] = []
        self.warnings: list[str] = []
        self._verified: dict[str, tuple[tuple[int, int], ...]] = {}
        self._fixed: dict[str, tuple[Any, str, dict[str, Any]]] = {}

    def prepare(self) -> None:
        """Creates the folder, proves that it can be written to, removes what killed saves left behind.

        Called once at the start by the processes that hold the run lock; raises ConfigError.
        """

        def work() -> None:
            try:
                self._create_folder()
                probe = self.folder / f"probe.tmp-{_unique()}"
                files.write_bytes(probe, b"clipkit")
                probe.unlink()
                self._remove_leftovers()
            except OSError as error:
                raise ConfigError(
                    f"checkpoints cannot be written to {self.folder} ({error.strerror or error})",
                    "set run.dir to a folder that this user can write to",
                ) from error

        self._decide(work)

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint whose manifest, sizes and hashes are right, None in a fresh folder.

        What was passed over stands in `skipped`, with its reason. Raises ClipkitError listing
        every reason when there are checkpoints and none of them is intact. Changes nothing on disk.
        """
        checkpoint = self._decide(lambda: newest_in(self.folder))
        self.skipped = [] if checkpoint is None else list(checkpoint.skipped)
        return checkpoint

    def open(self, path: Path | str) -> Checkpoint:
        """Returns the checkpoint in the directory `path` (or the one that a file `latest` names).

        Raises ConfigError when nothing is there, ClipkitError naming the defect when it is not intact.
        """
        return self._decide(lambda: open_path(Path(path)))

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, StateTensors],
        rank_tensors: StateTensors,
        documents: Mapping[str, Mapping[str, Any]],
        identity: Mapping[str, Any],
        fixed: Mapping[str, StateTensors] | None = None,
        rows: Mapping[str, Piece] | None = None,
        fixed_rows: Mapping[str, Piece] | None = None,
    ) -> Path:
        """Writes, commits and prunes; returns the directory, the same on every rank.

        `tensors` (file stem -> name -> tensor), `documents` (file stem -> JSON), `identity` and `fixed`, more
        tensors of those stems that never change in the run and are written once, count on rank 0 only;
        `rank_tensors`, and of sharded tensors `rows` and `fixed_rows` (see `part_rows`), are written by each
        rank. Raises CheckpointWriteError on every rank alike when any of them failed (disk full, I/O error,
        values that are not finite); the failed save leaves nothing.
        """
        main, fixed = self.world.is_main, fixed or {}
        moving, once = rows_of(rows or {}), rows_of(fixed_rows or {})
        size = _size(rank_tensors) + _size(moving) + (0 if self._has_fixed(ROWS, once) else _size(once))
        if main:
            size += sum(_size(state) for state in tensors.values())
            size += sum(_size(state) for stem, state in fixed.items() if not self._has_fixed(stem, state))
        total = sum(self._share(size))
        temporary = self._vote(step, lambda: self._begin(step, total) if main else None)[0]
        assert temporary is not None
        records: Records = {}
        for written in self._vote(
            step,
            lambda: (
                self._write(temporary, tensors, rank_tensors, documents, fixed)
                | self._write_rows(temporary, rows or {}, fixed_rows or {})
            ),
            temporary,
        ):
            records.update(written)
        committed = self._vote(
            step, lambda: self._commit(temporary, step, records, identity) if main else None, temporary
        )[0]
        assert committed is not None
        if main:
            self._after_commit(committed, records)
        return committed

    # ---------------------------------------------------------------- one answer for all ranks

    def _share(self, value: T) -> list[T]:
        return gather_objects(value, self._group) if self.world.size > 1 else [value]

    def _decide(self, work: Callable[[], T]) -> T:
        """Returns on every rank what rank 0's `work` returned, or raises its ClipkitError on every rank."""
        value: T | None = None
        failure: ClipkitError | None = None
        if self.world.is_main:
            try:
                value = work()
            except ClipkitError as error:
                failure = error
            except OSError as error:
                failure = ClipkitError(
                    f"{self.folder} cannot be read: {error}", "check the folder and its disk"
                )
        value, failure = self._share((value, failure))[0]
        if failure is not None:
            raise failure
        return value  # type: ignore[return-value]

    def _vote(self, step: int, work: Callable[[], T], temporary: Path | None = None) -> list[T]:
        """Returns the results of all ranks; one failure anywhere makes every rank raise the same error."""
        value: T | None = None
        failure: str | None = None
        raised: Exception | None = None
        try:
            value = work()
        except Exception as error:
            raised = error
            failure = " ".join(f"{type(error).__name__}: {error}".split())
        outcomes = self._share((value, failure))
        for rank, (_, text) in enumerate(outcomes):
            if text is not None:
                if temporary is not None and self.world.is_main:
                    # What cannot be removed now is a leftover, removed by the next save.
                    shutil.rmtree(temporary, ignore_errors=True)
                raise CheckpointWriteError(
                    f"the checkpoint of step {step} was not saved in {self.folder} (rank {rank}: {text})",
                    "earlier checkpoints are intact; free disk space or repair what the message names",
                ) from raised
        return [result for result, _ in outcomes]  # type: ignore[misc]

    # ---------------------------------------------------------------- the steps of a save

    def _create_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            files.sync_folder(self.folder.parent)

    def _remove_leftovers(self) -> None:
        for path in self.folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _begin(self, step: int, size: int) -> Path:
        self._create_folder()
        self._remove_leftovers()
        free, wanted = shutil.disk_usage(self.folder).free, int(size * FREE_SPACE_FACTOR)
        if free < wanted:
            raise OSError(f"{free / 1e6:.1f} MB are free and {wanted / 1e6:.1f} MB are wanted")
        temporary = self.folder / f"step-{step:08d}.tmp-{_unique()}"
        temporary.mkdir()
        return temporary

    def _write(
        self,
        folder: Path,
        tensors: Mapping[str, StateTensors],
        rank_tensors: StateTensors,
        documents: Mapping[str, Mapping[str, Any]],
        fixed: Mapping[str, StateTensors],
    ) -> Records:
        own = rank_file(self.world.rank)
        records = {own: files.write_tensors(folder / own, rank_tensors)}
        if not self.world.is_main:
            return records
        for stem in (*tensors, *documents, *fixed):
            if not _STEM.fullmatch(stem):
                raise ValueError(f"{stem!r} is no file stem (lower-case letters, digits, _)")
        for stem, state in tensors.items():
            files.refuse_non_finite(state)
            records[f"{stem}.safetensors"] = files.write_tensors(folder / f"{stem}.safetensors", state)
        for stem, document in documents.items():
            records[f"{stem}.json"] = files.write_json(folder / f"{stem}.json", document)
        for stem, state in fixed.items():
            name, record = self._write_fixed(stem, state)
            records[name] = record
        return records

    def _write_rows(self, folder: Path, rows: Mapping[str, Piece], fixed: Mapping[str, Piece]) -> Records:
        """Writes the pieces of sharded tensors that this rank has, and where they belong."""
        if not rows and not fixed:
            return {}
        name, places = rows_file(self.world.rank, "safetensors"), rows_file(self.world.rank, "json")
        files.refuse_non_finite(rows_of(rows))
        records = {name: files.write_tensors(folder / name, rows_of(rows))}
        document = {name: places_of(rows)}
        if fixed:
            once, record = self._write_fixed(ROWS, rows_of(fixed))
            records[once], document[once] = record, places_of(fixed)
        return records | {places: files.write_json(folder / places, document)}

    def _has_fixed(self, stem: str, state: StateTensors) -> bool:
        """Whether this process has written or checked these very tensors already."""
        return stem in self._fixed and self._fixed[stem][0] == _marks(state)

    def _write_fixed(self, stem: str, state: StateTensors) -> tuple[str, dict[str, Any]]:
        """Returns (name relative to a checkpoint, record) of a file of fixed tensors, written if need be."""
        if not self._has_fixed(stem, state):
            files.refuse_non_finite(state)
            name = files.fixed_name(stem, state)
            path = self.folder / Path(name).name
            # What lies there is kept: another version of safetensors may write other bytes, and the
            # checkpoints that name the file know its hash.
            if not files.holds(path, stem):
                temporary = path.with_name(f"{path.name}.tmp-{_unique()}")
                files.write_tensors(temporary, state)
                os.replace(temporary, path)
                files.sync_folder(self.folder)
            self._fixed[stem] = _marks(state), name, files.record_of(path)
        _, name, record = self._fixed[stem]
        return name, record

    def _commit(self, temporary: Path, step: int, records: Records, identity: Mapping[str, Any]) -> Path:
        for name, record in records.items():
            path = temporary / name
            if not path.is_file() or path.stat().st_size != record["bytes"]:
                raise OSError(f"rank 0 does not see {name}: all ranks must share the file system of run.dir")
        files.write_manifest(
            temporary,
            step=step,
            sequence=1 + max((candidate.sequence for candidate in candidates(self.folder)), default=0),
            world_size=self.world.size,
            files=records,
            identity=identity,
        )
        files.sync_folder(temporary)
        final = self.folder / f"step-{step:08d}"
        if final.exists():
            # A directory cannot be replaced atomically: the earlier save of this step steps aside under a
            # name that `newest` still accepts, until its successor is in place.
            os.rename(final, self.folder / f"{final.name}.old-{_unique()}")
        os.rename(temporary, final)
        files.sync_folder(self.folder)
        return final

    def _after_commit(self, committed: Path, records: Records) -> None:
        # The checkpoint stands; nothing that fails from here on may turn it into a failed save.
        try:
            self._remember(committed, records)
            pointer = self.folder / f"{LATEST}.tmp-{_unique()}"
            files.write_bytes(pointer, f"{committed.name}\n".encode())
            os.replace(pointer, self.folder / LATEST)
            files.sync_folder(self.folder)
            self._prune(committed)
        except OSError as error:
            self.warnings.append(f"{committed.name} is saved, but tidying {self.folder} failed: {error}")

    def _prune(self, committed: Path) -> None:
        kept = 1
        for candidate in candidates(self.folder):
            if candidate.path == committed:
                continue
            if kept < self.keep and not candidate.path.name.startswith(f"{committed.name}.old-"):
                kept += self._is_valid(candidate)
                continue
            # Renamed first: a kill inside the removal must not leave half a checkpoint under a good name.
            doomed = self.folder / f"step-{candidate.step:08d}.tmp-{_unique()}"
            os.rename(candidate.path, doomed)
            shutil.rmtree(doomed)

    def _is_valid(self, candidate: Candidate) -> bool:
        """Whether the candidate is intact; what this process wrote or checked is not hashed again."""
        try:
            if candidate.manifest is None:
                raise Defect(candidate.reason)
            records = candidate.manifest["files"]
            if self._verified.get(candidate.path.name) != _fingerprint(candidate.path, records):
                files.check_files(candidate.path, candidate.manifest)
                self._remember(candidate.path, records)
        except (Defect, OSError) as error:
            self.warnings.append(f"{candidate.path.name} is damaged and does not count as kept: {error}")
            return False
        return True

    def _remember(self, path: Path, records: Mapping[str, Any]) -> None:
        self._verified[path.name] = _fingerprint(path, records)


def _unique() -> str:
    return uuid.uuid4().hex[:12]


def _size(tensors: StateTensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _marks(tensors: StateTensors) -> list[tuple[str, int, int]]:
    """What changes when a tensor is replaced, or written to in place."""
    return [(name, x.data_ptr(), x._version) for name, x in tensors.items()]


def _fingerprint(folder: Path, records: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    stats = [(folder / name).stat() for name in sorted((*records, files.MANIFEST))]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
