"""From verdicts to outputs: copied shards or a list of keys, what was dropped and why, and the counts."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clipkit.data.curation.survey import OnPart, Rows, Survey, key_of
from clipkit.data.curation.tables import (
    FORMATS,
    check_format,
    shard_labels,
    write_uids,
    written_lines,
    written_table,
)
from clipkit.data.engine import Engine
from clipkit.data.fingerprints import path_input, shard_inputs
from clipkit.data.finished import Finished, is_whole, storing
from clipkit.data.shard_folder import SUMMARIES, begin_shards, refuse_foreign, refuse_source, shards_in
from clipkit.data.shards import (
    ShardRecord,
    finish_train_shards,
    shard_name,
    write_copied_shard,
    write_text,
)
from clipkit.data.source import is_remote
from clipkit.data.walked import walked_samples
from clipkit.types import ConfigError, DataError

UNUSABLE = "unusable"


class Verdicts(Protocol):
    """Which rules every sample of a shard breaks; bit i stands for `rules[i]`, the last one is UNUSABLE."""

    @property
    def rules(self) -> tuple[str, ...]: ...
    def bits(self, number: int) -> NDArray[np.uint16]:
        """Returns the broken rules of the samples of shard `number`."""
        ...

    def details(self, number: int, dropped: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Returns what the list of dropped samples says besides, for these samples of shard `number`."""
        ...


@dataclass(frozen=True)
class Target:
    """Where the outputs go: shards into a folder, or the kept keys into one file, or both."""

    out: Path | None
    keys_out: Path | None

    def check(
        self, shards: Sequence[str], inputs: Sequence[Path] = (), scores_out: Path | None = None
    ) -> None:
        """Raises ConfigError for targets that are missing, unknown, or the source itself.

        inputs: other files that the job reads; scores_out: a further file that it writes.
        """
        if self.out is None and self.keys_out is None:
            raise ConfigError(
                "no output is named", "pass --out DIR for shards, or --keys-out FILE for a list"
            )
        if self.keys_out is not None:
            check_format(self.keys_out, FORMATS, "--keys-out")
            if self.keys_out.is_dir():
                raise ConfigError(f"--keys-out {self.keys_out} is a folder", "name a file")
        for option, output in (("--keys-out", self.keys_out), ("--scores-out", scores_out)):
            if output is None:
                continue
            for path in (*map(str, inputs), *(shard for shard in shards if not is_remote(shard))):
                if os.path.realpath(path) == os.path.realpath(output):
                    raise ConfigError(f"{option} {output} is read by this job", "name another file")
        if self.keys_out and scores_out and os.path.realpath(self.keys_out) == os.path.realpath(scores_out):
            raise ConfigError(f"--keys-out and --scores-out both name {scores_out}", "name two files")
        if self.out is not None:
            refuse_source([self.out], shards)

    @property
    def held(self) -> Iterator[Path]:
        """What lies at the target, of whichever job."""
        if self.out is not None:
            yield from shards_in([self.out])
        if self.keys_out is not None and self.keys_out.exists():
            yield self.keys_out

    @property
    def folder(self) -> Path:
        """The folder of the records."""
        if self.out is not None:
            return self.out
        assert self.keys_out is not None
        return self.keys_out.with_name(f".{self.keys_out.name}.job")

    def beside(self, name: str) -> Path:
        """Returns the path of a further output: in the folder of the shards, or beside the list of keys."""
        if self.out is not None:
            return self.out / name
        assert self.keys_out is not None
        return self.keys_out.with_name(f"{self.keys_out.name}.{name}")


@contextmanager
def working(
    target: Target,
    shards: Sequence[str],
    job: str,
    options: Mapping[str, Any],
    *,
    inputs: Sequence[Path] = (),
    facts: Sequence[Sequence[Any]] = (),
    scores_out: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Iterator[Survey]:
    """Yields the survey of a job; its records lie at the target, those of a dry run in a temporary folder.

    options: of the job, by their names on the command line. inputs: files and folders that are read besides
    the shards; facts: [name, facts...] of what is no file; scores_out: a file that is written besides the
    target. ConfigError when an output holds something else, or cannot be written.
    """
    target.check(shards, inputs, scores_out)
    both = None if target.out is None or target.keys_out is None else os.path.abspath(target.keys_out)
    description = {
        "job": job,
        "options": json.loads(json.dumps({**options, "keys-out": both}, default=str)),
        "inputs": [*shard_inputs(shards), *map(path_input, inputs), *facts],
    }
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="clipkit-") as folder, storing(Path(folder), continues=False):
            yield Survey(tuple(shards), Finished(Path(folder), description))
        return
    if target.out is not None:
        refuse_foreign(target.out)
    scores = () if scores_out is None or not scores_out.exists() else (scores_out,)
    work = Finished(target.folder, description)
    ended = work.begin((*target.held, *scores), overwrite=overwrite)
    try:
        with storing(target.folder):
            yield Survey(tuple(shards), work, ended)
    except BaseException:
        if work.empty:
            work.clear()
        raise


@dataclass(frozen=True)
class Summary:
    """What a job removed. rules: name -> (samples that break it, samples that break only it)."""

    samples: int
    kept: int
    rules: Mapping[str, tuple[int, int]]
    reasons: Mapping[str, int]

    def document(self) -> dict[str, Any]:
        """Returns the summary for a JSON file."""
        return {
            "samples": self.samples,
            "kept": self.kept,
            "rules": {name: {"removed": of, "only": alone} for name, (of, alone) in self.rules.items()},
            "reasons": dict(self.reasons),
        }


def summarize(survey: Survey, kind: str, verdicts: Verdicts) -> Summary:
    """Returns the counts over all shards."""
    rules = verdicts.rules
    broken = np.zeros((len(rules), 2), dtype=np.int64)
    samples = kept = 0
    reasons: Counter[str] = Counter()
    for number in range(len(survey.shards)):
        bits = verdicts.bits(number)
        samples += len(bits)
        kept += int((bits == 0).sum())
        for at in range(len(rules)):
            broken[at] += (int((bits >> at & 1).sum()), int((bits == 1 << at).sum()))
        stored = survey.rows(kind, number)["reason"]
        reasons.update(reason.decode() for reason in stored[stored != b""].tolist())
    counts = {rule: (int(of), int(alone)) for rule, (of, alone) in zip(rules, broken, strict=True)}
    return Summary(samples, kept, counts, dict(reasons.most_common()))


def write_selection(
    survey: Survey,
    kind: str,
    verdicts: Verdicts,
    summary: Summary,
    target: Target,
    engine: Engine,
    progress: OnPart | None = None,
    more: Mapping[str, Any] | None = None,
    beside: Sequence[Path] = (),
) -> list[ShardRecord]:
    """Writes what the target asks for, the list of dropped samples and the summary with `more`, and ends the
    job. Returns the records of the shards. DataError when nothing is left.

    beside: what the job has written already.
    """
    if not summary.samples:
        survey.work.clear()
        raise DataError(
            f"no sample in {len(survey.shards):,} shard(s), first {survey.shards[0]}",
            "give shards that hold samples",
        )
    outputs = [*beside, target.beside("dropped.jsonl"), target.beside("summary.json")]
    write_dropped(survey, kind, verdicts, target.beside("dropped.jsonl"))
    document = json.dumps({**summary.document(), **(more or {})}, indent=1, ensure_ascii=False)
    write_text(target.beside("summary.json"), document + "\n")
    if not summary.kept:
        survey.work.clear()
        dropped = target.beside("dropped.jsonl")
        if summary.rules[UNUSABLE][0] == summary.samples:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.reasons.items())
            raise DataError(
                f"none of {summary.samples:,} samples can be used ({reasons})",
                f"bring back what they lack, or name another --caption; {dropped} lists them",
            )
        raise DataError(
            f"none of {summary.samples:,} samples is left",
            f"loosen the rules; {dropped} names those that each sample breaks",
        )
    if target.keys_out is not None:
        write_keys(survey, kind, verdicts, target.keys_out)
        outputs.append(target.keys_out)
    records = []
    if target.out is not None:
        records = copy_kept(survey, verdicts, target.out, engine, progress)
        outputs += [target.out / name for name in (*SUMMARIES, *(record.name for record in records))]
    survey.work.end(outputs, summary.kept)
    return records


def write_dropped(survey: Survey, kind: str, verdicts: Verdicts, path: Path) -> None:
    """Writes one line per dropped sample: shard, key, broken rules, and what is known besides."""
    labels = shard_labels(survey.shards)
    with written_lines(path) as write:
        for number, label in enumerate(labels):
            bits, rows = verdicts.bits(number), survey.rows(kind, number)
            dropped = np.flatnonzero(bits)
            for row, more in zip(dropped.tolist(), verdicts.details(number, dropped), strict=True):
                names = [rule for at, rule in enumerate(verdicts.rules) if bits[row] >> at & 1]
                line = {"shard": label, "key": key_of(rows["key"][row]), "rules": names, **more}
                if rows["reason"][row]:
                    line["reason"] = rows["reason"][row].decode()
                write(line)


def write_keys(survey: Survey, kind: str, verdicts: Verdicts, path: Path) -> None:
    """Writes the kept samples: columns shard and key, or as .npy DataComp's sorted uids."""
    numbers = range(len(survey.shards))
    kept = ((number, survey.rows(kind, number)[verdicts.bits(number) == 0]) for number in numbers)
    if path.suffix == ".npy":
        total = sum(int((verdicts.bits(number) == 0).sum()) for number in numbers)
        folder = survey.work.place("buckets").parent
        write_uids(path, (np.asarray(rows["uid"]) for _, rows in kept), total, folder)
        return
    labels = shard_labels(survey.shards)
    with written_table(path) as write:
        for number, rows in kept:
            keys = [key_of(key) for key in rows["key"].tolist()]
            write({"shard": [labels[number]] * len(keys), "key": keys})


def copy_kept(
    survey: Survey, verdicts: Verdicts, out: Path, engine: Engine, progress: OnPart | None = None
) -> list[ShardRecord]:
    """Writes the kept samples of every shard that has some as out/00000.tar, ..., members unchanged.

    Returns their records. Shards that are there already are not written again.
    """

    def parts() -> Iterator[tuple[int, str, NDArray[np.bool_]]]:
        for number, shard in enumerate(survey.shards):
            keep = verdicts.bits(number) == 0
            if keep.any():
                yield number, shard, keep

    return write_parts(
        survey.work, out, ((shard, keep) for _, shard, keep in parts()), copy_shard, engine, progress
    )


def write_parts(
    work: Finished,
    out: Path,
    parts: Iterator[tuple[Any, ...]],
    function: Callable[..., ShardRecord],
    engine: Engine,
    progress: OnPart | None = None,
) -> list[ShardRecord]:
    """Writes shard i by function(path, *part i), unless its record is there, and the manifest at the end."""
    begin_shards(out, *SUMMARIES)
    known: dict[str, ShardRecord] = {}
    order: list[str] = []

    def pending() -> Iterator[tuple[Any, ...]]:
        for number, part in enumerate(parts):
            name = shard_name(number)
            order.append(name)
            record = work.get(name)
            if record is None or not is_whole(out / name, record["bytes"]):
                yield out / name, *part
            else:
                known[name] = ShardRecord(**record)

    for done, record in enumerate(engine.map(function, pending()), 1):
        work.put(record.name, vars(record))
        known[record.name] = record
        if progress is not None:
            progress("shards", done, len(order))
    return finish_train_shards(out, [known[name] for name in order])


def copy_shard(path: Path, shard: str, keep: NDArray[np.bool_]) -> ShardRecord:
    """Writes the samples of a shard that `keep` names, every member as it is."""

    def members() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        passed = 0
        for passed, sample in enumerate(walked_samples(shard), 1):
            if passed <= len(keep) and keep[passed - 1]:
                yield sample.key, {name: sample.chunk[a:b] for name, (a, b) in sample.members.items()}
        if passed != len(keep):
            raise DataError(
                f"{shard}: {passed} samples instead of {len(keep)}: it changed while it was read",
                "start the same command again when it is at rest",
            )

    return write_copied_shard(path, members())


def unusable_rows(rows: Rows) -> NDArray[np.bool_]:
    """Returns which samples have a reason not to be used, bool (n,)."""
    return np.asarray(rows["reason"] != b"")
