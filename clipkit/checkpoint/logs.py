"""Log files that agree with the checkpoint: lengths recorded on saving, cut back on resuming."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from clipkit.types import ClipkitError


def log_lengths(run_dir: Path | str, names: Iterable[str]) -> dict[str, int]:
    """Returns name -> bytes of each file in `run_dir` (0 when absent), after making them durable.

    To be called on rank 0 with the writers flushed, just before the checkpoint that records it.
    """
    lengths: dict[str, int] = {}
    for name in names:
        path = Path(run_dir) / name
        lengths[name] = 0
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                lengths[name] = os.fstat(file.fileno()).st_size
    return lengths


def truncate_logs(run_dir: Path | str, lengths: Mapping[str, int]) -> dict[str, int]:
    """Cuts the files back to the lengths of `log_lengths`; returns name -> bytes removed.

    Lines of steps after the checkpoint are written again by the resumed run. A file that is shorter than
    recorded (it lost its end in a power cut) is cut to its last whole line. To be called on rank 0.
    """
    removed: dict[str, int] = {}
    for name, length in lengths.items():
        if name in ("", "..") or Path(name).name != name:
            raise ClipkitError(
                f"the checkpoint records a log file {name!r} outside the run directory",
                "resume from a checkpoint that this run wrote",
            )
        path = Path(run_dir) / name
        if not path.exists():
            continue
        with path.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            end = length if size >= length else _last_line_end(file.read())
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
            removed[name] = size - end
    return removed


def _last_line_end(content: bytes) -> int:
    return content.rfind(b"\n") + 1
