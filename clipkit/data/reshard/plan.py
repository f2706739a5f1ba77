"""The plan of the outputs: all kept samples in files, and the positions where each output shard begins."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.key_table import KeyTable
from clipkit.data.order import hash_key, permuted
from clipkit.data.preflight import fields_in, nearest_field
from clipkit.data.query import Seen
from clipkit.data.reshard.job import SIDES, Reshard, read_job
from clipkit.data.reshard.named import Keyed, found_path, without_sample
from clipkit.data.reshard.select import FIELDS, ROW, SUBSET, Rows, choices_path, fields_stem, subset_stem
from clipkit.data.tar_index import replacing
from clipkit.data.uid_subset import UidSubset
from clipkit.types import DataError

_BLOCK = 1 << 18  # rows in memory at a time
_HASHES = 1 << 23  # hashes sorted at a time: 64 MB
PLAN = "plan"
_NOWHERE = "where: fields that were looked up and never found"
_UNFIT = "where: comparisons that no values fitted"
_CURE = "correct what chooses samples; of a split, give larger shares or smaller groups"


@dataclass(frozen=True)
class Part:
    """One output shard: its number within its side, and the positions [begin, end) of that side it holds."""

    side: int
    number: int
    begin: int
    end: int


@dataclass(frozen=True)
class Plan:
    """What every output shard holds. The arrays lie in files of `folder` and are mapped.

    cuts     per side, the positions where its shards begin, and its number of samples
    counts   what was counted while the input was walked; examples: the first of what has a name
    """

    folder: Path
    job: Reshard
    cuts: tuple[tuple[int, ...], ...]
    counts: dict[str, int]
    examples: dict[str, tuple[str, ...]]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All output shards, side after side."""
        return tuple(
            Part(side, number, begin, end)
            for side, cuts in enumerate(self.cuts)
            for number, (begin, end) in enumerate(pairwise(cuts))
        )

    def rows(self, side: int, begin: int, end: int) -> Rows:
        """Returns the samples at positions begin..end of a side, in their order."""
        order = np.arange(begin, end)
        if self.job.seed is not None:
            order = permuted(self.cuts[side][-1], _shuffle_key(self.job.seed, side), order)
        return np.array(self._rows[side][order])

    def repeated(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Returns which of these key hashes several input samples share."""
        at = np.searchsorted(self._repeated, hashes)
        found: NDArray[np.bool_] = at < len(self._repeated)
        found[found] = self._repeated[at[found]] == hashes[found]
        return found

    @cached_property
    def _rows(self) -> list[Rows]:
        return [np.memmap(_rows_path(self.folder, side), ROW, mode="r") for side in range(len(self.cuts))]

    @cached_property
    def _repeated(self) -> NDArray[np.uint64]:
        path = _repeated_path(self.folder)
        if not path.stat().st_size:
            return np.zeros(0, np.uint64)
        return np.memmap(path, "<u8", mode="r")


@lru_cache(1)
def read_plan(folder: Path) -> Plan:
    """Returns the plan that lies in `folder`, once per process."""
    return plan_of(read_job(folder), folder, json.loads((folder / f"{PLAN}.json").read_bytes()))


def plan_of(job: Reshard, folder: Path, record: Mapping[str, Any]) -> Plan:
    """Returns the plan that a record describes."""
    examples = {name: tuple(keys) for name, keys in record["examples"].items()}
    return Plan(folder, job, tuple(map(tuple, record["cuts"])), record["counts"], examples)


def make_plan(job: Reshard, folder: Path, walked: Sequence[dict[str, dict[str, Any]]]) -> Plan:
    """Returns the plan, from the choices of all input shards, which lie in `folder`; walked: of each shard
    what `choose` returned. Raises DataError when a side would be empty.
    """
    total: Counter[str] = Counter()
    seen = Seen()
    for each in walked:
        total.update(each["counts"])
        seen.add(Seen(**each["seen"]))
    examples = _count_unnamed(job, folder, len(walked), total)
    for name, parts in ((_NOWHERE, seen.fields), (_UNFIT, seen.comparisons)):
        examples[name] = tuple(part for part, known in parts.items() if not known)
        total[name] = len(examples[name])
    if job.group is not None and 0 < total["kept"] == total["without a group"]:
        raise DataError(
            f"none of {total['kept']:,} samples has {job.group}",
            "name the field with --group, as json.NAME; leave it out to split sample by sample",
        )
    lengths = _gather(job, folder, len(walked))
    for name, length in zip(SIDES, lengths, strict=False):
        if not length:
            cure = _cure(job, examples) if not total["kept"] else _CURE
            raise DataError(_nothing_left(total, name if job.split else "", examples), cure)
    repeated = 0
    with replacing(_repeated_path(folder)) as out:
        by_key = _chosen_by_key(job, folder)
        for hashes in [] if job.rekey and not by_key else _repeated_hashes(folder, lengths):
            out.write(hashes.astype("<u8").tobytes())
            repeated += len(hashes)
    total["keys used more than once"] = 0 if job.rekey else repeated
    if by_key:
        total["keys of the subset that several samples have"] = repeated
    plan = Plan(folder, job, tuple((0, length) for length in lengths), dict(total), examples)
    cuts = tuple(tuple(_cuts(plan, side, length)) for side, length in enumerate(lengths))
    return Plan(folder, job, cuts, dict(total), examples)


def _count_unnamed(
    job: Reshard, folder: Path, inputs: int, total: Counter[str]
) -> dict[str, tuple[str, ...]]:
    """Counts the keys of lists and tables that name no sample; returns the first of them by what they are
    counted as. DataError where none of them names one.
    """
    given: list[tuple[str, Path, Keyed, str]] = []
    if job.subset is not None:
        keys = UidSubset(job.subset) if job.uids else KeyTable(subset_stem(folder))
        given.append((SUBSET, job.subset, keys, "keys of the subset that name no sample"))
    if job.fields is not None:
        of = " of the subset" if job.subset_table is not None else ""
        given.append(
            (FIELDS, job.fields, KeyTable(fields_stem(folder)), f"keys of the table that name no sample{of}")
        )
    examples = {}
    for kind, path, table, name in given:
        found = (found_path(folder, kind, number) for number in range(inputs))
        total[name], examples[name] = without_sample(table, found)
        if total[name] == len(table) and total["samples read"]:
            raise DataError(
                f"{path}: no key of it is that of a sample (first: {', '.join(examples[name])}; "
                f"{total['samples read']:,} samples)",
                "name its key column with --key, and the field of the samples it means with --match",
            )
    return examples


def _chosen_by_key(job: Reshard, folder: Path) -> bool:
    """Whether samples were chosen by their keys alone, which then should be different."""
    chosen = job.subset_table is not None and job.match is None
    return chosen and not KeyTable(subset_stem(folder)).by_shard


def remove_choices(folder: Path, inputs: int) -> None:
    """Removes the choices that a recorded plan was made from, and what was found."""
    for number in range(inputs):
        choices_path(folder, number).unlink(missing_ok=True)
        for kind in (SUBSET, FIELDS):
            found_path(folder, kind, number).unlink(missing_ok=True)


def _gather(job: Reshard, folder: Path, inputs: int) -> list[int]:
    """Writes the rows of every side into one file each, in the order of the input; returns their numbers."""
    lengths = []
    for side in range(len(job.folders)):
        length = 0
        with replacing(_rows_path(folder, side)) as out:
            for number in range(inputs):
                choices = np.load(choices_path(folder, number), allow_pickle=False)
                rows = choices[list(ROW.names or ())][choices["side"] == side].astype(ROW)
                out.write(rows.tobytes())
                length += len(rows)
        lengths.append(length)
    return lengths


def _repeated_hashes(folder: Path, lengths: Sequence[int]) -> Iterator[NDArray[np.uint64]]:
    """Yields, ascending, the hashes of keys that several samples share: one range at a time."""
    passes = max(1, -(-sum(lengths) // _HASHES))
    bounds = [(1 << 64) * number // passes for number in range(passes + 1)]
    for low, high in pairwise(bounds):
        held = []
        for side in range(len(lengths)):
            with _rows_path(folder, side).open("rb") as file:
                while len(rows := np.fromfile(file, ROW, _BLOCK)):
                    hashes = rows["hash"][rows["copy"] == 0]
                    held.append(hashes[(hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1))])
        values, times = np.unique(np.concatenate(held), return_counts=True)
        yield values[times > 1]


def _cuts(plan: Plan, side: int, length: int) -> Iterator[int]:
    """Yields the positions where shards begin, and the length."""
    most, limit = plan.job.samples_per_shard, plan.job.shard_bytes
    if limit is None:
        yield from range(0, length, most)
    else:
        held = most
        total = 0
        for begin in range(0, length, _BLOCK):
            sizes = plan.rows(side, begin, min(begin + _BLOCK, length))["size"].tolist()
            for position, size in enumerate(sizes, begin):
                if held == most or total + size > limit:
                    yield position
                    held = total = 0
                held += 1
                total += size
    yield length


def _shuffle_key(seed: int, side: int) -> int:
    return hash_key(seed, "reshard", side)


def _rows_path(folder: Path, side: int) -> Path:
    return folder / f"rows-{side}"


def _repeated_path(folder: Path) -> Path:
    return folder / "repeated"


def _cure(job: Reshard, examples: Mapping[str, tuple[str, ...]]) -> str:
    """What to do when no sample is left."""
    if nowhere := examples[_NOWHERE]:
        table = job.fields_table
        joined = () if table is None or job.as_text else table.resolved().columns or ()
        near = nearest_field(nowhere[0], {*fields_in(job.shards), *(f"json.{name}" for name in joined)})
        return f"did you mean {near}?" if near else f"name fields that there are in --where, not {nowhere[0]}"
    if examples[_UNFIT]:
        return "compare numbers with numbers and text with text in --where: 7 is a number, '7' is text"
    return _CURE


def _nothing_left(counts: Counter[str], side: str, examples: Mapping[str, tuple[str, ...]]) -> str:
    reasons = ", ".join(
        f"{count:,} {name}" + (f": {'; '.join(examples[name])}" if examples.get(name) else "")
        for name, count in sorted(counts.items())
        if count and name not in ("samples read", "kept")
    )
    where = f"the side {side!r} holds no sample" if side and counts["kept"] else "no sample is left"
    return f"{where} of {counts['samples read']:,}" + (f" ({reasons})" if reasons else "")
