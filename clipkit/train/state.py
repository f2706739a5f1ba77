"""What a run remembers between two processes, and the way to and from a checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from clipkit.checkpoint import (
    Checkpoint,
    capture_rng,
    load_module_tensors,
    load_optimizer_tensors,
    log_lengths,
    optimizer_tensors,
    part_rows,
    truncate_logs,
)
from clipkit.data.rejects import RejectBudget
from clipkit.learner import Learner
from clipkit.train.setup import Run
from clipkit.types import ConfigError

TOWERS = ("clip.visual.", "clip.text.")
LOGS = ("metrics.jsonl", "rejects.jsonl")


@dataclass
class TrainState:
    """Where a run stands: steps and samples of all ranks, seconds spent training.

    skipped    steps among them whose update was not applied, in all and since the last one that was
    losses     of the last taken steps, means over ranks
    rollbacks  how often a leap of the loss sent the run back to a checkpoint
    passed     numbers (from 0) of the global batches that it passes over since
    counts     what the batches it trained on were made of, of all ranks, under the names of `Batch.counts`
    """

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)
    rollbacks: int = 0
    passed: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def snapshot(run: Run, state: TrainState, budget: RejectBudget) -> dict[str, Any]:
    """Returns what `CheckpointStore.save` is given; the tensors are those of the run, no copies."""
    towers = run.bare.towers
    documents: dict[str, dict[str, Any]] = {
        "trainer": {
            **asdict(state),
            "model_cfg": towers.model_cfg,
            "preprocess_cfg": towers.preprocess_cfg,
            "tokenizer": towers.tokenizer_spec,
            "rejects": budget.state(),
            "teachers": fingerprints(run),
            "teacher_files": run.teacher_files,
            "trackers": run.trackers.runs,
            "scaler": None if run.accelerator.scaler is None else run.accelerator.scaler.state_dict(),
            "logs": log_lengths(run.folder, LOGS),
        },
        "data": run.stream.state(state.step),
    }
    named = dict(run.bare.named_parameters())
    moving, fixed = divide(run.bare)
    moving, rows = part_rows("model", moving)
    fixed, fixed_rows = part_rows("model", fixed)
    moments, more_rows = part_rows("optimizer", optimizer_tensors(run.optimizer.optimizer, named))
    return {
        "step": state.step,
        "tensors": {"model": moving, "optimizer": moments},
        "fixed": {"model": fixed} if fixed else {},
        "rows": rows | more_rows,
        "fixed_rows": fixed_rows,
        "rank_tensors": capture_rng(),
        "documents": documents,
        "identity": {"parameters": sum(p.numel() for p in named.values()), "seed": run.config.run.seed},
    }


def divide(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns (what a run changes, what it never changes) of the Learner's state.

    The second are the frozen parameters of the towers and their copies in averages of weights, which stay
    equal to them bit for bit: a + w * (a - a) = a.
    """
    parameters = learner.towers.clip.named_parameters(prefix="clip")
    frozen = {name for name, x in parameters if not x.requires_grad and name.startswith(TOWERS)}
    moving: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    for name, x in learner.state_dict().items():
        (fixed if name[name.find("clip.") :] in frozen else moving)[name] = x
    return moving, fixed


def belongs(found: Checkpoint, folder: Path) -> bool:
    """Returns whether the checkpoint lies inside the run directory `folder`."""
    return found.path.resolve().is_relative_to(folder.resolve())


def fingerprints(run: Run) -> dict[str, str]:
    """Returns what identifies the weights of the run's fixed teachers."""
    return {} if run.bare.teachers is None else run.bare.teachers.fingerprints


def restore(run: Run, found: Checkpoint, budget: RejectBudget) -> TrainState:
    """Changes the run to what the checkpoint holds and cuts its logs back; returns where it stands.

    The logs of another run's checkpoint are as long as the ones of that run: they are no measure for ours.
    Random states are restored by the caller, after iterators exist.
    """
    trainer = found.document("trainer")
    for name, digest in trainer.get("teachers", {}).items():
        if fingerprints(run).get(name) != digest:
            raise ConfigError(
                f"the teacher {name} has other weights than the ones this run began with",
                "bring back the model it was, or start a new run directory",
            )
    load_module_tensors(run.bare, found.stored("model"))
    load_optimizer_tensors(
        run.optimizer.optimizer, dict(run.bare.named_parameters()), found.stored("optimizer")
    )
    if run.accelerator.scaler is not None and trainer["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(trainer["scaler"])
    budget.load_state(trainer["rejects"])
    if run.world.is_main and belongs(found, run.folder):
        truncate_logs(run.folder, trainer["logs"])
    # Absent in checkpoints that were written before there was such an entry.
    state = TrainState(
        **{entry.name: trainer[entry.name] for entry in fields(TrainState) if entry.name in trainer}
    )
    if run.stream.changed is not None:
        # Other batches than the ones that were to be passed over.
        state.step, state.passed = position(found, run.config.data.batch_size)["step"], []
    return state


def position(found: Checkpoint, batch_size: int) -> dict[str, Any]:
    """Returns the data position of a checkpoint, its step counted in batches of `batch_size`."""
    saved = found.document("data")
    if saved["batch_size"] == batch_size:
        return saved
    return {**saved, "step": found.document("trainer")["samples"] // batch_size}
