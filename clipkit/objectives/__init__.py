"""Objectives by name: what a configuration lists under `objectives`."""

from clipkit.objectives.base import Objective, Scale, build_objectives, shared_scale
from clipkit.objectives.paired import Clip, SigLip

OBJECTIVES: dict[str, type[Objective]] = {"clip": Clip, "siglip": SigLip}

__all__ = ["OBJECTIVES", "Clip", "Objective", "Scale", "SigLip", "build_objectives", "shared_scale"]
