"""The same values and gradients as other libraries, from the file that record_peers.py wrote.

Differences that were recorded around: lightly lets the gradient into the keys of a memory bank;
sentence-transformers counts an anchor without a positive as one with a positive at distance 0 (clipkit leaves
it out). pytorch-metric-learning's NTXentLoss gives each of several positives its own denominator, and its
ContrastiveLoss does not square: neither is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.losses.hard_negatives import hard_info_nce
from clipkit.losses.margin import pair_margin_loss, row_distances, triplet_loss
from clipkit.losses.prototypes import swav_loss
from clipkit.losses.redundancy import barlow_twins_loss
from clipkit.losses.regression import regression_loss
from clipkit.losses.softmax import clip_loss, dcl_loss, info_nce, moco_loss, nt_xent_loss, supcon_loss

PEERS = json.loads(Path(__file__).with_name("peer_values.json").read_text(encoding="utf-8"))
LABELS, CLASSES = torch.tensor(PEERS["labels"]), torch.tensor(PEERS["classes"])
OWN = torch.arange(6)
Rows = dict[str, Tensor]


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def swav(x: Rows) -> Tensor:
    return swav_loss([unit(x[name]) @ x["centres"].T for name in "abcd"])


def hard(x: Rows) -> Tensor:
    wrong = torch.stack([unit(x["c"]), unit(x["d"])], dim=1)
    return hard_info_nce(unit(x["a"]), unit(x["b"]), wrong, 5.0)


OURS: dict[str, Callable[[Rows], Tensor]] = {
    "nt_xent": lambda x: nt_xent_loss(unit(x["a"]), unit(x["b"]), 5.0),
    "moco": lambda x: moco_loss(unit(x["a"]), unit(x["b"]), x["queue"], 5.0),
    "dcl": lambda x: dcl_loss(unit(x["a"]), unit(x["b"]), 5.0),
    "dclw": lambda x: dcl_loss(unit(x["a"]), unit(x["b"]), 5.0, sigma=0.5),
    "barlow_twins": lambda x: barlow_twins_loss(x["a"], x["b"], off_diagonal=0.01),
    "negative_cosine": lambda x: regression_loss(x["a"], x["b"]) / 2 - 1,
    "swav": swav,
    "info_nce": lambda x: info_nce(unit(x["a"]), unit(x["b"]), 5.0, OWN),
    "supcon_unique": lambda x: nt_xent_loss(unit(x["a"]), unit(x["b"]), 5.0),
    "supcon": lambda x: supcon_loss(unit(x["a"]), unit(x["b"]), LABELS, 5.0),
    "triplet_nonzero": lambda x: triplet_loss(
        unit(x["a"]), None, LABELS, 0.3, miner="all", distance="euclidean", average="nonzero"
    ),
    "ranking": lambda x: info_nce(unit(x["a"]), unit(x["b"]), 5.0, OWN),
    "ranking_both_ways": lambda x: clip_loss(unit(x["a"]), unit(x["b"]), 5.0),
    "ranking_hard": hard,
    "triplet_all": lambda x: triplet_loss(
        x["a"], None, CLASSES, 1.0, miner="all", distance="euclidean", average="nonzero"
    ),
    "triplet_semi_hard": lambda x: triplet_loss(x["a"], None, CLASSES, 1.0, distance="euclidean"),
    "triplet_hard": lambda x: triplet_loss(x["a"], None, CLASSES, 1.0, miner="hard", distance="euclidean"),
    "pair_margin": lambda x: pair_margin_loss(
        row_distances(x["a"], x["b"], "cosine"), torch.tensor([1, 0, 0, 1, 0, 1]) > 0, 0.5
    ),
}


def test_every_recorded_loss_is_compared() -> None:
    assert OURS.keys() == PEERS["recorded"].keys()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", OURS)
def test_a_peer_computes_the_same(name: str, dtype: torch.dtype, tolerance: float) -> None:
    rows = {key: torch.tensor(x, dtype=dtype, requires_grad=True) for key, x in PEERS["inputs"].items()}
    expected = PEERS["recorded"][name]
    value = OURS[name](rows)
    assert value.item() == pytest.approx(expected["value"], rel=tolerance, abs=tolerance)
    slopes = torch.autograd.grad(value, [rows[key] for key in "abcd"], allow_unused=True)
    for key, slope in zip("abcd", slopes, strict=True):
        found = torch.zeros_like(rows[key]) if slope is None else slope
        wanted = torch.tensor(expected["gradients"].get(key, 0.0), dtype=dtype).expand_as(found)
        torch.testing.assert_close(found, wanted, rtol=10 * tolerance, atol=tolerance)
