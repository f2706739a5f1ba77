"""Batch normalisation over the batch of all ranks.

torch's SyncBatchNorm refuses CPU tensors, so the statistics travel through `clipkit.dist` with autograd.
"""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.dist import World, all_reduce_sum
from clipkit.types import ConfigError


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


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d (normalise, drop, activate) with the statistics of the global batch."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Returns the normalised and activated input, same shape and dtype."""
        return self.act(self.drop(super().forward(input)))


def batchnorm_layers(module: nn.Module) -> list[str]:
    """Returns the names of the BatchNorm layers inside `module`."""
    return [name for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]


def convert_batchnorm(module: nn.Module) -> int:
    """Replaces every BatchNorm layer inside `module`, in place, sharing its tensors; returns how many.

    Raises ConfigError for a kind of BatchNorm whose forward is not known.
    """
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm):
            if isinstance(child, GlobalBatchNorm):
                continue
            if type(child) not in known:
                raise ConfigError(
                    f"BatchNorm of unknown type {type(child).__name__} cannot share statistics across ranks",
                    "freeze this tower (freeze: trunk) or choose one without it",
                )
            setattr(module, name, _converted(child))
            count += 1
        else:
            count += convert_batchnorm(child)
    return count


def _converted(layer: _BatchNorm) -> GlobalBatchNorm:
    kind = GlobalBatchNormAct if isinstance(layer, BatchNormAct2d) else GlobalBatchNorm
    new = kind(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(new, name, parameter)
    for name, buffer in layer.named_buffers(recurse=False):
        setattr(new, name, buffer)
    for name, child in layer.named_children():
        setattr(new, name, child)
    new.training = layer.training
    return new
