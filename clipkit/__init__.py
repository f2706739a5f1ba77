"""clipkit: pretrain, fine-tune, evaluate and ship CLIP-style image-text models.

The promised names below load what they need when they are first used: `import clipkit` loads no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.config import Config as Config
    from clipkit.evaluation.retrieval import retrieval as retrieval
    from clipkit.evaluation.zero_shot import zero_shot as zero_shot
    from clipkit.export.load import export as export
    from clipkit.export.load import load as load
    from clipkit.objectives import OBJECTIVES as OBJECTIVES
    from clipkit.objectives import Objective as Objective
    from clipkit.train.pretrain import pretrain as pretrain
    from clipkit.types import Batch as Batch
    from clipkit.types import Embeddings as Embeddings

_HOMES = {
    "load": "clipkit.export",
    "pretrain": "clipkit.train",
    "zero_shot": "clipkit.evaluation.zero_shot",
    "retrieval": "clipkit.evaluation.retrieval",
    "export": "clipkit.export",
    "Config": "clipkit.config",
    "Batch": "clipkit.types",
    "Embeddings": "clipkit.types",
    "Objective": "clipkit.objectives",
    "OBJECTIVES": "clipkit.objectives",
}

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Config",
    "Embeddings",
    "Objective",
    "__version__",
    "export",
    "load",
    "pretrain",
    "retrieval",
    "zero_shot",
]

try:
    __version__ = version("clipkit")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """Keeps `clipkit.export` the function: importing the folder of that name would otherwise replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
