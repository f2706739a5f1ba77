"""`pretrain()`: from a configuration to a trained, exported model, or on from its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clipkit import dist
from clipkit.checkpoint import (
    Checkpoint,
    CheckpointStore,
    StopSignals,
    derive_rng,
    restore_rng,
    run_lock,
    truncate_logs,
)
from clipkit.config import Config, load_config, make_config, read_values
from clipkit.data.rejects import RejectBudget
from clipkit.dist import World
from clipkit.export import save_open_clip
from clipkit.log import RunLog
from clipkit.train.evaluate import check_data
from clipkit.train.loop import Loop, write_config
from clipkit.train.rehearsal import describe, rehearse
from clipkit.train.setup import Run, make_accelerator, prepare
from clipkit.train.state import LOGS, TrainState, restore
from clipkit.types import ConfigError


def pretrain(
    config: Config | dict[str, Any] | str | Path, *, resume: str = "auto", dry_run: bool = False
) -> dict[str, Any]:
    """Trains the model of `config` (a Config, a dict of its values, or the path of a YAML file).

    Writes config.yaml, metrics.jsonl, rejects.jsonl, checkpoints/ and export/ into the run directory and
    returns {"run_dir", "steps", "samples", "seconds", "metrics", "export"}. resume: "auto" continues the
    directory's newest valid checkpoint at the very next sample, "never" refuses a directory that has one,
    a path continues that checkpoint. dry_run builds everything, runs a few steps, writes nothing and
    returns what the run would cost. Raises the ClipkitError family.
    """
    if isinstance(config, dict):
        config = make_config(config)
    elif not isinstance(config, Config):
        config = load_config(config)
    folder = Path(config.run.dir or "runs/pretrain")
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    accelerator = make_accelerator(config.run.precision, config.run.deterministic)
    world = World.current()
    check_data(config.run.evaluate)
    if dry_run:
        run = prepare(config, folder, accelerator)
        try:
            return rehearse(run)
        finally:
            run.stream.close()
    with run_lock(folder):
        store = CheckpointStore(folder / "checkpoints", world, keep=config.run.keep_checkpoints)
        store.prepare()
        found = find_checkpoint(config, folder, store, resume)
        run = prepare(config, folder, accelerator, None if found is None else found.document("data"))
        try:
            return _run(run, store, found)
        finally:
            run.stream.close()


def find_checkpoint(config: Config, folder: Path, store: CheckpointStore, resume: str) -> Checkpoint | None:
    """Returns the checkpoint to continue from, or None for a new run; all ranks call it.

    Raises ConfigError when the directory belongs to a run of another configuration (naming the keys) or,
    with resume "never", when it holds a checkpoint.
    """
    if resume not in ("auto", "never"):
        return store.open(Path(resume))
    found = store.newest()
    if found is None:
        return None
    if resume == "never":
        raise ConfigError(
            f"{folder} already holds a checkpoint of step {found.step}",
            "choose another run.dir, or remove that directory, or continue with --resume auto",
        )
    written = folder / "config.yaml"
    different = config.differences(read_values(written).tree) if written.exists() else []
    if different:
        raise ConfigError(
            f"{folder} belongs to a run with other values of {', '.join(different)}",
            "choose another run.dir for this configuration, or restore those values to continue",
        )
    return found


def _run(run: Run, store: CheckpointStore, found: Checkpoint | None) -> dict[str, Any]:
    budget = RejectBudget(run.config.data.max_reject_fraction, run.config.data.max_consecutive)
    state = TrainState() if found is None else restore(run, found, budget)
    if run.world.is_main:
        if found is None:
            # A run killed before its first checkpoint starts again, and so do its logs.
            truncate_logs(run.folder, dict.fromkeys(LOGS, 0))
        write_config(run.folder, run.config.dump())
        run.bare.towers.tokenizer.save(run.folder / "tokenizer")
    log = RunLog(run.folder, total_steps=run.total_steps, is_main=run.world.is_main, start_step=state.step)
    try:
        for line in describe(run):
            log.note(line)
        for path, reason in store.skipped:
            log.note(f"warning: skipped checkpoint {path}: {reason}")
        if found is not None:
            log.note(f"continuing {found.path} at step {state.step} of {run.total_steps}")
            if found.world_size != run.world.size:
                log.note(
                    f"{found.world_size} -> {run.world.size} process(es): same samples and order, "
                    "losses equal up to floating-point order, dropout drawn anew"
                )
        with StopSignals() as signals:
            loop = Loop(run, state, store, budget, log, signals)
            loop.train(lambda: continue_rng(run, found))
        exported = export_final(run)
        log.note(f"done: {state.step} steps, {state.samples} samples; model in {exported}")
    finally:
        log.close()
    return {
        "run_dir": str(run.folder),
        "steps": state.step,
        "samples": state.samples,
        "seconds": state.seconds,
        "metrics": loop.metrics,
        "export": str(exported),
    }


def continue_rng(run: Run, found: Checkpoint | None) -> None:
    """Restores this rank's random states, or derives them where the number of ranks has changed."""
    if found is None:
        return
    states = found.rank_tensors(run.world.rank) if found.world_size == run.world.size else None
    if states is None:
        derive_rng(run.config.run.seed, found.step, run.world.rank)
    else:
        restore_rng(states)


def export_final(run: Run) -> Path:
    """Writes export/ of the run directory, the averaged weights when the run keeps them; returns its path."""
    towers = run.bare.towers if run.bare.ema is None else run.bare.ema.towers
    out = run.folder / "export"
    if run.world.is_main:
        save_open_clip(towers, out, extra_files={"clipkit_config.yaml": run.config.dump()})
    dist.barrier()
    return out
