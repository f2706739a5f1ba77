"""What a run says: a bar on a terminal, one line per interval elsewhere, metrics.jsonl always."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from clipkit.redaction import redact, visible

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress, TaskID


def rank() -> int:
    """Returns the rank that a launcher gave this process, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def encode_record(record: Mapping[str, Any]) -> str:
    """Returns one line of standard JSON; NaN and infinities become null and are named under `non_finite`."""
    non_finite: dict[str, str] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(entry, f"{name}.{key}" if name else str(key)) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [plain(entry, f"{name}.{index}") for index, entry in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            non_finite[name] = str(value)
            return None
        return redact(value) if isinstance(value, str) else value

    encoded = plain(record, "")
    if non_finite:
        encoded["non_finite"] = non_finite
    return json_line(encoded)


def json_line(record: Mapping[str, Any]) -> str:
    """Returns a record as one line of JSON, for every reader's idea of a line and for a terminal."""
    return visible(json.dumps(record, ensure_ascii=False, allow_nan=False))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# Key of a record -> how it reads on a line. Keys are written down once, here; train.py fills them.
_FIELDS: dict[str, Callable[[Any], str]] = {
    "samples": lambda v: f"{v:,} samples",
    "loss": lambda v: f"loss {v:.4g}",
    "lr": lambda v: f"lr {v:.2e}",
    "logit_scale": lambda v: f"scale {v:.2f}",
    "grad_norm": lambda v: f"grad {v:.3g}",
    "accuracy": lambda v: f"acc {100 * v:.1f}%",
    "samples_per_second": lambda v: f"{v:,.0f} samples/s",
    "data_wait": lambda v: f"wait {100 * v:.0f}%",
}


class _Bar(NamedTuple):
    live: Live
    progress: Progress
    task: TaskID


class RunLog:
    """The voice of one run. On ranks other than the main one every method does nothing.

    Keys of a step record: step, samples, loss, loss/<objective>, lr, logit_scale, grad_norm,
    samples_per_second, data_wait (fraction of the time spent waiting for data), accuracy (in-batch, 0..1),
    read_retries (reads of all ranks that failed and were tried again since the last record, if any),
    samples/<source> (of a mixture: samples seen of each source since the run began).
    Others are written to metrics.jsonl and not shown.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        total_steps: int,
        is_main: bool = True,
        start_step: int = 0,
        tty: bool | None = None,
        stream: IO[str] | None = None,
    ) -> None:
        """Opens run_dir/metrics.jsonl for appending (None: shows progress, writes nothing).

        tty None: a bar when `stream` (standard error) is a terminal. start_step: where a resumed run stands.
        """
        self._is_main = is_main
        self._stream = stream or sys.stderr
        self._total = total_steps
        self._first = start_step
        self._began = time.monotonic()
        self._file: IO[bytes] | None = None
        self._bar: _Bar | None = None
        self._shown = ""
        self._track: Callable[[Mapping[str, Any]], None] | None = None
        if not is_main:
            return
        if run_dir is not None:
            # Unbuffered: each record is one write, so a kill leaves at most one torn last line.
            self._file = open(run_dir / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115  (closed by close)
        if self._stream.isatty() if tty is None else tty:
            self._bar = self._start_bar()

    def _start_bar(self) -> _Bar:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        progress = Progress(*columns, speed_estimate_period=120)
        task = progress.add_task("", total=self._total, completed=self._first)
        # The numbers stand on a line of their own: beside the bar they would push it off a narrow terminal.
        live = Live(
            get_renderable=lambda: Group(progress.get_renderable(), Text(visible(self._shown))),
            console=Console(file=self._stream, force_terminal=True),
        )
        live.start()
        return _Bar(live, progress, task)

    def follow(self, track: Callable[[Mapping[str, Any]], None]) -> None:
        """Hands every record to `track` as well, once it is written."""
        self._track = track

    def append(self, record: Mapping[str, Any], again: bool = False) -> None:
        """Appends one record to metrics.jsonl; `again`: it stood there before, and trackers have it."""
        if self._file is not None:
            self._file.write(f"{encode_record(record)}\n".encode())
            if self._track is not None and not again:
                self._track(record)

    def step(self, record: Mapping[str, Any], show: bool = True) -> None:
        """Appends the record of one step, and with `show` puts it on the bar or prints it as a line."""
        self.append(record)
        if not self._is_main:
            return
        step = int(record["step"])
        if self._bar is not None:
            self._shown = self._line(record) if show else self._shown
            self._bar.progress.update(self._bar.task, completed=step)
        elif show:
            done = step - self._first
            left = (self._total - step) * (time.monotonic() - self._began) / max(1, done)
            self._print(f"step {step}/{self._total}  {self._line(record)}  eta {_duration(left)}")

    def _line(self, record: Mapping[str, Any]) -> str:
        parts = []
        for key, show in _FIELDS.items():
            if record.get(key) is not None:
                parts.append(show(record[key]))
            if key == "loss":
                terms = {name: value for name, value in record.items() if name.startswith("loss/")}
                if len(terms) > 1:
                    parts.extend(f"{name[5:]} {value:.4g}" for name, value in terms.items())
        return "  ".join(parts)

    def _print(self, text: str) -> None:
        text = visible(text)
        if self._bar is not None:
            self._bar.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Prints a line (above the bar on a terminal), secrets replaced by ***."""
        if self._is_main:
            self._print(redact(text))

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Appends {"event": "evaluation", "step", "results"} and prints one line per entry of `results`.

        results: name of the evaluation -> metric name -> number.
        """
        self.append({"event": "evaluation", "step": step, "results": results})
        for name, metrics in results.items():
            numbers = "  ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
                for key, value in metrics.items()
                if isinstance(value, int | float)
            )
            self.note(f"step {step}  {name}: {numbers}")

    def close(self) -> None:
        """Removes the bar and closes the file; the log stays silent afterwards."""
        if self._bar is not None:
            self._bar.live.stop()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None
        self._is_main = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class StageProgress:
    """Progress on stderr of the main rank: a bar on a terminal, a line every ten seconds elsewhere.

    Calling it with (stage, done, total) moves the stage on; leaving the block removes the bar.
    """

    INTERVAL_S = 10.0

    def __init__(self) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._said = time.monotonic()
        self._silent = rank() != 0

    def __enter__(self) -> StageProgress:
        if not self._silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(stage, total=total)
            self._bar.update(self._tasks[stage], completed=done, total=total)
        elif not self._silent and time.monotonic() - self._said >= self.INTERVAL_S:
            self._said = time.monotonic()
            print(f"{stage}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
