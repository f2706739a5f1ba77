"""What a reshard is asked to do, and everything its bytes depend on."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.data.fingerprints import shard_inputs
from clipkit.data.key_table import TableSpec
from clipkit.data.query import Path as FieldPath
from clipkit.data.query import Query, field_path
from clipkit.data.shard_folder import refuse_source
from clipkit.data.source import is_remote, plain_shards
from clipkit.data.tar_index import replacing
from clipkit.types import ConfigError

SIDES = ("train", "validation", "test")
NPY = ".npy"
UID = ("json", "uid")


@dataclass(frozen=True)
class Reshard:
    """What to do with the samples of `shards`, in the order they are given.

    out                the folder; with `split` its folders train, validation and test
    samples_per_shard  of the output, at most
    shard_bytes        of a shard, at most (as the samples take in the input), None: no limit
    seed               of the shuffle over all samples; None: the order of the input
    subset             a DataComp .npy of uids, or a table of keys, with a column `shard` of those shards
    where              a condition over the fields (data.query)
    fields             a table whose columns go into KEY.json
    key                the key column of both tables; None: `key`, else `uid`
    columns            of `fields`, None: all others
    match              the sample's field that keys of tables mean; None: its key (of uids json.uid first)
    as_text            the one column replaces KEY.txt
    split              shares of two or three sides
    group              the field whose samples stay on one side; None: every sample is its own group
    rekey              keys become positions in the output
    """

    shards: tuple[str, ...]
    out: Path
    samples_per_shard: int = 10_000
    shard_bytes: int | None = None
    seed: int | None = 0
    subset: Path | None = None
    where: str | None = None
    fields: Path | None = None
    key: str | None = None
    columns: tuple[str, ...] | None = None
    match: str | None = None
    as_text: bool = False
    split: tuple[float, ...] = ()
    group: str | None = None
    rekey: bool = False

    def __post_init__(self) -> None:
        if self.where is not None:
            Query(self.where)
        for field in (self.match, self.group):
            if field is not None:
                field_path(field)

    @property
    def query(self) -> Query | None:
        return None if self.where is None else Query(self.where)

    @property
    def match_path(self) -> FieldPath:
        return ("key",) if self.match is None else field_path(self.match)

    @property
    def group_path(self) -> FieldPath:
        return ("key",) if self.group is None else field_path(self.group)

    @property
    def uids(self) -> bool:
        """Whether the subset is one of uids."""
        return self.subset is not None and self.subset.suffix.lower() == NPY

    @property
    def subset_table(self) -> TableSpec | None:
        if self.subset is None or self.uids:
            return None
        return TableSpec(self.subset, self.key, (), by_shard=self.match is None)

    @property
    def fields_table(self) -> TableSpec | None:
        return None if self.fields is None else TableSpec(self.fields, self.key, self.columns)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the shards go, one folder per side."""
        return tuple(self.out / name for name in SIDES[: len(self.split)]) or (self.out,)

    def check(self) -> None:
        """Raises ConfigError or DataError for what cannot be done, before anything is read at length."""
        if self.split and (
            len(self.split) not in (2, 3)
            or not all(0 < share < 1 for share in self.split)
            or not math.isclose(sum(self.split), 1, abs_tol=1e-6)
        ):
            raise ConfigError(
                f"--split {'/'.join(map(str, self.split))} is no division of the whole",
                "give two or three shares that add up to 1: 0.95/0.05",
            )
        if self.group is not None and not self.split:
            raise ConfigError("--group without --split", "add --split 0.95/0.05")
        if self.fields is None and (self.columns is not None or self.as_text):
            raise ConfigError("--columns and --as need a table", "name it with --add-fields")
        if self.key is not None and self.fields is None and (self.subset is None or self.uids):
            raise ConfigError("--key without a table", "name the table with --add-fields or --subset")
        if self.match is not None and self.fields is None and self.subset is None:
            raise ConfigError("--match without a table", "name the table with --add-fields or --subset")
        for path in (self.subset, self.fields):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path}: no such file", "correct --subset or --add-fields")
        if self.fields_table is not None:
            columns = self.fields_table.resolved().columns or ()
            if not columns:
                raise ConfigError(
                    f"{self.fields}: no column besides the key", "give a table with more columns"
                )
            if self.as_text and len(columns) != 1:
                raise ConfigError(
                    f"--as txt takes one column, not {len(columns)}", "choose it with --columns caption"
                )
        if self.subset_table is not None:
            self.subset_table.resolved()
        refuse_source(self.folders, self.shards)

    def description(self) -> dict[str, Any]:
        """Returns what the bytes of the output depend on, JSON-able."""
        tables = [path for path in (self.subset, self.fields) if path is not None]
        options = {_OPTIONS[name]: value for name, value in vars(self).items() if name in _OPTIONS}
        options["as"] = "txt" if self.as_text else "json"
        for name, path in (("subset", self.subset), ("add-fields", self.fields)):
            options[name] = path and os.path.abspath(path)
        return {
            "job": "reshard",
            "options": options,
            "inputs": shard_inputs([*self.shards, *map(str, tables)]),
        }


# Fields that the bytes depend on, and their options.
_OPTIONS = {
    "samples_per_shard": "samples-per-shard", "shard_bytes": "shard-bytes", "seed": "shuffle-seed",
    "where": "where", "key": "key", "columns": "columns", "match": "match", "as_text": "as",
    "split": "split", "group": "group", "rekey": "rekey",
}  # fmt: skip
_PATHS = ("out", "subset", "fields")
_JOB = "job.json"


def write_job(job: Reshard, folder: Path) -> None:
    """Writes the job where its parts find it, with absolute paths: a list of shards can be long."""
    values = {name: value for name, value in vars(job).items() if name in _OPTIONS}
    paths = {name: os.path.abspath(path) for name in _PATHS if (path := getattr(job, name)) is not None}
    values |= {**paths, "shards": [os.path.abspath(shard) for shard in job.shards]}
    with replacing(folder / _JOB) as out:
        out.write(json.dumps(values).encode())


def read_job(folder: Path) -> Reshard:
    """Returns the job that was written to `folder`."""
    values = json.loads((folder / _JOB).read_bytes())
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    paths = {name: Path(values[name]) for name in _PATHS if name in values}
    return Reshard(**{**values, **lists, **paths})


def input_shards(specs: list[str]) -> tuple[str, ...]:
    """Returns the shards that SHARDS mean; ConfigError for those that cannot be read at random."""
    shards = plain_shards(specs)
    distant = next((shard for shard in shards if is_remote(shard)), None)
    if distant is not None:
        raise ConfigError(f"{distant}: samples are read at random, from this machine", "copy it first")
    return tuple(shards)
