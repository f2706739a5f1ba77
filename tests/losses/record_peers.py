r"""Writes peer_values.json: values and gradients of other libraries' losses on inputs drawn here.

They are no dependency of clipkit. From the root of the repository, with a throw-away environment:

    uv venv /tmp/peers
    uv pip install --python /tmp/peers lightly==1.6.0 pytorch-metric-learning==2.9.0 \
        sentence-transformers==6.2.0
    /tmp/peers/bin/python tests/losses/record_peers.py
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

COUNT, WIDTH = 6, 4
# The sample of class 2 is alone in `a`; where peers count it differently, it joins class 1.
LABELS, CLASSES = [0, 1, 0, 2, 1, 0], [0, 1, 0, 1, 1, 0]
Inputs = dict[str, Tensor]


def draw() -> Inputs:
    """Rows of any length in float64; `queue` and `centres` are unit vectors."""
    generator = torch.Generator().manual_seed(20)
    shapes = {"a": COUNT, "b": COUNT, "c": COUNT, "d": COUNT, "queue": 7, "centres": 5}
    rows = {
        name: torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).round(decimals=6)
        for name, count in shapes.items()
    }
    return rows | {name: F.normalize(rows[name], dim=1).round(decimals=9) for name in ("queue", "centres")}


def from_lightly() -> dict[str, Callable[[Inputs], Tensor]]:
    from lightly import loss  # type: ignore[import-not-found]

    def bank(x: Inputs) -> Tensor:
        peer = loss.NTXentLoss(0.2, memory_bank_size=(7, WIDTH))
        peer.memory_bank.bank = x["queue"].clone()
        return peer(x["a"], x["b"].detach())

    def scores(x: Inputs, names: str) -> list[Tensor]:
        return [F.normalize(x[name], dim=1) @ x["centres"].T for name in names]

    return {
        "nt_xent": lambda x: loss.NTXentLoss(0.2)(x["a"], x["b"]),
        "moco": bank,
        "dcl": lambda x: loss.DCLLoss(0.2)(x["a"], x["b"]),
        "dclw": lambda x: loss.DCLWLoss(0.2, 0.5)(x["a"], x["b"]),
        "barlow_twins": lambda x: loss.BarlowTwinsLoss(0.01)(x["a"], x["b"]),
        "negative_cosine": lambda x: loss.NegativeCosineSimilarity()(x["a"], x["b"].detach()),
        "swav": lambda x: loss.SwaVLoss()(scores(x, "ab"), scores(x, "cd"))[0],
    }


def from_metric_learning() -> dict[str, Callable[[Inputs], Tensor]]:
    from pytorch_metric_learning import losses  # type: ignore[import-not-found]

    labels = torch.tensor(LABELS)
    one_way = losses.SelfSupervisedLoss(losses.NTXentLoss(0.2), symmetric=False)
    both_ways = losses.SelfSupervisedLoss(losses.SupConLoss(0.2))
    return {
        "info_nce": lambda x: one_way(x["a"], x["b"]),
        "supcon_unique": lambda x: both_ways(x["a"], x["b"]),
        "supcon": lambda x: losses.SupConLoss(0.2)(torch.cat([x["a"], x["b"]]), labels.repeat(2)),
        "triplet_nonzero": lambda x: losses.TripletMarginLoss(0.3)(x["a"], labels),
    }


def from_sentence_transformers() -> dict[str, Callable[[Inputs], Tensor]]:
    from sentence_transformers.sentence_transformer import losses  # type: ignore[import-not-found]

    labels, alike = torch.tensor(CLASSES), torch.tensor([1, 0, 0, 1, 0, 1])
    ways = ("query_to_doc", "doc_to_query")
    model: Any = torch.nn.Identity()

    def ranking(names: str, **options: Any) -> Callable[[Inputs], Tensor]:
        peer = losses.MultipleNegativesRankingLoss(model, scale=5.0, **options)
        return lambda x: peer.compute_loss_from_embeddings([x[name] for name in names], labels)

    def triplets(kind: Any) -> Callable[[Inputs], Tensor]:
        return lambda x: kind(model, margin=1.0).compute_loss_from_embeddings([x["a"]], labels)

    return {
        "ranking": ranking("ab"),
        "ranking_both_ways": ranking("ab", directions=ways, partition_mode="per_direction"),
        "ranking_hard": ranking("abcd"),
        "triplet_all": triplets(losses.BatchAllTripletLoss),
        "triplet_semi_hard": triplets(losses.BatchSemiHardTripletLoss),
        "triplet_hard": triplets(losses.BatchHardTripletLoss),
        "pair_margin": lambda x: losses.ContrastiveLoss(model).compute_loss_from_embeddings(
            [x["a"], x["b"]], alike
        ),
    }


def main() -> None:
    """Computes every value and gradient, and writes them beside this file."""
    warnings.simplefilter("ignore")
    recorded = {}
    for peer in (from_lightly(), from_metric_learning(), from_sentence_transformers()):
        for name, function in peer.items():
            rows = {key: x.requires_grad_() for key, x in draw().items()}
            value = function(rows)
            slopes = torch.autograd.grad(value, [rows[key] for key in "abcd"], allow_unused=True)
            gradients = {key: x.tolist() for key, x in zip("abcd", slopes, strict=True) if x is not None}
            recorded[name] = {"value": value.item(), "gradients": gradients}
    packages = ("lightly", "pytorch-metric-learning", "sentence-transformers", "torch")
    content = {
        "versions": {name: version(name) for name in packages},
        "labels": LABELS,
        "classes": CLASSES,
        "inputs": {name: x.tolist() for name, x in draw().items()},
        "recorded": recorded,
    }
    path = Path(__file__).with_name("peer_values.json")
    # Ten digits are four more than what is compared.
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.10g}"))
    lines = [f'"{name}": {json.dumps(part)}' for name, part in rounded.items() if name != "recorded"]
    lines += [
        '"recorded": {\n'
        + ",\n".join(f'"{n}": {json.dumps(p)}' for n, p in rounded["recorded"].items())
        + "\n}"
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
