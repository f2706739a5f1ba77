"""A collection becomes shards: a plan of row ranges, one part per shard, and what describes the whole.

The plan is a function of the input and the options alone, and so are the bytes; the engine, its workers, a
kill and the share that a machine takes change nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import tarfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from clipkit.data.engine import Engine
from clipkit.data.finished import Ended, Finished, beginning, is_whole, storing
from clipkit.data.indexing import RECORDS, Indexing
from clipkit.data.making.collection import Collection, Entry, Images
from clipkit.data.making.images import UNCHANGED, ImageRules
from clipkit.data.making.made import Made
from clipkit.data.making.parts import make_part, survey_part
from clipkit.data.making.samples import Layout
from clipkit.data.shard_folder import (
    SUMMARIES,
    begin_shards,
    refuse_foreign,
    refuse_other_layout,
    shards_in,
)
from clipkit.data.shards import (
    TEMPORARY,
    Progress,
    ShardRecord,
    finish_evaluation_set,
    finish_train_shards,
    shard_name,
)
from clipkit.data.tar_format import BLOCK
from clipkit.redaction import visible
from clipkit.types import DataError

_SURVEY_BLOCK = 1000
_PLAN = "plan"
_REJECTS = "rejects.jsonl"
_TEMPLATES = "zeroshot_classification_templates.txt"
_EVALUATION_TEXTS = ("classnames.txt", _TEMPLATES, "dataset_type.txt", "test/nshards.txt")


@dataclass(frozen=True)
class Making:
    """What shards are made of. Both limits hold when both are given.

    samples_per_shard    at most so many samples
    shard_bytes          at most so many bytes in a shard of more than one sample; needs a look at every image
    rules                what becomes of the images
    max_reject_fraction  more unusable rows than this are an error
    """

    samples_per_shard: int = 10_000
    shard_bytes: int | None = None
    rules: ImageRules = UNCHANGED
    max_reject_fraction: float = 0.01


class MakeJob:
    """The making of one set of shards in `out`: training shards, or the CLIP_benchmark layout.

    templates: prompts of an evaluation set with labels, with {c} or {}.
    """

    def __init__(
        self,
        collection: Collection,
        out: Path,
        making: Making,
        layout: Layout,
        templates: Sequence[str] | None = None,
    ) -> None:
        self.collection, self.out, self.making, self.layout = collection, out, making, layout
        self.templates = None if templates is None else [line.replace("{}", "{c}") for line in templates]
        self.folder = out if layout.train else out / "test"
        self.job: dict[str, Any] = {
            "source": Path(collection.source).name,
            "kind": collection.kind,
            "rows": len(collection),
            "entries": collection.listing.digest,
            "layout": vars(layout) if not layout.train else "train",
            "samples_per_shard": making.samples_per_shard,
            "shard_bytes": making.shard_bytes,
            "images": making.rules.description(),
            "clipkit": importlib.metadata.version("clipkit"),
        }
        self.finished = Finished(self.folder, self._description())
        self._bounds: list[int] | None = None
        self._new_folders: list[Path] = []
        self._replaced: dict[int, tuple[int, int] | None] = {}

    def _description(self) -> dict[str, Any]:
        collection, reading = self.collection, self.collection.reading
        names = collection.classnames if self.layout.num_classes is not None else None
        return {
            "job": "make-shards",
            "options": {
                "to": "train" if self.layout.train else "evaluation",
                "from": collection.kind,
                "images": _place(collection.images),
                "image-key": reading.image_key,
                "caption-key": reading.captions or None,
                "keep": reading.keep or None,
                "split": reading.splits or None,
                "group": reading.group,
                "samples-per-shard": self.making.samples_per_shard,
                "shard-bytes": self.making.shard_bytes,
                **{name.replace("_", "-"): value for name, value in vars(self.making.rules).items()},
            },
            "inputs": [
                [Path(collection.source).name, len(collection), collection.listing.digest],
                ["the class names", *(names or ())],
                ["the templates", *(self.templates or ())],
                ["the version of clipkit or Pillow", self.job["clipkit"], PIL.__version__],
            ],
        }

    def begin(self, overwrite: bool) -> Ended | None:
        """Makes the folder, or continues there; returns what is there already when the job has ended.

        ConfigError when the folder holds shards of something else, or what another command made; DataError
        when an ended job left more rows out than this one bears with.
        """
        self._new_folders = [folder for folder in (self.folder, self.out) if not folder.exists()]
        refuse_other_layout(self.out, self.layout.train)
        refuse_foreign(self.folder)
        ended = self.finished.begin(shards_in([self.folder]), overwrite=overwrite)
        if ended is None:
            with beginning(self.folder):
                begin_shards(self.folder, *SUMMARIES, "nshards.txt")
            return None
        rows = len(self.collection)
        rejected = rows - ended.samples
        if rejected > self.making.max_reject_fraction * rows:
            raise DataError(
                f"{self.out / _REJECTS}: {rejected:,} of {rows:,} rows are unusable",
                "correct them and pass --overwrite, or allow more with --max-reject-fraction",
            )
        return ended

    def bounds(self, engine: Engine, progress: Progress | None = None) -> list[int]:
        """Returns the entry that each shard begins with, and the end."""
        if self._bounds is None:
            total, step = len(self.collection), self.making.samples_per_shard
            if self.making.shard_bytes is None:
                self._bounds = [*range(0, total, step), total]
            else:
                known = self.finished.get(_PLAN)
                self._bounds = self._by_bytes(engine, progress) if known is None else known["bounds"]
                if self.finished.begun:
                    self.finished.put(_PLAN, {"bounds": self._bounds})
        return self._bounds

    def _by_bytes(self, engine: Engine, progress: Progress | None) -> list[int]:
        limit = self.making.shard_bytes
        assert limit is not None
        # An archive ends with two empty blocks and is padded to whole records.
        limit = limit // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * BLOCK
        bounds, samples, used, number = [0], 0, 0, 0
        for sizes, _ in self._survey(engine, progress, sizes=True):
            for size in sizes.tolist():
                if samples and size and (used + size > limit or samples == self.making.samples_per_shard):
                    bounds.append(number)
                    samples = used = 0
                samples += size > 0
                used += size
                number += 1
        return [*bounds, number]

    def _survey(
        self, engine: Engine, progress: Progress | None, sizes: bool
    ) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        parts = (
            (self.layout, self.collection.images, self.making.rules if sizes else UNCHANGED, start, entries)
            for start in range(0, len(self.collection), _SURVEY_BLOCK)
            for entries in [self.collection.part(start, start + _SURVEY_BLOCK)]
        )
        count = None if progress is None else lambda found: progress(len(found[0]))
        return engine.map(survey_part, parts, count)

    def survey(self, engine: Engine, progress: Progress | None = None) -> Made:
        """Returns what would be made: all captions and headers of images are read, nothing is written."""
        found = Made()
        for _, outcome in self._survey(engine, progress, sizes=False):
            found.add(outcome)
        return found

    def run(self, engine: Engine, progress: Progress | None = None, numbers: range | None = None) -> Made:
        """Makes the shards that are not made yet, and what describes the set; returns what was found.

        numbers: make only these shards, and leave the description to a run without them. Raises DataError
        for too many rejects, after removing what was written.
        """
        bounds = self.bounds(engine, progress)
        wanted = range(len(bounds) - 1) if numbers is None else numbers
        made = Made()
        rows = bounds[wanted.stop] - bounds[wanted.start]
        try:
            # Closed before anything is removed: until then workers may still write.
            with (
                storing(self.folder),
                contextlib.closing(self._outcomes(engine, wanted, bounds, made)) as outcomes,
            ):
                for outcome in outcomes:
                    made.add(outcome)
                    if progress is not None:
                        progress(outcome["rows"])
                    made.refuse_too_many(self.collection.source, rows, self.making.max_reject_fraction)
                if numbers is None:
                    self._finish(made, engine)
        except DataError:
            self._withdraw(wanted, whole=numbers is None)
            raise
        return made

    def _outcomes(
        self, engine: Engine, wanted: range, bounds: list[int], made: Made
    ) -> Generator[dict[str, Any], None, None]:
        """Yields the outcome of every wanted shard in order: from its record, or made now."""
        # Numbers alone: a record holds the rejects of its shard, and is read when its turn comes.
        pending = {number for number in wanted if self._known(number) is None}
        made.resumed = len(wanted) - len(pending)
        if self.layout.train:
            (self.folder / RECORDS).mkdir(exist_ok=True)
        fresh = engine.map(make_part, (self._part(number, bounds) for number in sorted(pending)))
        for number in wanted:
            outcome = None if number in pending else self._known(number)
            if outcome is None:
                # What vanished in between is made here.
                outcome = next(fresh) if number in pending else make_part(*self._part(number, bounds))
                self.finished.put(f"{number:05d}", outcome)
            yield outcome

    def _part(
        self, number: int, bounds: list[int]
    ) -> tuple[Path, Layout, Images, ImageRules, int, list[Entry]]:
        """Returns the arguments of `make_part` for a shard, and notes which file it is going to replace."""
        path, first = self.folder / self._name(number), bounds[number]
        self._replaced[number] = _identity(path)
        entries = self.collection.part(first, bounds[number + 1])
        return path, self.layout, self.collection.images, self.making.rules, first, entries

    def _known(self, number: int) -> dict[str, Any] | None:
        outcome = self.finished.get(f"{number:05d}")
        if outcome is None or outcome["record"] is None:
            return None
        whole = is_whole(self.folder / self._name(number), outcome["record"]["bytes"])
        return outcome if whole else None

    def _name(self, number: int) -> str:
        return shard_name(number) if self.layout.train else f"{number}.tar"

    def _finish(self, made: Made, engine: Engine) -> None:
        if made.empty and not self.layout.train:
            raise DataError(
                f"{self.folder}: {made.empty} shards would be empty, and the layout has no gaps",
                "pass a larger --samples-per-shard, or repair the rows",
            )
        self._write_rejects(len(self._bounds or ()) - 1)
        texts = SUMMARIES if self.layout.train else _EVALUATION_TEXTS
        if self.layout.train:
            finish_train_shards(self.out, made.records, self.job)
            paths = [os.path.abspath(self.folder / record.name) for record in made.records]
            Indexing(paths).finish(engine.workers if engine.kind == "processes" else 1)
        else:
            names = self.collection.classnames if self.layout.num_classes is not None else None
            finish_evaluation_set(self.out, made.records, names, self.templates)
        shards = [self.folder / record.name for record in made.records]
        # Sets for retrieval have no names of classes.
        beside = [path for name in (*texts, _REJECTS) if (path := self.out / name).is_file()]
        samples = sum(record.samples for record in made.records)
        self.finished.end([*shards, *beside], samples, [vars(record) for record in made.records])

    def _write_rejects(self, shards: int) -> None:
        """Writes rejects.jsonl, one line per unusable row; empty when there is none."""
        temporary = self.out / f"{_REJECTS}{TEMPORARY}"
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            for number in range(shards):
                for reject in (self.finished.get(f"{number:05d}") or {"rejects": ()})["rejects"]:
                    stream.write(visible(json.dumps(reject, ensure_ascii=False)) + "\n")
        os.replace(temporary, self.out / _REJECTS)

    def _withdraw(self, wanted: Iterable[int], whole: bool) -> None:
        """Removes what this job wrote: with --overwrite, shards of an earlier set lie among the wanted.

        The records of a share stay: those of other machines are among them.
        """
        for number in wanted:
            path = self.folder / self._name(number)
            # Workers are ahead of the records: what they were given is theirs if it is another file now.
            made = number in self._replaced and _identity(path) != self._replaced[number]
            if made or self._known(number) is not None:
                path.unlink(missing_ok=True)
        if not whole:
            return
        self.finished.clear()
        shutil.rmtree(self.folder / RECORDS, ignore_errors=True)
        for folder in dict.fromkeys(self._new_folders):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _place(images: Images) -> str:
    path = getattr(images, "path", None)
    return "" if path is None else os.path.abspath(path)


def make_shards(
    collection: Collection,
    out: Path,
    making: Making | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
) -> list[ShardRecord]:
    """Writes a collection as training shards with sizes.json, manifest.json, rejects.jsonl and the index.

    Returns one record per shard. A run that was killed continues after its finished shards, and one that has
    ended makes nothing. ConfigError when `out` holds other shards, DataError for too many unusable rows.
    """
    job = MakeJob(collection, out, making or Making(), Layout())
    return _records(job, engine or Engine(), progress, overwrite)


def make_evaluation_set(
    collection: Collection,
    out: Path,
    making: Making | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
    *,
    templates: Sequence[str] | None = None,
    overwrite: bool = False,
) -> list[ShardRecord]:
    """Writes a collection in CLIP_benchmark layout: by its labels where it has some, else by its captions.

    templates: of the zero-shot prompts, with {c}. Otherwise as `make_shards`.
    """
    names = collection.classnames
    layout = Layout(train=False, num_classes=None if names is None else len(names))
    job = MakeJob(collection, out, making or Making(max_reject_fraction=0.0), layout, templates)
    return _records(job, engine or Engine(), progress, overwrite)


def _records(job: MakeJob, engine: Engine, progress: Progress | None, overwrite: bool) -> list[ShardRecord]:
    ended = job.begin(overwrite)
    if ended is None:
        return job.run(engine, progress).records
    return [ShardRecord(**record) for record in ended.result]
