"""Towers, tokenizers, heads and the inference handle."""

from __future__ import annotations

from clipkit.models.ema import WeightEMA
from clipkit.models.heads import GlobalBatchNorm, convert_batchnorm
from clipkit.models.model import Model
from clipkit.models.tokenizer import Tokenizer
from clipkit.models.towers import TowerOptions, Towers, build

__all__ = [
    "GlobalBatchNorm",
    "Model",
    "Tokenizer",
    "TowerOptions",
    "Towers",
    "WeightEMA",
    "build",
    "convert_batchnorm",
]
