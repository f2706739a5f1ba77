"""Heads, and the batch normalisation over the batch of all ranks that they use. Imports torch alone.

torch's SyncBatchNorm refuses CPU tensors, so the statistics travel through `clipkit.dist` with autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipkit.dist import World, all_reduce_sum


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm for (B, C) and (B, C, ...) inputs whose statistics are those of the global batch.

    State dict, evaluation mode and, on one process, training equal nn.BatchNorm exactly. On several
    ranks value and gradient equal one process with the concatenated batch. Statistics are at least fp32.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions (B, C, ...), got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised input, same shape and dtype; updates running statistics in training."""
        if not self.training or World.current().size == 1:
            return super().forward(input)
        self._check_input_dim(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(torch.promote_types(input.dtype, torch.float32))
            axes = [axis for axis in range(x.ndim) if axis != 1]
            shape = [1, -1] + [1] * (x.ndim - 2)
            rows = x.new_full((1,), x.numel() / x.shape[1])
            # Two reductions: a mean of squares minus a squared mean loses all digits when |mean| >> std.
            total = all_reduce_sum(torch.cat([x.sum(axes), rows]))
            count = total[-1].detach()
            mean = total[:-1] / count
            centred = x - mean.view(shape)
            variance = all_reduce_sum(centred.square().sum(axes)) / count
            y = centred * (variance + self.eps).rsqrt().view(shape)
            if self.affine:
                y = y * self.weight.view(shape) + self.bias.view(shape)
            self._track(mean.detach(), variance.detach(), count)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)


def mlp_head(width: int, hidden: int, out: int, layers: int = 2, last_norm: bool = False) -> nn.Sequential:
    """Returns a head (B, width) -> (B, out): `layers` linear maps, GlobalBatchNorm and ReLU between them.

    last_norm adds a GlobalBatchNorm without scale and shift behind the last map (SimCLR, BYOL v2, MoCo v3);
    linear maps before a norm have no bias. hidden 0 or layers 1: a single linear map.
    """
    if not hidden:
        layers = 1
    modules: list[nn.Module] = []
    for number in range(layers):
        last = number == layers - 1
        target = out if last else hidden
        normed = not last or last_norm
        modules.append(nn.Linear(width, target, bias=not normed))
        if normed:
            modules.append(GlobalBatchNorm(target, affine=not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
        width = target
    return nn.Sequential(*modules)
