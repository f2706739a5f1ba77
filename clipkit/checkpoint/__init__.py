"""Checkpoints that survive a kill at any instant, and what a run needs to continue from one of them."""

from __future__ import annotations

from clipkit.checkpoint.lock import run_lock
from clipkit.checkpoint.logs import log_lengths, truncate_logs
from clipkit.checkpoint.manifest import versions
from clipkit.checkpoint.record import Checkpoint, Skipped
from clipkit.checkpoint.rng import capture_rng, derive_rng, restore_rng
from clipkit.checkpoint.rows import part_rows
from clipkit.checkpoint.signals import StopSignals
from clipkit.checkpoint.state import load_module_tensors, load_optimizer_tensors, optimizer_tensors
from clipkit.checkpoint.store import CheckpointStore, CheckpointWriteError

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "CheckpointWriteError",
    "Skipped",
    "StopSignals",
    "capture_rng",
    "derive_rng",
    "load_module_tensors",
    "load_optimizer_tensors",
    "log_lengths",
    "optimizer_tensors",
    "part_rows",
    "restore_rng",
    "run_lock",
    "truncate_logs",
    "versions",
]
