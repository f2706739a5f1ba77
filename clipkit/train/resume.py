"""What a run finds when it starts: the checkpoint to continue from, and whether it may."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.fsdp import FSDPModule

from clipkit import dist
from clipkit.checkpoint import Checkpoint, CheckpointStore, derive_rng, restore_rng, versions
from clipkit.config import Config, read_values
from clipkit.train.setup import Run
from clipkit.train.state import belongs
from clipkit.types import ConfigError

CONFIG = "config.yaml"
# What run.resume_data lets differ; in another directory also what counts batches and steps.
DATA_KEYS = ("data.train", "data.lanes", "data.window_bytes", "run.seed")
LENGTH_KEYS = ("data.batch_size", "run.samples", "run.epochs", "run.steps")


@dataclass(frozen=True)
class Kept:
    """An evaluation of the checkpoint's step in metrics.jsonl; cut: the log is cut back before it."""

    record: dict[str, Any]
    cut: bool


def find_checkpoint(config: Config, folder: Path, store: CheckpointStore, resume: str) -> Checkpoint | None:
    """Returns the checkpoint to continue from, or None for a new run; all ranks call it.

    Raises ConfigError when the directory, or the run that a path points into, belongs to another
    configuration (naming the keys), with or without a checkpoint, or, with resume "never", when the directory
    holds a checkpoint.
    """
    if resume not in ("auto", "never"):
        named = store.open(Path(resume))
        # RUN/checkpoints/step-...: its configuration lies in RUN.
        home = named.path.resolve().parent.parent
        check_same_run(config, home, elsewhere=home != folder.resolve())
        check_same_run(config, folder)
        return named
    found = store.newest()
    if found is not None and resume == "never":
        raise ConfigError(
            f"{folder} already holds a checkpoint of step {found.step}",
            "choose another run.dir, or remove that directory, or continue with --resume auto",
        )
    check_same_run(config, folder)
    return found


def check_same_run(config: Config, folder: Path, elsewhere: bool = False) -> None:
    """Raises ConfigError naming the keys in which the configuration of the run in `folder` differs.

    elsewhere: a checkpoint of that run is continued in another directory. Under run.resume_data the data may
    differ, and elsewhere the batch and the length too: there no step has been counted yet.
    """
    written = folder / CONFIG
    different = config.differences(read_values(written).tree) if written.exists() else []
    if config.run.resume_data != "exact":
        free = DATA_KEYS + (LENGTH_KEYS if elsewhere else ())
        different = [line for line in different if not line.startswith(free)]
    if different:
        raise ConfigError(
            f"{folder} belongs to a run with other values of {', '.join(different)}", _cure(different)
        )


def _cure(different: list[str]) -> str:
    cure = "choose another run.dir for this configuration, or restore those values to continue"
    if all(line.startswith(DATA_KEYS) for line in different):
        return f"{cure}, or say how to go on with run.resume_data=restart_epoch or continue_reseeded"
    if all(line.startswith(DATA_KEYS + LENGTH_KEYS) for line in different):
        elsewhere = "run.dir=NEW run.resume_data=restart_epoch --resume PATH"
        return f"{cure}, or continue its checkpoint elsewhere: {elsewhere}"
    return cure


def kept_evaluation(run: Run, found: Checkpoint) -> Kept | None:
    """Returns the evaluation of the checkpoint's weights that the run has already logged; all ranks call it.

    None when there is none, when it has an error, or when run.evaluate was something else. To be called
    before the logs are cut back and config.yaml is written again.
    """
    kept = _kept(run, found) if run.world.is_main and belongs(found, run.folder) else None
    first: Kept | None = dist.gather_objects(kept)[0]
    return first


def _kept(run: Run, found: Checkpoint) -> Kept | None:
    path, written = run.folder / "metrics.jsonl", run.folder / CONFIG
    if not path.exists() or not written.exists():
        return None
    if read_values(written).tree.get("run", {}).get("evaluate") != run.config.values()["run"]["evaluate"]:
        return None
    length, offset, kept = found.document("trainer")["logs"].get(path.name, 0), 0, None
    for line in path.read_bytes().splitlines(keepends=True):
        record = _evaluation(line)
        if record is not None and record.get("step") == found.step:
            kept = Kept(record, offset >= length)
        offset += len(line)
    if kept is None or any("error" in numbers for numbers in kept.record["results"].values()):
        return None
    return kept


def _evaluation(line: bytes) -> dict[str, Any] | None:
    """The record of an evaluation on a line of a log; None for others, and for what a kill left torn."""
    if b'"evaluation"' not in line:
        return None
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record if record.get("event") == "evaluation" else None


def continue_rng(run: Run, found: Checkpoint | None) -> None:
    """Restores this rank's random states, or derives them where the number of ranks has changed."""
    if found is None:
        return
    states = found.rank_tensors(run.world.rank) if found.world_size == run.world.size else None
    if states is None:
        derive_rng(run.config.run.seed, found.step, run.world.rank)
    else:
        restore_rng(states)


def _shares(run: Run) -> str:
    return f" of {min(run.stream.shares)} to {max(run.stream.shares)} rows" if run.stream.shares else ""


def guarantee(run: Run, found: Checkpoint) -> str:
    """Returns what holds of a run that continues: exact to the last bit, up to rounding, or neither."""
    if not run.stream.exact:
        return (
            "not exact: this source cannot be indexed, its epoch is read from the start and passed over, and "
            "samples may be seen again or missed"
        )
    if run.stream.changed is not None:
        return (
            f"run.resume_data: {run.config.run.resume_data}: the epoch in progress begins again and may "
            f"repeat samples, everything after is exact ({run.stream.changed})"
        )
    same = "same samples, order and augmentations"
    if found.world_size != run.world.size:
        return (
            f"{found.world_size} -> {run.world.size} process(es){_shares(run)}: {same}; losses equal up to "
            "floating-point order, dropout drawn anew"
        )
    if found.sharded != isinstance(run.bare, FSDPModule):
        return f"run.sharding changed: {same} and random states; losses equal up to floating-point order"
    then, now = (named.get("torch") for named in (found.manifest["versions"], versions()))
    if then != now:
        return f"torch {then} -> {now}: {same} and random states; losses equal up to floating-point order"
    if run.accelerator.device.type != "cpu" and not run.config.run.deterministic:
        return (
            f"{same} and random states; losses within the spread of two uninterrupted runs on "
            f"{run.accelerator.device.type} (run.deterministic: true makes them equal bit for bit)"
        )
    return f"{same} and random states; on the same kind of machine the losses of an unbroken run, bit for bit"
