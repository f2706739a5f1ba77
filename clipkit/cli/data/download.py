"""`clipkit data download`: addresses -> shards, by img2dataset in an environment of its own."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.data.options import DryRunOption, WorkersOption
from clipkit.cli.output import StageProgress, say, table
from clipkit.redaction import redact, visible

if TYPE_CHECKING:
    from clipkit.data.download import Download, Outcome

_SHOWN = 10  # kinds of failure


class Resize(StrEnum):
    """Which side of a picture gets the size."""

    shorter = "shorter"
    longer = "longer"
    keep = "keep"


def download(
    urls: Annotated[
        Path,
        typer.Argument(
            metavar="LIST",
            show_default=False,
            help="A .parquet, .csv, .tsv, .jsonl, .json or .txt list of addresses, or a folder of them.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="The folder of the shards.")],
    url_col: Annotated[str | None, typer.Option(help="Column of the addresses; found by its name.")] = None,
    caption_col: Annotated[
        str | None, typer.Option(help="Column of the captions; found by its name.")
    ] = None,
    keep_col: Annotated[
        list[str] | None, typer.Option(help="A column to keep in the .json of a sample; uid by default.")
    ] = None,
    resize: Annotated[
        Resize, typer.Option(help="Make larger pictures smaller by this side, to --size.")
    ] = Resize.keep,
    size: Annotated[int | None, typer.Option(min=1, help="Pixels of the side that --resize names.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=2, help="Rows of the list in a shard.")] = 10_000,
    workers: WorkersOption = 2,
    threads: Annotated[int, typer.Option(min=1, help="Addresses at a time, per process.")] = 64,
    retries: Annotated[int, typer.Option(min=0, help="Further attempts per address.")] = 2,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds until an attempt is given up.")] = 10,
    dry_run: DryRunOption = False,
) -> None:
    """Download pictures and captions into shards that train as they are; exit 3 when nothing came.

    Runs a pinned img2dataset through uv, without its white borders, and continues where it was interrupted.
    Failures by reason are in OUT/download.json, counts in OUT/sizes.json; every row is in the .parquet files.

    Example: clipkit data download laion.parquet shards/ --resize shorter --size 512 --workers 16
    """
    from clipkit.data.download import Download, run_download, shown_command
    from clipkit.data.url_list import choose_columns, read_list

    source = read_list(urls)
    columns = choose_columns(source, url_col, caption_col, keep_col or ())
    asked = Download(
        source, columns, out, resize.value, size, samples_per_shard, workers, threads, retries, timeout
    )
    _announce(asked)
    say(shown_command(asked))
    if dry_run:
        return
    rows = sum(source.rows) if source.rows is not None else 0
    try:
        with StageProgress() as progress:
            found = run_download(asked, _remark, lambda done: progress("addresses", done, max(rows, done)))
    finally:
        _show(asked)
    say(*_next(asked, found))


def _remark(line: str) -> None:
    print(visible(redact(line)), file=sys.stderr, flush=True)


def _announce(asked: Download) -> None:
    rows = asked.source.rows
    count = "addresses" if rows is None else f"{sum(rows):,} addresses"
    columns = asked.columns
    kept = f", kept: {', '.join(columns.kept)}" if columns.kept else ""
    say(f"{count} in column {columns.url!r}, captions in {columns.caption!r}{kept}")
    if columns.caption is None:
        say("no captions: the samples hold pictures only")


def _show(asked: Download) -> None:
    """Says what lies in the folder, however the download ended."""
    from clipkit.data.download import read_outcome

    found = read_outcome(asked.out, asked.source.num_shards(asked.per_shard))
    if not found.rows:
        return
    rows = [
        ["pairs", f"{found.successes:,}", f"{found.successes / found.rows:.1%}"],
        [
            "failed to download",
            f"{found.failed_to_download:,}",
            f"{found.failed_to_download / found.rows:.1%}",
        ],
        [
            "failed to decode or resize",
            f"{found.failed_to_resize:,}",
            f"{found.failed_to_resize / found.rows:.1%}",
        ],
    ]
    rows += [[f"  {words}", f"{count:,}", ""] for words, count in found.failures[:_SHOWN]]
    say(*table(rows))
    say(f"{len(found.shards):,} shards in {asked.out}, counts in sizes.json, failures in download.json")


def _next(asked: Download, found: Outcome) -> list[str]:
    lines = []
    if 0 in found.shards.values():
        lines.append("some shards hold no pair: name the folder in data.train, not a {00000..} range")
    return [
        *lines,
        f"next: clipkit data check-shards {asked.out}",
        f"then: clipkit pretrain CONFIG data.train={asked.out}",
    ]
