"""`clipkit quickstart` and `clipkit pretrain`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from clipkit.cli.output import duration, say, size, table


class Corpus(StrEnum):
    """The two corpora that clipkit draws itself."""

    scenes = "scenes"
    characters = "characters"


def quickstart(
    directory: Annotated[Path, typer.Option("--dir", help="Where data, run and export are written.")] = Path(
        "runs/quickstart"
    ),
    gate: Annotated[bool, typer.Option("--gate", help="Exit with 4 below the recorded floor.")] = False,
    corpus: Annotated[Corpus, typer.Option(help="What is drawn and learned.")] = Corpus.scenes,
) -> None:
    """Draw a corpus, pretrain on it, evaluate on held-out data, export: offline, on a CPU, in minutes.

    Example: clipkit quickstart --dir runs/quickstart
    """
    from clipkit import quickstart as work

    work.run(directory, gate, corpus.value)


def _rehearsal(report: Mapping[str, Any]) -> list[str]:
    per_epoch = report["samples_per_epoch"]
    rows = [
        ["samples per epoch", "not known yet" if per_epoch is None else f"{per_epoch:,}"],
        ["steps", f"{report['steps']:,}"],
        ["speed", f"{report['samples_per_s']:,.1f} samples/s"],
        ["time to the end", duration(report["seconds_left"])],
        ["peak memory", size(report["memory_bytes"])],
        ["checkpoint", f"{size(report['checkpoint_bytes'])}, {report['checkpoints_kept']} kept"],
    ]
    if report["stored_once_bytes"]:
        rows.append(["frozen weights", f"{size(report['stored_once_bytes'])}, stored once"])
    if "deterministic_slowdown" in report:
        rows.append(["run.deterministic", f"{report['deterministic_slowdown']:.2f} x the time of a step"])
    # The summary begins like the banner of a run: parameters, data, length, world sizes that can resume.
    return [*report["summary"], *table(rows)]


def pretrain(
    config: Annotated[
        Path, typer.Argument(help="A YAML file; see `clipkit configs ls`.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example optim.lr=3e-4.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|PATH", help="Continue the newest checkpoint, none, or this one."),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Build everything, run a few steps, print the cost; writes an index and shards of raw data.",
        ),
    ] = False,
) -> None:
    """Train a model, or continue at the very next sample after the last checkpoint.

    Example: clipkit pretrain configs/my_run.yaml run.epochs=6
    Several processes: torchrun --nproc_per_node 2 -m clipkit pretrain configs/my_run.yaml
    """
    from clipkit.config import load_config

    # Checked before torch is imported: a typo costs a fraction of a second.
    checked = load_config(config, overrides or [])
    from clipkit.train import pretrain as work

    report = work(checked, resume=resume, dry_run=dry_run)
    if dry_run:
        say(*_rehearsal(report))
        return
    say(f"{report['steps']:,} steps, {report['samples']:,} samples, {duration(report['seconds'])}")
    say(f"run directory {report['run_dir']}, model {report['export']}")


def sweep(
    config: Annotated[
        Path, typer.Argument(help="A YAML file; see `clipkit configs ls`.", show_default=False)
    ],
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=V1,V2[,...] [KEY=VALUE]...", help="At least one key with several values."
        ),
    ],
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the runs go; runs/sweep-<config> by default.")
    ] = None,
) -> None:
    """Train one run per value of a key (per combination for several keys) and compare them.

    Example: clipkit sweep configs/simclr.yaml objectives.0.temperature=0.1,0.2,0.5 run.steps=200
    An interrupted sweep continues with the same command. Writes sweep.json and sweep.png. A run that fails
    does not stop the others; the exit code is that of the first failure.
    """
    from clipkit.train.sweep import raise_failures
    from clipkit.train.sweep import sweep as work

    directory = directory or Path("runs") / f"sweep-{config.stem}"
    runs = work(config, overrides, directory, say)
    names = list(dict.fromkeys(name for run in runs for name in run.outcome)) or ["outcome"]
    rows = [[*runs[0].values, *names]]
    for run in runs:
        none = "--" if run.failure is None else "failed"
        numbers = (f"{run.outcome[name]:.4g}" if name in run.outcome else none for name in names)
        rows.append([*run.values.values(), *numbers])
    say(*table(rows))
    say(f"written to {directory}/sweep.json and {directory}/sweep.png")
    raise_failures(runs)
