"""What a run would cost: the banner of every run, and the dry run that measures a few steps."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from clipkit import dist
from clipkit.train.setup import Run
from clipkit.train.state import divide
from clipkit.train.step import step

MEASURED_STEPS = 5


def describe(run: Run) -> list[str]:
    """Returns the lines of the start banner: ranks, model, data, order, length, and what is special."""
    config, stream = run.config, run.stream
    micro = "" if run.micro_batch is None else f", micro-batches of {run.micro_batch}"
    lines = [
        f"{run.world.size} process(es) on {run.accelerator.device.type}, {config.run.precision}, "
        f"torch {torch.__version__}" + (", sharded (fsdp2)" if isinstance(run.bare, FSDPModule) else ""),
        f"model: {run.parameters:,} trainable parameters, {run.bare.towers.image_size[0]} pixels, "
        f"{run.bare.towers.context_length} tokens",
        f"data: {stream.summary()}",
        *stream.describe_sources(run.total_steps),
        *run.data_lines,
        f"length: {run.total_steps:,} steps of {config.data.batch_size} samples{micro}, "
        f"warm-up {run.warmup_steps}, lr {max(g['peak_lr'] for g in run.optimizer.param_groups):g}",
        f"can continue on these numbers of processes: {stream.describe_worlds()}",
    ]
    return lines + [f"note: {note}" for note in run.notes]


def tensor_bytes(tensors: Any) -> int:
    """Returns the bytes of an iterable of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def rehearse(run: Run) -> dict[str, Any]:
    """Runs a few real steps and returns the cost of the whole run; writes no files.

    samples_per_s and seconds_left come from the steps after the first; memory is the peak of this
    process in bytes (on CUDA: of the device). deterministic_slowdown, with run.deterministic: the time of a
    step over that of one without.
    """
    slowest = _typical_step(run)
    rate = run.config.data.batch_size / slowest
    moving, fixed = divide(run.bare)
    steps = run.stream.steps_per_epoch
    teachers = {} if run.bare.teachers is None else run.bare.teachers.fixed_towers
    kept = [*fixed.values(), *(x for towers in teachers.values() for x in towers.state_dict().values())]
    moments = sum(
        tensor_bytes(x for x in state.values() if isinstance(x, torch.Tensor))
        for state in run.optimizer.state.values()
    )
    return {
        "summary": describe(run),
        "parameters": run.parameters,
        "samples_per_epoch": None if steps is None else steps * run.config.data.batch_size,
        "steps": run.total_steps,
        "samples_per_s": rate,
        "seconds_left": run.total_steps * slowest,
        "memory_bytes": peak_memory(run.accelerator.device),
        "checkpoint_bytes": tensor_bytes(moving.values()) + moments,
        "stored_once_bytes": tensor_bytes(kept),
        "checkpoints_kept": run.config.run.keep_checkpoints,
        "world_sizes": run.stream.world_sizes(),
        **(
            {"deterministic_slowdown": slowest / _as_fast_as_can_be(run)}
            if run.config.run.deterministic
            else {}
        ),
    }


def _typical_step(run: Run) -> float:
    """Returns the median seconds of a few steps of the slowest rank, and changes the weights by them."""
    seconds: list[float] = []
    began = time.perf_counter()
    for batch in run.stream.batches(0, min(MEASURED_STEPS, run.total_steps)):
        step(
            run.learner,
            run.accelerator,
            run.optimizer,
            batch.to(run.accelerator.device),
            micro_batch=run.micro_batch,
            clip_norm=run.config.optim.clip_norm,
        )
        run.bare.after_step(0, 0.0)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    # The first step pays for worker start, allocation and kernel selection.
    typical = sorted(seconds[1:] or seconds)[len(seconds[1:] or seconds) // 2]
    return dist.agree([typical])[0]


def _as_fast_as_can_be(run: Run) -> float:
    """Returns the seconds of a step whose kernels need not be deterministic."""
    torch.use_deterministic_algorithms(False)
    try:
        return _typical_step(run)
    finally:
        torch.use_deterministic_algorithms(True)


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: of the device on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
