"""`clipkit data check-shards`: every damage of a set, with its place and its cure."""

from __future__ import annotations

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
from clipkit.cli.output import StageProgress, check_out, duration, say, size, table
from clipkit.data.options import LoaderOptions
from clipkit.types import ConfigError, DataError

if TYPE_CHECKING:
    from clipkit.data.checking.job import SetCheck
    from clipkit.data.checking.samples import SampleRules
    from clipkit.data.engine import Engine


_Report = Annotated[Path | None, typer.Option(help="Report of one JSON line per finding.", metavar="FILE")]
_Repair = Annotated[
    Path | None,
    typer.Option(help="Folder for clean copies of damaged shards, and links to clean ones.", metavar="DIR"),
]
_Captions = Annotated[
    list[str] | None,
    typer.Option(help="Field that must hold a caption, as in data.train; may be repeated. Default: txt."),
]
_MaxPixels = Annotated[int, typer.Option(min=1, help="As data.max_pixels.")]
_Fast = Annotated[bool, typer.Option("--fast", help="Headers only: no image is decoded, no hash compared.")]
_Show = Annotated[int, typer.Option(min=0, help="Findings on the terminal; --out gets all.")]


def check_shards(
    shards: ShardsArgument,
    out: _Report = None,
    repair: _Repair = None,
    caption: _Captions = None,
    max_pixels: _MaxPixels = LoaderOptions.max_pixels,
    fast: _Fast = False,
    show: _Show = 50,
    workers: WorkersOption = 1,
    engine: EngineOption = EngineName.processes,
    start: StartOption = 0,
    end: EndOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Find everything that training would stop at, reject or lose; exit 3 for errors.

    Errors are what training refuses or rejects, notes what is only worth knowing. With --out an interrupted
    check continues, and machines that share a set by --start and --end leave records there, which the same
    command without them puts together. --repair exits 0 when the copies are written; originals are never
    touched.

    Example: clipkit data check-shards train/ --out report.jsonl --workers 8
    """
    from clipkit.data.checking.beside import find_shards
    from clipkit.data.checking.repair import check_destination, repaired
    from clipkit.data.checking.samples import SampleRules

    rules = SampleRules(tuple(caption or ("txt",)), max_pixels, decode=not fast)
    names = find_shards(shards)
    numbers = share(start, end, len(names), "shards")
    if repair is not None:
        if fast or len(numbers) < len(names):
            raise ConfigError(
                "--repair needs the whole check of the whole set", "leave out --fast, --start and --end"
            )
        check_destination(names, repair)
    if str(out) == "-":
        raise ConfigError("--out is a file here", "name a file; what is found is printed anyway")
    check_out(out)
    if dry_run:
        _say_plan(names, numbers, rules, out, repair)
        return
    ended = None if repair is None else repaired(names, rules, repair)
    if ended is not None and (out is None or out.exists()):
        say(ended.line(repair))
        return
    _run(names, numbers, rules, engine_of(workers, engine), out, repair, show)


def _run(
    names: list[str],
    numbers: range,
    rules: SampleRules,
    engine: Engine,
    out: Path | None,
    repair: Path | None,
    show: int,
) -> None:
    from clipkit.data.checking.job import check_set

    began = time.monotonic()
    with StageProgress() as progress:
        found = check_set(
            names,
            numbers,
            rules,
            engine,
            report=out,
            show=show,
            on_shard=lambda done, total: progress("shards checked", done, total),
        )
    whole = len(numbers) == len(names)
    _say_found(found, time.monotonic() - began, out if whole else None)
    if repair is not None:
        _repair(names, found, rules, repair, engine)
    elif found.errors:
        where = (
            f"all findings are in {out}" if out is not None and whole else "list all of them with --out FILE"
        )
        raise DataError(
            f"{_count(found.errors, 'error')}, {len(found.damaged):,} of {found.shards:,} shards damaged",
            f"{where}; --repair DIR writes copies without the damage",
        )


def _say_plan(
    names: list[str], numbers: range, rules: SampleRules, out: Path | None, repair: Path | None
) -> None:
    from clipkit.data.checking.job import check_parts, describe_rules, records_beside
    from clipkit.data.fingerprints import fingerprints
    from clipkit.data.options import DEFAULT_STORAGE
    from clipkit.data.shard_records import known

    chosen = [names[number] for number in numbers]
    parts = check_parts(chosen, rules)
    total = sum(length for length, _ in fingerprints(chosen, DEFAULT_STORAGE))
    say(f"would check {len(chosen):,} shards, {size(float(total))}: {describe_rules(rules)}")
    if out is not None:
        done = known(parts, records_beside(out, rules))
        say(f"would write {out}" + (f"; {done:,} shards were checked before" if done else ""))
    if repair is not None:
        say(f"would write clean copies to {repair}")


def _say_found(found: SetCheck, seconds: float, out: Path | None) -> None:
    from clipkit.data.checking.findings import cure_of

    if found.first:
        rows = [["", "shard", "byte", "member", "what"]]
        for finding in found.first:
            byte = "" if finding.byte is None else str(finding.byte)
            what = f"{finding.kind}: {finding.detail}"
            rows.append([finding.severity, finding.shard, byte, finding.member[:80], what[:160]])
        say(*table(rows))
    if found.kinds:
        counted = sorted(found.kinds.items())
        say(
            "",
            *table(
                [["findings", "", "kind", "cure"]]
                + [[f"{count:,}", severity, kind, cure_of(kind)] for (severity, kind), count in counted]
            ),
        )
        shown = sum(found.kinds.values())
        if shown > len(found.first):
            say("", f"shown above: {len(found.first):,} of {shown:,}")
    say(
        f"{found.samples:,} samples in {found.shards:,} shards, {size(float(found.bytes))}: "
        f"{_count(found.errors, 'error')}, {_count(found.notes, 'note')}; {duration(seconds)}, "
        f"{found.samples / max(seconds, 1e-9):,.0f} samples/s"
    )
    if out is not None:
        say(f"written to {out}")


def _repair(names: list[str], found: SetCheck, rules: SampleRules, repair: Path, engine: Engine) -> None:
    from clipkit.data.checking.repair import DROPPED, repair_set

    with StageProgress() as progress:
        done = repair_set(
            names,
            found,
            rules,
            repair,
            engine,
            on_shard=lambda done, total: progress("shards written", done, total),
        )
    say(
        f"{repair}: {done.samples:,} samples; {done.rewritten:,} shards written again, "
        f"{done.taken_over:,} taken over; {done.dropped:,} lines in {DROPPED}"
    )
    for shard in done.lost:
        say(f"nothing in {shard} could be kept")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
