"""Options that the data jobs share, spelled once, and the engine and progress they ask for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipkit.data.engine import Engine
from clipkit.types import ConfigError


class EngineName(StrEnum):
    """Where parts of a job run."""

    processes = "processes"
    ray = "ray"


ShardsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS...", show_default=False, help="Paths, braces, globs, folders or addresses."
    ),
]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

WorkersOption = Annotated[int, typer.Option("--workers", min=1, help="Processes, or Ray tasks at a time.")]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="The folder of the new shards.", show_default=False)
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what lies at the outputs.")]
EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="Processes of this machine, or a Ray cluster (clipkit[ray]).")
]
StartOption = Annotated[
    int, typer.Option("--start", min=0, help="Number of the first part, for a share of the job.")
]
EndOption = Annotated[int | None, typer.Option("--end", min=1, help="Number after the last part.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Read and check, say what would be done, write nothing.")
]


def engine_of(workers: int, name: EngineName) -> Engine:
    """Returns the engine that the options ask for."""
    return Engine(workers, name.value)


def share(start: int, end: int | None, total: int, what: str = "parts") -> range:
    """Returns the numbers that --start and --end name of `total`; ConfigError when they name none."""
    last = total if end is None else end
    if not 0 <= start < last <= total:
        raise ConfigError(
            f"--start {start} and --end {last} name none of {total:,} {what}",
            f"choose 0 <= start < end <= {total}",
        )
    return range(start, last)


def byte_count(text: str | None) -> int | None:
    """Returns the number of bytes that --shard-bytes names (500000000, 500MB, 1GiB), None for None."""
    if text is None:
        return None
    number = text.strip().lower().removesuffix("b")
    unit = number.lstrip("0123456789.")
    try:
        count = int(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(f"--shard-bytes {text} is no number of bytes", "write 500000000, 500MB or 1GiB")
    return count
