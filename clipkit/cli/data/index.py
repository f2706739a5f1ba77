"""`clipkit index`: what is in shards, and whether they are whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.output import StageProgress, duration, say, size, table
from clipkit.redaction import redact, visible
from clipkit.types import ConfigError

if TYPE_CHECKING:
    from clipkit.data.indexing import Indexing


def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS...", show_default=False, help="Paths, braces, globs, folders or addresses."
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Walk every shard again, ignoring what is known.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of the index; training reads it with data.index_dir.", metavar="DIR"),
    ] = None,
    start: Annotated[int, typer.Option(min=0, help="Number of the first shard to walk.")] = 0,
    end: Annotated[int | None, typer.Option(min=1, help="Number after the last shard to walk.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that walk shards.")] = 1,
    endpoint: Annotated[str | None, typer.Option(help="As data.storage.endpoint.")] = None,
    region: Annotated[str | None, typer.Option(help="As data.storage.region.")] = None,
    profile: Annotated[str | None, typer.Option(help="As data.storage.profile.")] = None,
) -> None:
    """Index shards for training; print samples and bytes of each; exit 3 on the first damage.

    A walk that was interrupted continues where it stopped. With --start and --end several machines share the
    shards: each walks a part into the same --out, and the next full index or training puts them together.

    Example: clipkit index 'train/{000..015}.tar'
    """
    from clipkit.data.indexing import Indexing
    from clipkit.data.options import Storage
    from clipkit.data.source import expand_shards, needs_stream
    from clipkit.data.stated_counts import count_warnings

    # A pipe is allowed only to be refused below: nothing here runs a command.
    names = expand_shards(shards, allow_pipe=True)
    streamed = [name for name in names if needs_stream(name)]
    if streamed:
        raise ConfigError(
            f"{streamed[0]}: cannot be indexed; training reads it with exact: false",
            "index plain .tar files, or train without an index",
        )
    end = len(names) if end is None else end
    if not 0 <= start < end <= len(names):
        raise ConfigError(
            f"--start {start} and --end {end} name no part of {len(names)} shards",
            f"choose 0 <= start < end <= {len(names)}",
        )
    storage = Storage(endpoint, region, profile)
    work = Indexing(names, out, storage, refresh=verify)
    numbers = range(start, end)
    walked = _walk_part(work, numbers, workers) if len(numbers) < len(names) else _walk_all(work, workers)
    _show(work, numbers, *walked)
    for line in count_warnings(work.shards[start:end], walked[0], storage):
        _remark(f"warning: {line}")


def _show(work: Indexing, numbers: range, counts: list[int], sizes: list[int], ignored: int) -> None:
    rows = [["samples", "bytes", "shard"]]
    for number, count, length in zip(numbers, counts, sizes, strict=True):
        rows.append([f"{count:,}", size(float(length)), work.shards[number]])
    say(*table(rows))
    total = len(work.shards)
    of_all = "" if len(numbers) == total else f" (numbers {numbers[0]} to {numbers[-1]} of {total:,})"
    besides = f", {ignored:,} members that belong to no sample" if ignored else ""
    say(f"{sum(counts):,} samples in {len(numbers):,} shards{of_all}, {size(float(sum(sizes)))}{besides}")


def _remark(text: str) -> None:
    print(visible(redact(text)), file=sys.stderr, flush=True)


def _walk_all(work: Indexing, workers: int) -> tuple[list[int], list[int], int]:
    found = work.saved()
    if found is None:
        with StageProgress() as progress:
            found = work.finish(workers, _forecast(work, range(len(work.shards)), workers, progress))
    return found.counts.tolist(), found.sizes.tolist(), found.ignored


def _walk_part(work: Indexing, numbers: range, workers: int) -> tuple[list[int], list[int], int]:
    if work.records() is None:
        raise ConfigError(
            f"nothing can be written to {', '.join(map(str, work.folders))}", "give --out a folder that can"
        )
    with StageProgress() as progress:
        on_shard = _forecast(work, numbers, workers, progress)
        found = [
            (len(scan.starts) - 1, scan.size, scan.ignored) for scan in work.walk(numbers, workers, on_shard)
        ]
    counts, sizes, ignored = zip(*found, strict=True)
    return list(counts), list(sizes), sum(ignored)


def _forecast(
    work: Indexing, numbers: Sequence[int], workers: int, progress: StageProgress
) -> Callable[[int, int], None]:
    """Says what will be read, and returns a callback that says how long it takes once it is under way."""
    pending = work.pending(numbers)
    if not pending:
        return lambda done, total: progress("shards", done, total)
    ahead = work.forecast(pending)
    requests = f" in at most {ahead.requests:,} requests" if ahead.requests else ""
    known = f"; {len(numbers) - len(pending):,} are known" if len(pending) < len(numbers) else ""
    _remark(f"{ahead.shards:,} shards to walk: {size(float(ahead.bytes))}{requests}{known}")
    lengths = {number: work.fingerprints([number])[0][0] for number in pending}
    began, walked, waiting = time.monotonic(), 0, min(workers, len(pending) - 1)

    def on_shard(done: int, total: int) -> None:
        nonlocal walked, waiting
        progress("shards", done, total)
        if numbers[done - 1] in lengths:
            walked += lengths[numbers[done - 1]]
            waiting -= 1
            if waiting == 0:
                left = (ahead.bytes - walked) * (time.monotonic() - began) / max(1, walked)
                _remark(f"about {duration(left)} to go")

    return on_shard
