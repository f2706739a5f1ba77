"""Distillation of image-text affinities: from teachers that run beside, or from stored embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit import dist
from clipkit.losses import distillation_loss
from clipkit.losses.affinity import TeacherPair
from clipkit.losses.regression import feature_distillation_loss
from clipkit.objectives.base import check_number, check_text, read_options
from clipkit.objectives.paired import CLIP_SCALE, Paired, pair_accuracy
from clipkit.types import ConfigError, Embeddings, Needs, Teacher


class Distill(Paired):
    """Cross-entropy between the affinities of teachers, averaged after the softmax, and those of the student.

    Affinity mimicking, arXiv:2309.12314; several teachers and stored embeddings, arXiv:2311.17049. The value
    is bounded below by the entropy of the teachers, not by 0.
    teachers  MODELs (exported directories or name:tag) that embed the same pictures and captions while
              training; each with its own size, tokenizer and scale
    stored    {image, text, scale}: members of a sample that hold a teacher's vectors (.npy). They belong to
              one picture and one caption: train on them without augmentation (views: {image: none})
    features  weight of the mean squared difference to the embeddings of the teachers, which must then be as
              wide as the student's (CLIP-KD, arXiv:2307.12732: 2000, because the mean is over entries too)
    """

    start = CLIP_SCALE

    def __init__(
        self,
        teachers: str | Sequence[str] = (),
        stored: Mapping[str, Any] | None = None,
        views: Mapping[str, str] | None = None,
        own_scale: bool = False,
        temperature: float | None = None,
        features: float = 0.0,
    ) -> None:
        super().__init__(views, own_scale, temperature)
        self.features = check_number("features", features, 0.0)
        listed = [teachers] if isinstance(teachers, str) else teachers
        if not isinstance(listed, list | tuple):
            raise ConfigError(f"teachers is {teachers!r}", "give a MODEL or a list of them")
        models = [
            check_text("teachers", model, "ViT-B-32:openai or the path of an export") for model in listed
        ]
        if not models and stored is None:
            raise ConfigError("distill has no teacher", "set teachers: [MODEL, ...] or stored: {...}")
        names = (self.image.name, self.text.name)
        self.teachers = tuple(Teacher(teacher_name(model), names, model=model) for model in models)
        self.stored: dict[str, Any] | None = None
        members: tuple[str, ...] = ()
        if stored is not None:
            defaults: dict[str, Any] = {
                "image": "teacher_image.npy",
                "text": "teacher_text.npy",
                "scale": 100.0,
            }
            self.stored = read_options("stored", stored, defaults)
            check_number("stored.scale", self.stored["scale"], 0.0)
            members = tuple(
                check_text(f"stored.{part}", self.stored[part], defaults[part]) for part in ("image", "text")
            )
            if self.image.recipe != "none":
                self.notes = (
                    "stored vectors belong to the picture as it is, but this view of it is augmented; "
                    "views: {image: none} is not",
                )
        self.needs = self.needs | Needs(teachers=self.teachers, stored=members)

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss over gathered pairs and the student's in-batch accuracy."""
        image, text, scale, _ = self.pair(e)
        pairs = []
        for teacher in self.teachers:
            said = e.teachers[teacher.name]
            joint = said.joint
            pairs.append(TeacherPair(joint[self.image.name], joint[self.text.name], said.logit_scale))
        if self.stored is not None:
            vectors = [normalize(e.stored[self.stored[part]], dim=-1) for part in ("image", "text")]
            pairs.append(TeacherPair(vectors[0], vectors[1], float(self.stored["scale"])))
        loss = distillation_loss(image, text, scale, pairs, dist.gather)
        terms = {"accuracy": pair_accuracy(image, text)}
        if self.features:
            widths = sorted({pair.image.shape[1] for pair in pairs} - {image.shape[1]})
            if widths:
                raise ConfigError(
                    f"features compares embeddings of width {image.shape[1]} with a teacher's of {widths[0]}",
                    f"set model.embed_dim: {widths[0]}, or leave features out",
                )
            gaps = [feature_distillation_loss(image, pair.image) for pair in pairs]
            gaps += [feature_distillation_loss(text, pair.text) for pair in pairs]
            terms["features"] = torch.stack(gaps).mean()
            loss = loss + self.features * terms["features"]
        return {"loss": loss, **terms}


def teacher_name(model: str) -> str:
    """Returns a name for a MODEL that may stand in tensor names: two objectives with one MODEL share it."""
    return re.sub(r"\W+", "_", model).strip("_")[-60:] or "teacher"
