"""`clipkit data stats`: what is in a set of shards."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.data.options import (
    DryRunOption,
    EndOption,
    EngineName,
    EngineOption,
    ShardsArgument,
    StartOption,
    WorkersOption,
    engine_of,
    share,
)
from clipkit.cli.output import StageProgress, duration, say, size, table
from clipkit.redaction import redact
from clipkit.types import ConfigError

if TYPE_CHECKING:
    from clipkit.data.describing.shard import Description

_Out = Annotated[
    Path | None, typer.Option(help="Folder for stats.json and the page stats.html.", metavar="DIR")
]
_Captions = Annotated[
    list[str] | None,
    typer.Option(help="Field that captions are read from; may be repeated. Default: txt."),
]
_Model = Annotated[
    str | None,
    typer.Option(help="open_clip name or exported directory whose tokenizer and context are used."),
]
_Tokenizer = Annotated[
    str | None, typer.Option(help="clip (CLIP's byte pairs, the default), or a tokenizer.json.")
]
_Context = Annotated[
    int | None, typer.Option(min=1, help="Tokens a model reads. Default: the model's, else 77.")
]


def stats(
    shards: ShardsArgument,
    out: _Out = None,
    caption: _Captions = None,
    model: _Model = None,
    tokenizer: _Tokenizer = None,
    context: _Context = None,
    workers: WorkersOption = 1,
    engine: EngineOption = EngineName.processes,
    start: StartOption = 0,
    end: EndOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Describe shards: lengths and truncation of captions, duplicates, sizes and formats of images.

    Truncation is counted by script (Latin, Cyrillic, Han, ...), told by letters without a language model.
    Duplicates are exact, by 64-bit hashes; beyond 8.4 million different ones of a kind a random share of them
    is looked at, and said so. With --out an interrupted run continues, and shares by --start and --end leave
    records there, which the same command without them puts together.

    Example: clipkit data stats train/ --out stats --workers 8
    """
    from clipkit.data.checking.beside import find_shards
    from clipkit.data.describing.shard import Description
    from clipkit.data.describing.tokens import rule_of

    names = find_shards(shards)
    numbers = share(start, end, len(names), "shards")
    description = Description(tuple(caption or ("txt",)), rule_of(model, tokenizer, context))
    if out is not None:
        _check_folder(out)
    if dry_run:
        _say_plan(names, numbers, description, out)
        return
    _run(names, numbers, description, shards, out, workers, engine)


def _run(
    names: list[str],
    numbers: range,
    description: Description,
    shards: list[str],
    out: Path | None,
    workers: int,
    engine: EngineName,
) -> None:
    from clipkit.data.describing.job import PAGE, RESULT, describe_set
    from clipkit.data.describing.summary import lines_of, rows_of

    began = time.monotonic()
    with StageProgress() as progress:
        summary = describe_set(
            names,
            numbers,
            description,
            engine_of(workers, engine),
            out=out,
            title=redact(", ".join(shards)),
            on_shard=lambda done, total: progress("shards described", done, total),
        )
    seconds = time.monotonic() - began
    say(*table(rows_of(summary)), "", *lines_of(summary))
    say(
        f"{summary.samples:,} samples in {summary.shards:,} shards, {size(float(summary.bytes))}; "
        f"{duration(seconds)}, {summary.samples / max(seconds, 1e-9):,.0f} samples/s"
    )
    if out is not None and len(numbers) == len(names):
        say(f"written to {out / RESULT} and {out / PAGE}")


def _say_plan(names: list[str], numbers: range, description: Description, out: Path | None) -> None:
    from clipkit.data.describing.job import parts_of, records_in
    from clipkit.data.fingerprints import fingerprints
    from clipkit.data.options import DEFAULT_STORAGE
    from clipkit.data.shard_records import known

    chosen = [names[number] for number in numbers]
    total = sum(length for length, _ in fingerprints(chosen, DEFAULT_STORAGE))
    say(
        f"would describe {len(chosen):,} shards, {size(float(total))}: captions in "
        f"{', '.join(description.captions)}, a context of {description.tokens.context} tokens"
    )
    if out is not None:
        done = known(parts_of(chosen, description), records_in(out, description))
        say(f"would write to {out}" + (f"; {done:,} shards were described before" if done else ""))


def _check_folder(out: Path) -> None:
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out {out} cannot be written", "choose a folder that you may write to")
