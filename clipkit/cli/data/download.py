"""`clipkit data download`: addresses -> shards, by img2dataset in an environment of its own."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.data.options import DryRunOption, OutOption, WorkersOption
from clipkit.cli.output import StageProgress, say, table
from clipkit.redaction import redact, visible

if TYPE_CHECKING:
    from clipkit.data.download import Download, Outcome

_SHOWN = 10  # kinds of failure


class ResizeMode(StrEnum):
    """The side that `--resize` is for."""

    shorter = "shorter"
    longer = "longer"


ListArgument = Annotated[
    Path,
    typer.Argument(
        metavar="LIST",
        show_default=False,
        help="A .parquet, .csv, .tsv, .jsonl, .json or .txt list of addresses, or a folder of them.",
    ),
]
UrlKeyOption = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of addresses.  [default: url, image_url, ...]")
]
CaptionKeyOption = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="Column of captions.  [default: caption, text, ...]")
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN", help="Stored in KEY.json; repeatable.  [default: uid, if there is one]"),
]
ResizeOption = Annotated[
    int | None, typer.Option(min=1, metavar="PIXELS", help="Length of a side; smaller images stay.")
]
ResizeModeOption = Annotated[ResizeMode, typer.Option(help="The side --resize is for.")]
SamplesOption = Annotated[int, typer.Option(min=2, metavar="N", help="Rows of the list in a shard.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="Addresses at a time, per process.")]
RetriesOption = Annotated[int, typer.Option(min=0, help="Further attempts per address.")]
TimeoutOption = Annotated[int, typer.Option(min=1, help="Seconds until an attempt is given up.")]


def download(
    urls: ListArgument,
    out: OutOption,
    url_key: UrlKeyOption = None,
    caption_key: CaptionKeyOption = None,
    keep: KeepOption = None,
    resize: ResizeOption = None,
    resize_mode: ResizeModeOption = ResizeMode.shorter,
    samples_per_shard: SamplesOption = 10_000,
    workers: WorkersOption = 2,
    threads: ThreadsOption = 64,
    retries: RetriesOption = 2,
    timeout: TimeoutOption = 10,
    dry_run: DryRunOption = False,
) -> None:
    """Download pictures and captions into shards that train as they are; exit 3 when nothing came.

    Runs a pinned img2dataset through uv, without its white borders, and continues where it was interrupted.
    Failures by reason are in OUT/download.json, counts in OUT/sizes.json; every row is in the .parquet files.

    Example: clipkit data download laion.parquet --out shards --resize 512 --workers 16
    """
    from clipkit.data.download import Download, run_download, shown_command
    from clipkit.data.url_list import choose_columns, read_list

    source = read_list(urls)
    columns = choose_columns(source, url_key, caption_key, keep or ())
    asked = Download(
        source,
        columns,
        out,
        resize,
        resize_mode.value,
        samples_per_shard,
        workers,
        threads,
        retries,
        timeout,
    )
    _announce(asked)
    say(shown_command(asked))
    if dry_run:
        return
    rows = sum(source.rows) if source.rows is not None else 0
    found = None
    try:
        with StageProgress() as progress:
            found = run_download(asked, _remark, lambda done: progress("addresses", done, max(rows, done)))
    finally:
        if found is None or found.ended is None:
            _show(asked)
    say(*(_next(asked, found) if found.ended is None else [found.ended.line(out)]))


def _remark(line: str) -> None:
    print(visible(redact(line)), file=sys.stderr, flush=True)


def _announce(asked: Download) -> None:
    rows = asked.source.rows
    count = "rows not counted" if rows is None else f"rows: {sum(rows):,}"
    columns = asked.columns
    kept = f", kept: {', '.join(columns.kept)}" if columns.kept else ""
    captions = "none: samples hold pictures only" if columns.caption is None else f"{columns.caption!r}"
    say(f"{count}, addresses: {columns.url!r}, captions: {captions}{kept}")


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
