"""Runs that differ in one or several values of a configuration, one after the other, and their comparison."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.config import load_config
from clipkit.dist import World
from clipkit.evaluation import write_result
from clipkit.redaction import redact
from clipkit.train.loop import Interrupted
from clipkit.train.pretrain import pretrain
from clipkit.types import ClipkitError, ConfigError

_OPENING, _CLOSING = "[{(", "]})"
_TAIL = 5  # log lines whose mean is the final loss: a single batch is noise


@dataclass(frozen=True)
class Swept:
    """One run of a sweep: the values it had, its directory, and what came out by name, or why it failed."""

    values: Mapping[str, str]
    directory: str
    outcome: Mapping[str, float]
    failure: ClipkitError | None = None

    @property
    def document(self) -> dict[str, Any]:
        """What sweep.json says about the run."""
        said = {} if self.failure is None else {"error": self.failure.cause, "cure": self.failure.cure}
        return {
            "values": dict(self.values),
            "directory": self.directory,
            "outcome": dict(self.outcome),
            **said,
        }


def split_values(text: str) -> list[str]:
    """Returns the parts of `text` at commas outside brackets and quotes: "[1,2],[3,4]" has two."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == "," and not depth:
            parts.append("")
            continue
        parts[-1] += character
    return [part.strip() for part in parts]


def split_overrides(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Returns (swept key -> values, plain overrides): a key is swept when its value has several parts.

    Raises ConfigError when nothing is swept, or a value is empty or named twice.
    """
    swept: dict[str, list[str]] = {}
    plain = []
    for text in overrides:
        key, _, written = text.partition("=")
        values = split_values(written)
        if len(values) == 1:
            plain.append(text)
            continue
        if "" in values or len(set(values)) < len(values):
            raise ConfigError(
                f"`{text}` has an empty or repeated value", "write KEY=v1,v2 with different values"
            )
        swept[key.strip()] = values
    if not swept:
        raise ConfigError("nothing is swept", "give a key several values: optim.lr=1e-3,3e-3")
    return swept, plain


def sweep(
    config: str | Path,
    overrides: Sequence[str],
    directory: str | Path,
    say: Callable[[str], None] = lambda text: None,
) -> list[Swept]:
    """Trains one run per combination of swept values; returns them in order.

    A run that fails is recorded with its error and the next one begins (with several processes it is the
    last one: the others may not know of it); the same call tries it again. Every run has a directory of its
    own below `directory`, so a sweep that was interrupted continues where it stood. Writes sweep.json and
    sweep.png there. Raises ConfigError before the first run when any of the configurations is wrong.
    """
    directory = Path(directory)
    swept, plain = split_overrides(overrides)
    runs = []
    for combination in itertools.product(*swept.values()):
        values = dict(zip(swept, combination, strict=True))
        folder = directory / "+".join(_safe(redact(f"{key}={value}")) for key, value in values.items())
        changes = [*plain, *(f"{key}={value}" for key, value in values.items())]
        runs.append((values, folder, load_config(config, [*changes, f"run.dir={json.dumps(str(folder))}"])))
    if len({folder for _, folder, _ in runs}) < len(runs):
        raise ConfigError("two values would share a run directory", "write the values more differently")
    finished: list[Swept] = []
    for number, (values, folder, checked) in enumerate(runs, 1):
        say(f"{number}/{len(runs)}: " + ", ".join(f"{key} = {value}" for key, value in values.items()))
        try:
            report = pretrain(checked)
            finished.append(Swept(values, str(folder), outcome_of(folder, report["metrics"])))
        except Interrupted:
            raise
        except ClipkitError as failure:
            say(f"  failed: {failure.cause}")
            finished.append(Swept(values, str(folder), {}, failure))
            if World.current().size > 1:
                break
    document = [run.document for run in finished]
    write_result({"swept": swept, "runs": document}, directory / "sweep.json")
    draw(finished, directory / "sweep.png")
    return finished


def _safe(text: str) -> str:
    """The text as a folder name; long or odd values stay readable."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("_")[:100]


def records(folder: Path) -> list[dict[str, Any]]:
    """Returns the step records of a run in order; none of a run that wrote no log."""
    if not (folder / "metrics.jsonl").exists():
        return []
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def outcome_of(folder: Path, metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns the loss and accuracy over the last log lines, and every number of the last evaluation.

    Steps that were skipped have no finite loss and do not count.
    """
    last = records(folder)[-_TAIL:]
    found: dict[str, float] = {}
    for name in ("loss", "accuracy"):
        values = [float(record[name]) for record in last if record.get(name) is not None]
        if values:
            found[name] = sum(values) / len(values)
    for label, numbers in metrics.items():
        for name, value in numbers.items():
            # Each recall has two names; one of them is enough in a table.
            if isinstance(value, int | float) and "_retrieval_" not in name and "rank" not in name:
                found[f"{label}/{name}"] = float(value)
    return found


def raise_failures(runs: Sequence[Swept]) -> None:
    """Raises what the first failed run raised, with its values and its exit code; nothing if none failed."""
    failed = [(run, run.failure) for run in runs if run.failure is not None]
    if not failed:
        return
    run, failure = failed[0]
    values = ", ".join(f"{key} = {value}" for key, value in run.values.items())
    error = ClipkitError(f"{len(failed)} of {len(runs)} runs failed; {values}: {failure.cause}", failure.cure)
    error.exit_code = failure.exit_code
    raise error from failure


def draw(runs: Sequence[Swept], path: Path) -> None:
    """Writes a picture: the loss of every run over samples, and every other outcome over the runs."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for run in runs for name in run.outcome if name != "loss"))
    figure = Figure(figsize=(6.4 * (1 + bool(names)), 4.2), layout="tight")
    panels = figure.subplots(1, 1 + bool(names), squeeze=False)
    labels = [
        ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in run.values.items()) for run in runs
    ]
    for run, label in zip(runs, labels, strict=True):
        curve = records(Path(run.directory))
        label = label if run.failure is None else f"{label} (failed)"
        losses = [float("nan") if r["loss"] is None else r["loss"] for r in curve]
        panels[0][0].plot([r["samples"] for r in curve], losses, label=label)
    panels[0][0].set(xlabel="samples", ylabel="loss", title=", ".join(runs[0].values))
    panels[0][0].legend(fontsize=8)
    for name in names:
        heights = [run.outcome.get(name, float("nan")) for run in runs]
        panels[0][1].plot(range(len(runs)), heights, marker="o", label=name)
    if names:
        panels[0][1].set_xticks(range(len(runs)), labels, rotation=20, ha="right", fontsize=8)
        panels[0][1].set(ylabel="outcome", title="last evaluation")
        panels[0][1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
