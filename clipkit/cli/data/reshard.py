"""`clipkit data reshard`: shards from shards."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.data.options import (
    DryRunOption,
    EndOption,
    EngineName,
    EngineOption,
    OutOption,
    OverwriteOption,
    ShardsArgument,
    StartOption,
    WorkersOption,
    byte_count,
    engine_of,
    share,
)
from clipkit.cli.output import StageProgress, say, size, table
from clipkit.types import ConfigError

if TYPE_CHECKING:
    from clipkit.data.reshard import Plan, Reshard, Written


class Target(StrEnum):
    """Where new columns go."""

    json = "json"
    txt = "txt"


SamplesOption = Annotated[
    int, typer.Option("--samples-per-shard", min=1, help="Samples of a shard, at most.")
]
BytesOption = Annotated[
    str | None, typer.Option("--shard-bytes", help="Bytes of a shard, at most: 500MB, 1GiB.", metavar="SIZE")
]
SeedOption = Annotated[int, typer.Option("--shuffle-seed", help="Seed of the shuffle over all samples.")]
ShuffleOption = Annotated[
    bool, typer.Option("--shuffle/--no-shuffle", help="A new order of all samples, or that of the input.")
]
SubsetOption = Annotated[
    Path | None,
    typer.Option(
        help="Keep these: a DataComp .npy of uids, or a table of keys (a column shard: of which shard).",
        metavar="FILE",
    ),
]
WhereOption = Annotated[
    str | None,
    typer.Option(help="Keep what this holds for: 'json.similarity >= 0.3 and \"dog\" in lower(txt)'."),
]
FieldsOption = Annotated[
    Path | None,
    typer.Option(
        "--add-fields", help="Add the columns of this .csv, .tsv or .parquet to KEY.json.", metavar="TABLE"
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(help="Column of the tables that holds the keys; else key, then uid.", metavar="COLUMN"),
]
ColumnsOption = Annotated[
    str | None, typer.Option(help="Columns to add, with commas between; else all.", metavar="A,B")
]
MatchOption = Annotated[
    str | None,
    typer.Option(
        help="Field of the samples that the keys mean, such as json.uid; else their key.", metavar="FIELD"
    ),
]
AsOption = Annotated[
    Target, typer.Option("--as", help="Columns as fields of KEY.json, or one as caption KEY.txt.")
]
SplitOption = Annotated[
    str | None,
    typer.Option(help="Shares of DIR/train, DIR/validation (and DIR/test): 0.95/0.05.", metavar="A/B"),
]
GroupOption = Annotated[
    str | None,
    typer.Option(help="Field whose samples stay on one side, such as json.product_id.", metavar="FIELD"),
]
RekeyOption = Annotated[
    bool, typer.Option("--rekey", help="Keys 000000000, 000000001, ... in the new order.")
]


def reshard(
    shards: ShardsArgument,
    out: OutOption,
    samples_per_shard: SamplesOption = 10_000,
    shard_bytes: BytesOption = None,
    shuffle_seed: SeedOption = 0,
    shuffle: ShuffleOption = True,
    subset: SubsetOption = None,
    where: WhereOption = None,
    add_fields: FieldsOption = None,
    key: KeyOption = None,
    columns: ColumnsOption = None,
    match: MatchOption = None,
    as_: AsOption = Target.json,
    split: SplitOption = None,
    group: GroupOption = None,
    rekey: RekeyOption = False,
    overwrite: OverwriteOption = False,
    workers: WorkersOption = 1,
    engine: EngineOption = EngineName.processes,
    start: StartOption = 0,
    end: EndOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Shuffle, merge, split, choose from and add to shards; write new ones.

    All samples, of shards on this machine, are shuffled at once, in little memory. Images and other members
    keep their bytes. The same command continues after an interruption and gives the same bytes for any
    --workers and --engine. With --start and --end machines share the output shards; the full command puts
    them together.

    Example: clipkit data reshard laion/ more/ --out mixed/ --where 'json.similarity >= 0.3' --workers 8
    """
    from clipkit.data.reshard import Reshard, input_shards

    job = Reshard(
        input_shards(shards),
        out,
        samples_per_shard,
        byte_count(shard_bytes),
        shuffle_seed if shuffle else None,
        subset,
        where,
        add_fields,
        key,
        None if columns is None else tuple(columns.split(",")),
        match,
        as_ is Target.txt,
        () if split is None else _shares(split),
        group,
        rekey,
    )
    _run(job, workers, engine, (start, end), overwrite, dry_run)


def _run(
    job: Reshard,
    workers: int,
    engine: EngineName,
    part: tuple[int, int | None],
    overwrite: bool,
    dry_run: bool,
) -> None:
    from clipkit.data.reshard import Resharding

    with StageProgress() as progress:
        work = Resharding(job, engine_of(workers, engine), progress, dry_run=dry_run)
        with work:
            ended = work.begin(overwrite)
            if ended is not None:
                say(ended.line(job.out))
                return
            plan = work.plan()
            numbers = share(*part, len(plan.parts), "output shards")
            if dry_run:
                _show_plan(plan)
                return
            counts = {**plan.counts, **work.write(plan, numbers)}
            # Not by the last share: two could be the last at the same time.
            written = work.finish(plan) if len(numbers) == len(plan.parts) else None
    say(*_counted(counts, plan.examples))
    if written is None:
        say(
            f"output shards {numbers.start} to {numbers.stop - 1} of {len(plan.parts):,} are written; "
            "without --start and --end the same command puts them together"
        )
    else:
        _show(written)


def _show_plan(plan: Plan) -> None:
    rows = [["samples", "shards", "folder"]]
    for folder, cuts in zip(plan.job.folders, plan.cuts, strict=True):
        rows.append([f"{cuts[-1]:,}", f"{len(cuts) - 1:,}", str(folder)])
    say(*_counted(plan.counts, plan.examples), "would write:", *table(rows))


def _show(written: list[Written]) -> None:
    rows = [["samples", "shards", "bytes", "folder"]]
    for each in written:
        total = size(float(sum(record.bytes for record in each.records)))
        rows.append([f"{each.samples:,}", f"{len(each.records):,}", total, str(each.folder)])
    say(*table(rows))


def _counted(counts: dict[str, int], examples: dict[str, tuple[str, ...]]) -> list[str]:
    lines = []
    for name, count in counts.items():
        keys = examples.get(name, ())
        first = f" ({'first: ' if count > len(keys) else ''}{'; '.join(keys)})" if keys else ""
        if count:
            lines.append(f"{count:,} {name}{first}")
    return lines


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in text.split("/"))
    except ValueError:
        raise ConfigError(f"--split {text!r} holds no shares", "write 0.95/0.05") from None
