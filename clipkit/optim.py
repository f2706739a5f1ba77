"""Parameter groups, the optimizer and schedules: pure functions of the parameters and of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, lr_of: Mapping[str, float]
) -> list[dict[str, object]]:
    """Returns optimizer groups of the trainable parameters.

    Vectors and scalars (biases, norms, temperature) are not decayed. `lr_of` maps a name prefix to a
    peak learning rate of its own; every group keeps its peak under "peak_lr".
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        peak = next((rate for prefix, rate in lr_of.items() if name.startswith(prefix)), lr)
        groups.setdefault((peak, decay), []).append(parameter)
    return [
        {"params": members, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        for (peak, decay), members in groups.items()
    ]


def adamw(groups: list[dict[str, object]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """Returns AdamW over the groups, fused where the device has that kernel."""
    devices = {p.device.type for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=devices <= {"cpu", "cuda"})


def lr_factor(step: int, total: int, warmup: int, schedule: str, final: float) -> float:
    """Returns the learning rate of step 0..total-1 as a fraction of its peak.

    Linear warm-up over `warmup` steps that ends at the peak, then cosine to `final`, or constant.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Changes the learning rate of every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
