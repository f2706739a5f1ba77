"""BatchNorm inside a tower: found, and replaced by one with the statistics of the global batch."""

from __future__ import annotations

from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.models.heads import GlobalBatchNorm
from clipkit.types import ConfigError


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
