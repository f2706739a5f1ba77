"""What commands print, on the main rank only: tables for people, JSON for programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.log import StageProgress, rank
from clipkit.redaction import redact, visible
from clipkit.types import ConfigError

__all__ = [
    "StageProgress",
    "check_out",
    "duration",
    "join_launcher",
    "rank",
    "result",
    "say",
    "size",
    "table",
]

if TYPE_CHECKING:
    from clipkit.dist import World


def join_launcher(device: str) -> tuple[World, str]:
    """Returns the ranks of this command and its device, joining the process group that a launcher asks for.

    device "auto" becomes the device of this rank when there are several.
    """
    from clipkit.dist import World

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        own = str(PartialState().device)
        device = own if device == "auto" else device
    return World.current(), device


def say(*lines: str) -> None:
    """Prints lines on the main rank."""
    if rank() == 0 and lines:
        print("\n".join(visible(redact(line)) for line in lines), flush=True)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table: aligned columns, two spaces apart."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def size(count: float) -> str:
    """Returns a number of bytes as people read it."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def duration(seconds: float) -> str:
    """Returns a time span as people read it."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def check_out(out: Path | None) -> None:
    """Raises ConfigError before the work starts when a result file cannot be written."""
    if out is None or str(out) == "-":
        return
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if (
        out.is_dir()
        or not os.access(nearest, os.W_OK)
        or (nearest != out.absolute() and not nearest.is_dir())
    ):
        raise ConfigError(f"--out {out} cannot be written", "choose a file in a folder you may write to")


def result(values: Mapping[str, Any], out: Path | None) -> None:
    """Prints an evaluation result; `out` also gets it as JSON (`-`: only the JSON, on standard output)."""
    from clipkit.evaluation import format_table, result_text, write_result

    if rank():
        return
    if str(out) == "-":
        print(result_text(values))
        return
    say(*format_table(values))
    if out is not None:
        say(f"written to {write_result(values, out)}")
