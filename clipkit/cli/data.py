"""`clipkit index`: what is in shards, and whether they are whole."""

from __future__ import annotations

from typing import Annotated

import typer

from clipkit.cli.output import StageProgress, say, size, table
from clipkit.types import ConfigError


def index(
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARDS...", show_default=False, help="Paths, braces, globs or folders."),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Walk every shard again, ignoring a cached index.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes that walk shards.")] = 1,
) -> None:
    """Index shards for training; print samples and bytes of each; exit 3 on the first damage.

    Example: clipkit index 'train/{000..015}.tar'
    """
    from clipkit.data.indexing import build_index
    from clipkit.data.source import expand_shards, needs_stream

    # A pipe is allowed only to be refused below: nothing here runs a command.
    names = expand_shards(shards, allow_pipe=True)
    streamed = [name for name in names if needs_stream(name)]
    if streamed:
        raise ConfigError(
            f"{streamed[0]}: cannot be indexed; training reads it with exact: false",
            "index plain .tar files on this disk, or train without an index",
        )
    with StageProgress() as progress:
        found = build_index(
            names,
            workers=workers,
            on_shard=lambda done, total: progress("shards", done, total),
            refresh=verify,
        )
    rows = [["samples", "bytes", "shard"]]
    for shard, count, length in zip(found.shards, found.counts, found.sizes, strict=True):
        rows.append([f"{int(count):,}", size(float(length)), shard])
    say(table(rows))
    ignored = f", {found.ignored:,} members that belong to no sample" if found.ignored else ""
    held = size(float(found.sizes.sum()))
    say(f"{found.num_samples:,} samples in {len(found.shards):,} shards, {held}{ignored}")
