"""Objectives by name: what a configuration lists under `objectives`."""

from clipkit.objectives.base import Objective, Scale, Widths, check_batch_size, shared_scale
from clipkit.objectives.distill import Distill
from clipkit.objectives.margin import PairMargin, Triplet
from clipkit.objectives.paired import Clip, CyClip, SigLip, UniCl
from clipkit.objectives.prototypes import Swav
from clipkit.objectives.registry import build_objectives, needs_of
from clipkit.objectives.teacher import Byol, Moco, Pcl
from clipkit.objectives.two_view import BarlowTwins, Dcl, InfoNce, SimClr, SupCon

OBJECTIVES: dict[str, type[Objective]] = {
    "clip": Clip,
    "siglip": SigLip,
    "unicl": UniCl,
    "cyclip": CyClip,
    "simclr": SimClr,
    "dcl": Dcl,
    "infonce": InfoNce,
    "supcon": SupCon,
    "barlow_twins": BarlowTwins,
    "triplet": Triplet,
    "pair_margin": PairMargin,
    "moco": Moco,
    "pcl": Pcl,
    "byol": Byol,
    "swav": Swav,
    "distill": Distill,
}

__all__ = [
    "OBJECTIVES",
    "Objective",
    "Scale",
    "Widths",
    "build_objectives",
    "check_batch_size",
    "needs_of",
    "shared_scale",
]
