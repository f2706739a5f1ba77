"""One training step, plain or with gradient caching; callable on a CPU with four images.

Micro-batches never change the loss: embeddings are computed piece by piece, the objectives see the whole
batch once, and each piece is run again with the cotangents of its embeddings (gradient caching,
arXiv:2101.06983). Plain gradient accumulation would shrink the set of negatives and is not offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit import dist
from clipkit.checkpoint import capture_rng, restore_rng
from clipkit.learner import extras_of, inputs_of
from clipkit.types import Batch


@dataclass(frozen=True)
class StepResult:
    """What one step found: named terms (), the gradient norm before clipping, and whether weights moved.

    loss    the mean over ranks, the same number on every rank
    finite  whether loss and gradient norm are, on all ranks
    seen    with `inspect`, this rank's embeddings by name, such as "joint.image" (B, D)
    """

    terms: dict[str, Tensor]
    grad_norm: Tensor
    loss: float
    finite: bool
    taken: bool
    seen: dict[str, Tensor] = field(default_factory=dict)


def full_backward(
    learner: nn.Module, accelerator: Accelerator, batch: Batch, progress: float, inspect: bool = False
) -> dict[str, Tensor]:
    """Fills the gradients from one forward of the whole batch; returns the terms."""
    outputs = learner(
        "full",
        **inputs_of(batch),
        extras=extras_of(batch),
        progress=progress,
        inspect=inspect,
        shares=batch.shares,
    )
    accelerator.backward(outputs["loss"])
    return outputs


def cached_backward(
    learner: nn.Module,
    accelerator: Accelerator,
    batch: Batch,
    progress: float,
    micro_batch: int,
    inspect: bool = False,
) -> dict[str, Tensor]:
    """Fills the gradients of the whole batch with at most `micro_batch` samples in flight; returns the terms.

    Random states are replayed, so dropout draws the same masks in both passes. Every backward but the
    last runs under no_sync; the last one reduces what all of them accumulated, which needs
    `find_unused_parameters=True` (temperature and heads got their gradient before it). Ranks may differ in
    the number of pieces: no collective runs in a piece but the last. A sharded learner has no no_sync: every
    backward reduces what it adds, so that no rank ever holds all gradients, and all have equally many pieces.
    """
    pieces = [batch.rows(start, start + micro_batch) for start in range(0, len(batch), micro_batch)]
    states, embedded = [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(capture_rng())
            embedded.append(learner("embed", **inputs_of(piece), teach=True))
    leaves = {name: torch.cat([part[name] for part in embedded]).detach() for name in embedded[0]}
    for name, leaf in leaves.items():
        # What teachers say has no graph to send a cotangent into.
        leaf.requires_grad_(not name.startswith("teacher."))
    clip = accelerator.unwrap_model(learner).towers.clip
    moving = any(p.requires_grad for tower in (clip.visual, clip.text) for p in tower.parameters())
    # On towers that stand still no backward follows which would reduce the gradients of the heads.
    with accelerator.no_sync(learner) if moving else nullcontext():
        outputs = learner(
            "score",
            embeddings=leaves,
            extras=extras_of(batch),
            progress=progress,
            inspect=inspect,
            shares=batch.shares,
        )
        accelerator.backward(outputs["loss"])
    if not moving:
        return outputs
    after = capture_rng()
    cotangents = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for number, piece in enumerate(pieces):
        start = number * micro_batch
        rows = {name: grad[start : start + len(piece)] for name, grad in cotangents.items()}
        restore_rng(states[number])
        if number + 1 < len(pieces):
            with accelerator.no_sync(learner):
                _surrogate_backward(learner, piece, rows)
        else:
            _surrogate_backward(learner, piece, rows)
    restore_rng(after)
    return outputs


def _surrogate_backward(learner: nn.Module, piece: Batch, cotangents: dict[str, Tensor]) -> None:
    # A plain backward: under fp16 the cotangents already carry the loss scale.
    learner("surrogate", **inputs_of(piece), cotangents=cotangents)["loss"].backward()


def step(
    learner: nn.Module,
    accelerator: Accelerator,
    optimizer: Any,
    batch: Batch,
    *,
    progress: float = 0.0,
    micro_batch: int | None = None,
    clip_norm: float | None = None,
    inspect: bool = False,
    accept: Callable[[float], bool] = lambda loss: True,
) -> StepResult:
    """Changes the weights by one optimizer step over the global batch; returns what it found.

    `learner` is the prepared module, `batch` holds this rank's rows. The caller runs `after_step` when the
    step was taken: loss and gradient are finite on all ranks, and `accept` returned True for the mean loss.
    Otherwise nothing has changed (under fp16 a gradient that is not finite lowers the loss scale). `inspect`
    adds the embeddings and, per term, "gradient/<label>"; it changes nothing of the step.
    """
    statistics = running_statistics(learner)
    before = [buffer.clone() for buffer in statistics]
    # One way for all ranks, also where only the largest needs pieces: collectives come in other orders.
    if micro_batch is not None and micro_batch < max(batch.shares, default=len(batch)):
        outputs = cached_backward(learner, accelerator, batch, progress, micro_batch, inspect)
    else:
        outputs = full_backward(learner, accelerator, batch, progress, inspect)
    limit = float("inf") if clip_norm is None else clip_norm
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    norm = dist.whole(accelerator.clip_grad_norm_(trained, limit))
    # The norm, not `optimizer_step_was_skipped`: a fused optimizer skips inside its kernel, unseen. And the
    # loss: a value that is not finite can have a finite gradient, and on its own rank alone.
    own = torch.stack([outputs["loss"].detach().float().reshape(()), norm.detach().float()])
    # Gathered and added up in rank order: every rank decides on the same bits.
    losses, norms = dist.gather(own[None]).T.tolist()
    finite = all(math.isfinite(value) for value in (*losses, *norms))
    loss = sum(losses) / len(losses)
    taken = finite and accept(loss)
    if taken:
        optimizer.step()
    else:
        if accelerator.scaler is not None:
            accelerator.scaler.update()
        with torch.no_grad():
            for buffer, value in zip(statistics, before, strict=True):
                buffer.copy_(value)
    optimizer.zero_grad(set_to_none=True)
    seen = {name[10:]: x for name, x in outputs.items() if name.startswith("embedding.")}
    terms = {name: x.detach() for name, x in outputs.items() if not name.startswith("embedding.")}
    return StepResult(terms, norm.detach(), loss, finite, taken, seen)


def running_statistics(learner: nn.Module) -> list[Tensor]:
    """Returns the buffers that a forward changes: running means, variances and counts of BatchNorm."""
    layers = [module for module in learner.modules() if isinstance(module, _BatchNorm) and module.training]
    return [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
