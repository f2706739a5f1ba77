"""Zero-shot classification and retrieval; every result carries definitions, counts and protocol."""

from clipkit.evaluation.embed import Encoder, UnusableEmbeddings, embed_images, embed_texts
from clipkit.evaluation.results import format_table, write_result
from clipkit.evaluation.retrieval import retrieval, retrieval_metrics
from clipkit.evaluation.zero_shot import zero_shot, zero_shot_metrics

__all__ = [
    "Encoder",
    "UnusableEmbeddings",
    "embed_images",
    "embed_texts",
    "format_table",
    "retrieval",
    "retrieval_metrics",
    "write_result",
    "zero_shot",
    "zero_shot_metrics",
]
