"""An exponential moving average of the weights, evaluated beside the raw ones."""

from __future__ import annotations

import copy

import torch
from torch import nn

from clipkit.dist import own_rows
from clipkit.models.towers import Towers


class WeightEMA(nn.Module):
    """A frozen copy of `Towers` in `.towers` that follows the trained ones.

    The decay ramps up, d(t) = min(decay, (1 + t) / (10 + t)), so that early averages forget the random
    start. Buffers (BatchNorm statistics) are copied; the copy stays in evaluation mode for good.
    """

    def __init__(self, source: Towers, decay: float = 0.9998) -> None:
        super().__init__()
        self.decay = decay
        self.towers = copy.deepcopy(source)
        self.towers.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> WeightEMA:
        """Stays in evaluation mode, whatever `mode` says."""
        super().train(False)
        return self

    def decay_at(self, step: int) -> float:
        """Returns the decay of update number `step` (from 0)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, source: Towers, step: int) -> None:
        """Moves the average towards `source`: w_ema <- d w_ema + (1 - d) w."""
        averaged, trained = dict(self.towers.named_parameters()), dict(source.named_parameters())
        torch._foreach_lerp_(
            [own_rows(x) for x in averaged.values()],
            [own_rows(trained[name]) for name in averaged],
            1 - self.decay_at(step),
        )
        buffers = dict(source.named_buffers())
        for name, buffer in self.towers.named_buffers():
            buffer.copy_(buffers[name])
