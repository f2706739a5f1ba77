"""Zero-shot classification, retrieval and probes; every result carries definitions, counts and protocol.

The names below load what they need when they are first used: writing an evaluation set needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.evaluation.embed import Encoder, UnusableEmbeddings, embed_images, embed_texts
    from clipkit.evaluation.results import format_table, result_text, write_result

_HOMES = {
    "Encoder": "embed",
    "UnusableEmbeddings": "embed",
    "embed_images": "embed",
    "embed_texts": "embed",
    "format_table": "results",
    "result_text": "results",
    "write_result": "results",
}

__all__ = [
    "Encoder",
    "UnusableEmbeddings",
    "embed_images",
    "embed_texts",
    "format_table",
    "result_text",
    "write_result",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
