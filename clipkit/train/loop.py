"""The loop: step, log, evaluate, checkpoint, stop; nothing here knows what an objective computes."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit import dist, optim
from clipkit.checkpoint import CheckpointStore, StopSignals
from clipkit.config import parse_interval
from clipkit.data.rejects import RejectBudget
from clipkit.log import RunLog, json_line
from clipkit.train.contributions import Contributions
from clipkit.train.evaluate import evaluate
from clipkit.train.guards import Guard
from clipkit.train.heartbeat import Heartbeat
from clipkit.train.rollback import roll_back
from clipkit.train.saving import Saver
from clipkit.train.setup import Run
from clipkit.train.spikes import Spike
from clipkit.train.state import TrainState
from clipkit.train.step import StepResult, step
from clipkit.train.watch import Watch
from clipkit.types import Batch, ClipkitError, Reject


class Interrupted(ClipkitError):
    """The run was asked to stop and left a checkpoint behind (exit code 130)."""

    exit_code = 130


@dataclass
class Clock:
    """Since the last log line: seconds in all and waiting for data, samples, reads that were tried again."""

    began: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    samples: int = 0
    retries: int = 0  # of this rank

    def read(self) -> dict[str, float]:
        """Returns samples/s and the share of waiting for data, and starts again."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        found = {"samples_per_second": self.samples / seconds, "data_wait": self.waited / seconds}
        self.began, self.waited, self.samples, self.retries = time.perf_counter(), 0.0, 0, 0
        return found


@dataclass
class Loop:
    """One process's share of a running training."""

    run: Run
    state: TrainState
    store: CheckpointStore
    budget: RejectBudget
    log: RunLog
    signals: StopSignals
    heartbeat: Heartbeat
    clock: Clock = field(default_factory=Clock)
    saved_at: float = field(default_factory=time.monotonic)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    watch: Watch = field(init=False)
    guard: Guard = field(init=False)
    saver: Saver = field(init=False)
    contributions: Contributions = field(init=False)
    evaluated_step: int = -1
    evaluated_at: float = field(default_factory=time.monotonic)
    trained: float = 0.0  # seconds of this process in steps and waiting for their data

    def __post_init__(self) -> None:
        self.watch = Watch(self.run.bare, self.run.config.data.batch_size, self.log)
        self.guard = Guard(self.run, self.state, self.log)
        self.saver = Saver(self.run, self.store, self.log)
        self.contributions = Contributions(self.run.stream.counted)

    def train(self, continue_rng: Callable[[], None]) -> None:
        """Runs from the state's step to the last one; `continue_rng` restores the generators."""
        try:
            self._catch_up()
            while (spike := self._train(continue_rng)) is not None:
                continue_rng = self._roll_back(spike)
        finally:
            self.saver.leave()

    def _train(self, continue_rng: Callable[[], None]) -> Spike | None:
        """Returns None at the last step, or the spike that asks for a rollback before it."""
        run, began, started = self.run, time.perf_counter(), False
        run.stream.on_indexing = self._indexing
        batches = run.stream.batches(self.state.step, run.total_steps)
        self.heartbeat.at(self.state.step, "waiting for data")
        asked = time.perf_counter()
        for batch in batches:
            self.clock.waited += time.perf_counter() - asked
            self.clock.retries += batch.retries
            self.heartbeat.at(self.state.step, "in a step")
            if not started:
                # Only now: building iterators and workers draws from the generators.
                continue_rng()
                started = True
                self._save_to_return()
            if self.state.step in self.state.passed:
                self._pass_over()
            else:
                result, spike = self._advance(batch)
                if spike is not None:
                    return spike
                now = time.perf_counter()
                self.state.seconds += now - began
                self.trained += now - asked
                began = now
                self._log(result, batch)
            self._housekeep(batch.rejects)
            self.heartbeat.at(self.state.step, "waiting for data")
            asked = time.perf_counter()
        return None

    def _indexing(self, line: str) -> None:
        # Shards are walked by forked processes, which a thread that is writing may not survive in the child.
        self.saver.settle()
        self.log.note(line)
        self.heartbeat.at(self.state.step, "indexing")
        self.budget.end_of_epoch()

    def _save_to_return(self) -> None:
        if self.run.config.run.on_spike == "rollback" and self.store.newest() is None:
            self._save(must_succeed=True)

    def _roll_back(self, spike: Spike) -> Callable[[], None]:
        """Goes back to the newest checkpoint; returns what restores its random states."""
        self.saver.settle()
        self.state, kept, continue_rng = roll_back(
            self.run, self.store, self.state, self.budget, self.log, spike
        )
        self.__post_init__()
        self.evaluated_step = -1 if kept is None else self.state.step
        self._save(must_succeed=True)
        self._catch_up()
        return continue_rng

    def _pass_over(self) -> None:
        self.state.step += 1
        self.state.samples += self.run.config.data.batch_size
        self.state.skipped += 1

    def _advance(self, batch: Batch) -> tuple[StepResult, Spike | None]:
        run, state, config = self.run, self.state, self.run.config
        factor = optim.lr_factor(
            state.step, run.total_steps, run.warmup_steps, config.optim.schedule, config.optim.final_lr
        )
        optim.set_lr(run.optimizer, factor)
        result = step(
            run.learner,
            run.accelerator,
            run.optimizer,
            batch.to(run.accelerator.device),
            progress=state.step / run.total_steps,
            micro_batch=run.micro_batch,
            clip_norm=config.optim.clip_norm,
            inspect=(state.step + 1) % config.run.diagnose_every == 0,
            accept=self.guard.accept,
        )
        if result.taken:
            run.bare.after_step(state.step, state.step / run.total_steps)
        state.step += 1
        state.samples += config.data.batch_size
        self.clock.samples += config.data.batch_size
        self.contributions.add(batch)
        return result, self.guard.settle(result, batch)

    def _log(self, result: StepResult, batch: Batch) -> None:
        state, run = self.state, self.run
        # Embeddings that are not finite have no spectrum to look at.
        if result.seen and result.taken:
            self.watch.look(state.step, batch, result.seen, result.terms, self.trained)
        if state.step % run.config.run.log_every and state.step < run.total_steps:
            return
        names = [name for name in result.terms if not name.startswith("gradient/")]
        *totals, retries = dist.agree(
            [*(float(result.terms[name]) for name in names), float(self.clock.retries)], "sum"
        )
        self.contributions.settle(state.counts)
        record: dict[str, float | int | str] = {
            "step": state.step,
            "samples": state.samples,
            **state.counts,
            **{name: total / run.world.size for name, total in zip(names, totals, strict=True)},
            "lr": run.optimizer.param_groups[0]["lr"],
            "logit_scale": float(dist.whole(run.bare.towers.logit_scale.detach()).exp()),
            "grad_norm": float(result.grad_norm),
            **self.clock.read(),
        }
        accuracies = [value for name, value in record.items() if name.startswith("accuracy/")]
        if accuracies:
            record["accuracy"] = accuracies[0]
        if run.bare.towers.logit_bias is not None:
            record["logit_bias"] = float(dist.whole(run.bare.towers.logit_bias.detach()))
        if run.accelerator.scaler is not None or state.skipped:
            record["skipped"] = state.skipped
        if retries:
            record["read_retries"] = int(retries)
        self.log.step(record)
        self.watch.record(state.step, record)

    def _housekeep(self, rejects: Sequence[Reject]) -> None:
        run, state, config = self.run, self.state, self.run.config.run
        asked = [
            self.signals.requested or 0,
            self.signals.save_requested,
            len(rejects),
            time.monotonic() - self.saved_at,
            time.monotonic() - self.evaluated_at,
            self.saver.busy,
        ]
        # Clocks differ between ranks, and what one rank decides all must do: one agreement for everything.
        stop, save_asked, rejected, unsaved, unevaluated, busy = dist.agree(
            [float(value) for value in asked], "max"
        )
        if not busy:
            self.saver.settle()
        self._count(rejects, bool(rejected))
        last = state.step == run.total_steps
        due = self._due(config.checkpoint_every, unsaved)
        if due or stop or save_asked or last:
            self.signals.save_requested = False
            self._save(must_succeed=bool(stop) or last)
        if stop and not last:
            name = signal.Signals(int(stop)).name
            raise Interrupted(
                f"stopped by {name} after step {state.step} of {run.total_steps}; checkpoint saved",
                "run the same command again to continue at the next sample",
            )
        # After the checkpoint, which nothing that an evaluation meets may cost.
        if self._evaluation_due(unevaluated):
            self._evaluate()

    def _evaluation_due(self, unevaluated: float) -> bool:
        config = self.run.config.run
        every = config.evaluate_every
        due = every is not None and self._due(every, unevaluated)
        something = config.evaluate or self.run.holdout is not None
        return bool(something) and (due or self.state.step == self.run.total_steps)

    def _due(self, every: int | str, seconds: float) -> bool:
        run = self.run
        return parse_interval(every).due(
            self.state.step, run.total_steps, seconds, run.stream.steps_per_epoch
        )

    def _count(self, rejects: Sequence[Reject], any_rank: bool) -> None:
        found = [r for part in dist.gather_objects(list(rejects)) for r in part] if any_rank else []
        if found and self.run.world.is_main:
            with open(self.run.folder / "rejects.jsonl", "a", encoding="utf-8") as stream:
                for reject in found:
                    line = {"step": self.state.step, **dataclasses.asdict(reject)}
                    stream.write(f"{json_line(line)}\n")
        self.budget.add(found, self.run.config.data.batch_size)
        if self.run.stream.ends_epoch(self.state.step):
            self.budget.end_of_epoch()

    def _evaluate(self) -> None:
        began = time.perf_counter()
        # Its workers are forked, which a thread that is writing may not survive in the child.
        self.saver.settle()
        self.heartbeat.at(self.state.step, "evaluating")
        self.metrics = evaluate(self.run, self.log.note)
        self.evaluated_step, self.evaluated_at = self.state.step, time.monotonic()
        self.log.evaluation(self.state.step, self.metrics)
        # Evaluation is not training time: samples/s and ETA would sag at every evaluation.
        self.clock.began += time.perf_counter() - began

    def _save(self, must_succeed: bool) -> None:
        began = time.perf_counter()
        self.heartbeat.at(self.state.step, "saving a checkpoint")
        self.contributions.settle(self.state.counts)
        self.saver.begin(self.state, self.budget)
        if must_succeed or not self.run.config.run.background_save:
            self.saver.settle(must_succeed)
        self.saved_at = time.monotonic()
        self.clock.began += time.perf_counter() - began

    def _catch_up(self) -> None:
        # A run that stopped between a checkpoint and the evaluation of its step owes that evaluation.
        step = self.state.step
        if step and self.evaluated_step != step and self._evaluation_due(0.0):
            self._evaluate()


def write_config(folder: Path, text: str) -> None:
    """Writes config.yaml of a run directory atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".config.yaml.{os.getpid()}"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / "config.yaml")
