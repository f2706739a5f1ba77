"""Experiment trackers through Accelerate: what metrics.jsonl gets, for tensorboard, wandb and others.

They live on rank 0. A tracker that fails costs its own record and never the run. What a continued run means:
    tensorboard   the same directory; records after the checkpoint are purged and written again
    wandb         the same run (id and resume="allow"); it keeps the first value of a step, and those after
                  the checkpoint are there already
    others        a new run of theirs, which begins at the checkpoint
"""

from __future__ import annotations

import os
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import tracking

from clipkit.config import Config
from clipkit.redaction import redact
from clipkit.types import ConfigError

FOLDER = "trackers"
PROJECT = "clipkit"
# Keeps the command line, the environment and standard output out of wandb's files: secrets may stand there.
QUIET_WANDB = {"console": "off", "disable_git": True, "disable_code": True, "x_disable_meta": True}
PACKAGES = {"comet_ml": "comet-ml"}  # where the package is called otherwise than its tracker


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError naming the first tracker that Accelerate or this environment lacks."""
    installed = {str(kind) for kind in tracking.get_available_trackers()}
    for name in names:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"run.trackers: this accelerate knows no {name}",
                "pip install --upgrade accelerate, or remove it from run.trackers",
            )
        if name not in installed:
            raise ConfigError(
                f"run.trackers: the package of {name} is not installed",
                f"pip install {PACKAGES.get(name, name)}, or remove {name} from run.trackers",
            )


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line of metrics.jsonl by name; {} for lines that hold none.

    loss, lr, ... of a step; diagnostics/<name>; evaluation/<label>/<metric>.
    """
    event = record.get("event")
    if event == "diagnostics":
        return _numbers(record["values"], "diagnostics/")
    if event == "evaluation":
        found: dict[str, float] = {}
        for label, metrics in record["results"].items():
            found |= _numbers(metrics, f"evaluation/{label}/")
        return found
    return {} if event else _numbers({k: v for k, v in record.items() if k != "step"}, "")


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        f"{prefix}{name}": value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class Trackers:
    """The trackers of one run: nothing happens before `start`, and on other ranks never.

    runs: tracker -> what names its run, part of every checkpoint. failures: tracker -> calls that raised.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.runs: dict[str, dict[str, str]] = {}
        self.failures: Counter[str] = Counter()
        self._open: dict[str, Any] = {}
        self._say: Callable[[str], None] = lambda text: None

    def start(
        self, step: int | None, known: Mapping[str, dict[str, str]], say: Callable[[str], None]
    ) -> None:
        """Opens every tracker of the configuration; to be called on rank 0.

        step: that of the checkpoint which the run continues, None for a new run; known: the `runs` in it.
        """
        self._say = say
        for name in dict.fromkeys(self.config.run.trackers):
            self.runs[name] = known.get(name) or {"id": uuid.uuid4().hex[:12]}
            self._attempt(name, partial(self._start, name, step))
            if name in self._open and name not in known:
                self._attempt(name, partial(self._open[name].store_init_configuration, self.config.flat()))

    def _start(self, name: str, step: int | None) -> None:
        kind = tracking.LOGGER_TYPE_TO_CLASS[name]
        place = self.folder / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        if name == "tensorboard":
            tracker = kind(name, str(place), purge_step=0 if step is None else step + 1)
        elif name == "wandb":
            tracker = kind(
                os.environ.get("WANDB_PROJECT", PROJECT),
                id=self.runs[name]["id"],
                resume="allow",
                name=self.folder.name,
                dir=str(place),
                settings=QUIET_WANDB,
            )
        elif kind.requires_logging_directory:
            tracker = kind(PROJECT, str(place))
        else:
            tracker = kind(PROJECT)
        tracker.start()
        self._open[name] = tracker

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands the numbers of a line of metrics.jsonl to every tracker that is open."""
        values = scalars(record)
        for name, tracker in self._open.items() if values else ():
            self._attempt(name, partial(tracker.log, values, step=int(record["step"])))

    def rewind(self, step: int) -> None:
        """Forgets what came after `step`, to which the run went back, where a tracker can: tensorboard."""
        writer = self._open.pop("tensorboard", None)
        if writer is not None:
            self._attempt("tensorboard", writer.finish)
            self._attempt("tensorboard", partial(self._start, "tensorboard", step))

    def close(self) -> None:
        """Ends every tracker and says how many of its calls failed."""
        for name, tracker in self._open.items():
            self._attempt(name, tracker.finish)
        self._open.clear()
        for name, count in self.failures.items():
            self._say(f"warning: {count} calls of the tracker {name} failed; metrics.jsonl has every record")
        self.failures.clear()

    def _attempt(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        # A library of its own behind each, and a network behind that: whatever it raises is worth no run.
        except Exception as error:
            self.failures[name] += 1
            if self.failures[name] == 1:
                cause = redact(" ".join(f"{type(error).__name__}: {error}".split())[:300])
                self._say(f"warning: the tracker {name} failed ({cause}); training goes on")
