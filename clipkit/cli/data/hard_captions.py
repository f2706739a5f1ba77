"""`clipkit data hard-captions`: wrong captions for the modifier `hard_captions` of the objectives."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import Annotated

import typer

from clipkit.cli.data.curating import CaptionOption, SeedOption
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
    engine_of,
    share,
)
from clipkit.cli.output import StageProgress, say, table


class Rule(StrEnum):
    """How a hard caption is made."""

    swapped = "swap"
    replaced = "replace"


FieldOption = Annotated[
    str, typer.Option("--field", metavar="NAME", help="Entry of the JSON member that gets the list.")
]
NumOption = Annotated[int, typer.Option("--num", min=1, help="Hard captions per sample, at most.")]
RuleOption = Annotated[
    list[Rule] | None,
    typer.Option("--rule", show_default=False, help="swap or replace; may be repeated. Default: both."),
]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Replace entries that are there already.")]


def hard_captions(
    shards: ShardsArgument,
    out: OutOption,
    field: FieldOption = "hard",
    num: NumOption = 2,
    rule: RuleOption = None,
    caption: CaptionOption = "txt",
    seed: SeedOption = 0,
    replace: ReplaceOption = False,
    workers: WorkersOption = 1,
    engine: EngineOption = EngineName.processes,
    start: StartOption = 0,
    end: EndOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Add captions that are wrong by one exchange of words: colours swapped, a number replaced (English).

    Training reads them with {name: clip, hard_captions: {field: json.hard, num: 2}}. Other members stay as
    they are. With --start and --end a machine writes a part; the same command without them finishes.

    Example: clipkit data hard-captions train/ --out train_hard
    """
    from clipkit.data.hard_captions import HardCaptions, write_hard_captions

    rules = tuple(found.value for found in Rule if rule is None or found in rule)
    options = HardCaptions(field, num, rules, caption, seed=seed, replace=replace)
    parts = engine_of(workers, engine)
    with StageProgress() as progress:
        done = write_hard_captions(
            shards,
            out,
            options,
            parts,
            lambda total: share(start, end, total, "shards"),
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if done.ended is not None:
        say(done.ended.line(out))
        return
    made: Counter[int] = Counter()
    for written in done.parts:
        made.update(written.made)
        for reason, count in written.reasons.items():
            say(f"{written.record.name}: {count:,} without: {reason}")
    rows = [["hard captions", "samples"], *([str(n), f"{made[n]:,}"] for n in sorted(made))]
    say(*table(rows))
    if dry_run:
        return
    say(f"{len(done.parts):,} shards: {out}" if done.whole else "part done; finish without --start and --end")
