"""`pretrain()`: from a configuration to a trained, exported model, or on from its last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clipkit import dist
from clipkit.checkpoint import Checkpoint, CheckpointStore, StopSignals, run_lock, truncate_logs
from clipkit.config import Config, load_config, make_config, parse_interval
from clipkit.data.rejects import RejectBudget
from clipkit.dist import World
from clipkit.export import exported_tensors, save_open_clip
from clipkit.log import RunLog
from clipkit.train.contributions import describe_counts
from clipkit.train.evaluate import check_data
from clipkit.train.heartbeat import Heartbeat
from clipkit.train.loop import Loop, write_config
from clipkit.train.rehearsal import describe, rehearse
from clipkit.train.resume import continue_rng, find_checkpoint, guarantee, kept_evaluation
from clipkit.train.setup import COLLECTIVE_GRACE_S, Run, make_accelerator, prepare
from clipkit.train.state import LOGS, TrainState, belongs, position, restore
from clipkit.train.teachers import store_teachers, stored_teachers
from clipkit.train.trackers import check_trackers


def pretrain(
    config: Config | dict[str, Any] | str | Path, *, resume: str = "auto", dry_run: bool = False
) -> dict[str, Any]:
    """Trains the model of `config` (a Config, a dict of its values, or the path of a YAML file).

    Writes config.yaml, metrics.jsonl, rejects.jsonl, checkpoints/, teachers/ (when objectives name fixed
    ones) and export/ into the run directory and returns {"run_dir", "steps", "samples", "seconds", "counts",
    "metrics", "export"}, `counts` being samples by source of a mixture and captions by field where a source
    names several. resume: "auto" continues the directory's newest valid checkpoint at the very next sample,
    "never" refuses a directory that has one, a path continues that checkpoint, of this run or of another one
    of the same configuration. dry_run builds everything, runs a few steps, writes nothing but the index of
    the shards (of raw data the shards too), and returns what the run would cost. Raises the ClipkitError
    family.
    """
    if isinstance(config, dict):
        config = make_config(config)
    elif not isinstance(config, Config):
        config = load_config(config)
    folder = Path(config.run.dir or "runs/pretrain")
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    timeout = parse_interval(config.run.timeout).seconds
    assert timeout is not None, "the schema takes durations only"
    accelerator = make_accelerator(config.run.precision, config.run.deterministic, timeout)
    world = World.current()
    check_data(config.run.evaluate)
    check_trackers(config.run.trackers)
    if dry_run:
        run = prepare(config, folder, accelerator)
        try:
            return rehearse(run)
        finally:
            run.stream.close()
    with run_lock(folder):
        group = dist.background_group(timeout + COLLECTIVE_GRACE_S)
        store = CheckpointStore(folder / "checkpoints", world, config.run.keep_checkpoints, group)
        heartbeat = Heartbeat(folder, world, timeout)
        heartbeat.prepare()
        store.prepare()
        found = find_checkpoint(config, folder, store, resume)
        stored = stored_teachers(found)
        saved = None if found is None else position(found, config.data.batch_size)
        run = prepare(config, folder, accelerator, saved, stored)
        try:
            return _run(run, store, found, stored, heartbeat)
        finally:
            run.stream.close()


def _run(
    run: Run,
    store: CheckpointStore,
    found: Checkpoint | None,
    stored: Mapping[str, Path],
    heartbeat: Heartbeat,
) -> dict[str, Any]:
    kept = None if found is None else kept_evaluation(run, found)
    data = run.config.data
    budget = RejectBudget(data.max_reject_fraction, data.max_consecutive, data.max_lost_chunks)
    state = TrainState() if found is None else restore(run, found, budget)
    # After the checkpoint has recognised them.
    store_teachers(run, stored, found)
    if run.world.is_main:
        if found is None:
            # A run killed before its first checkpoint starts again, and so do its logs.
            truncate_logs(run.folder, dict.fromkeys(LOGS, 0))
        write_config(run.folder, run.config.dump())
        run.bare.towers.tokenizer.save(run.folder / "tokenizer")
    log = RunLog(run.folder, total_steps=run.total_steps, is_main=run.world.is_main, start_step=state.step)
    try:
        follow(run, found, log)
        for line in describe(run):
            log.note(line)
        for path, reason in store.skipped:
            log.note(f"warning: skipped checkpoint {path}: {reason}")
        if found is not None:
            log.note(f"continuing {found.path} at step {state.step} of {run.total_steps}")
            log.note(guarantee(run, found))
            _record_changes(log, run, found, state)
        with StopSignals() as signals, heartbeat:
            loop = Loop(run, state, store, budget, log, signals, heartbeat)
            if kept is not None:
                loop.evaluated_step, loop.metrics = state.step, kept.record["results"]
                if kept.cut:
                    log.append(kept.record, again=True)
            loop.train(lambda: continue_rng(run, found))
        exported = export_final(run)
        state = loop.state
        for line in describe_counts(state.counts):
            log.note(line)
        log.note(f"done: {state.step} steps, {state.samples} samples; model in {exported}")
    finally:
        run.trackers.close()
        log.close()
    return {
        "run_dir": str(run.folder),
        "steps": state.step,
        "samples": state.samples,
        "seconds": state.seconds,
        "counts": dict(state.counts),
        "metrics": loop.metrics,
        "export": str(exported),
    }


def _record_changes(log: RunLog, run: Run, found: Checkpoint, state: TrainState) -> None:
    """Writes into metrics.jsonl what differs from the run that wrote the checkpoint."""
    if run.stream.changed is not None:
        way = run.config.run.resume_data
        log.append(
            {"event": "data_changed", "step": state.step, "resume_data": way, "cause": run.stream.changed}
        )
    if found.world_size != run.world.size:
        sizes = {"from": found.world_size, "to": run.world.size, "rows": list(run.stream.shares)}
        log.append({"event": "processes", "step": state.step, **sizes, "holds": guarantee(run, found)})


def follow(run: Run, found: Checkpoint | None, log: RunLog) -> None:
    """Starts the trackers on rank 0, in the runs that the checkpoint names if it is one of this directory."""
    if not run.world.is_main:
        return
    known = found.document("trainer").get("trackers", {}) if found and belongs(found, run.folder) else {}
    run.trackers.start(None if found is None else found.step, known, log.note)
    log.follow(run.trackers.log)


def export_final(run: Run) -> Path:
    """Writes export/ of the run directory, the averaged weights when the run keeps them; returns its path."""
    towers = run.bare.towers if run.bare.ema is None else run.bare.ema.towers
    out = run.folder / "export"
    # On every rank: the rows of sharded towers come from all of them.
    tensors = exported_tensors(towers)
    if run.world.is_main:
        save_open_clip(towers, out, extra_files={"clipkit_config.yaml": run.config.dump()}, tensors=tensors)
    dist.barrier()
    return out
