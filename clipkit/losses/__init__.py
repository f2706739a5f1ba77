"""Losses: pure functions of embeddings, torch only, collectives passed in by the caller.

Those promised are named here; the pieces they are made of are in the modules.
"""

from clipkit.losses.affinity import cyclip_terms, distillation_loss
from clipkit.losses.contrastive import contrastive_loss
from clipkit.losses.geometry import alignment, uniformity
from clipkit.losses.hard_negatives import hard_clip_loss, hcl_loss
from clipkit.losses.margin import pair_margin_loss, triplet_loss
from clipkit.losses.prototypes import swav_loss
from clipkit.losses.redundancy import barlow_twins_loss
from clipkit.losses.regression import byol_loss
from clipkit.losses.sigmoid import sigmoid_loss
from clipkit.losses.softmax import (
    clip_loss,
    dcl_loss,
    info_nce,
    moco_loss,
    nt_xent_loss,
    supcon_loss,
    unicl_loss,
)

__all__ = [
    "alignment",
    "barlow_twins_loss",
    "byol_loss",
    "clip_loss",
    "contrastive_loss",
    "cyclip_terms",
    "dcl_loss",
    "distillation_loss",
    "hard_clip_loss",
    "hcl_loss",
    "info_nce",
    "moco_loss",
    "nt_xent_loss",
    "pair_margin_loss",
    "sigmoid_loss",
    "supcon_loss",
    "swav_loss",
    "triplet_loss",
    "unicl_loss",
    "uniformity",
]
