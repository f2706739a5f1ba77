"""Training: `pretrain()` from a configuration, `step()` for those who bring their own loop."""

from clipkit.train.pretrain import pretrain
from clipkit.train.step import StepResult, cached_backward, full_backward, step

__all__ = ["StepResult", "cached_backward", "full_backward", "pretrain", "step"]
