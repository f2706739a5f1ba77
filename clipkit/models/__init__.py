"""Towers, tokenizers, heads and the inference handle.

The names below load what they need when they are first used: a head needs torch alone, towers need open_clip.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.models.batchnorm import convert_batchnorm
    from clipkit.models.ema import WeightEMA
    from clipkit.models.heads import GlobalBatchNorm
    from clipkit.models.model import Model
    from clipkit.models.tokenizer import Tokenizer
    from clipkit.models.towers import TowerOptions, Towers, build

_HOMES = {
    "GlobalBatchNorm": "heads",
    "Model": "model",
    "Tokenizer": "tokenizer",
    "TowerOptions": "towers",
    "Towers": "towers",
    "WeightEMA": "ema",
    "build": "towers",
    "convert_batchnorm": "batchnorm",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
