"""What objectives declare, turned into what exists: views of the data, teachers, and a batch to try."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipkit.data.text import TextView, text_view
from clipkit.data.views import ImageView, image_view
from clipkit.export.load import load_towers
from clipkit.learner import Learner
from clipkit.models.teachers import moving_copy
from clipkit.models.towers import Towers
from clipkit.objectives import Widths
from clipkit.types import Batch, Needs, Teacher, View

Teaching = Sequence[tuple[Teacher, Towers]]
FAKE_ROWS = 4  # two labels of two rows: every kind of loss finds a positive and a negative


@dataclass(frozen=True)
class Views:
    """What the loader builds of every sample."""

    images: tuple[ImageView, ...]
    texts: tuple[TextView, ...]


def widths_of(towers: Towers) -> Widths:
    """Returns what objectives may know of the towers."""
    return Widths(
        {"image": towers.image_trunk_dim, "text": towers.text_trunk_dim}, towers.embed_dim, towers.stochastic
    )


def build_teachers(
    needs: Needs, towers: Towers, stored: Mapping[str, Path] | None = None
) -> list[tuple[Teacher, Towers]]:
    """Returns the towers of every declared teacher: a copy of `towers` to average, or a loaded model.

    stored: name -> directory of models that the run has kept; they win over what the objectives name.
    """
    stored = stored or {}
    kinds = {view.name: view.tower for view in needs.views}
    return [
        (
            teacher,
            moving_copy(towers, {kinds[name] for name in teacher.views})
            if teacher.model is None
            else load_towers(stored.get(teacher.name, teacher.model)),
        )
        for teacher in needs.teachers
    ]


def teacher_notes(teachers: Teaching, stored: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yields (name, line for the banner) of every teacher; `stored` as in `build_teachers`."""
    for teacher, towers in teachers:
        views = f"reads {', '.join(teacher.views)}"
        if teacher.model is None:
            yield teacher.name, f"average of the trained towers, momentum {teacher.momentum:g}, {views}"
        else:
            pixels = " x ".join(map(str, towers.image_size))
            source = f", as this run stored it in {stored[teacher.name]}" if teacher.name in stored else ""
            yield teacher.name, f"{teacher.model}{source}, fixed, {pixels} pixels, {views}"


def build_views(
    needs: Needs,
    towers: Towers,
    teachers: Teaching,
    crop_scale: tuple[float, float] | None,
    recipes: Mapping[str, Any],
) -> Views:
    """Returns the declared views for these towers.

    A fixed teacher with another input size gets the same crop at its own size, one with another vocabulary
    or context length the same caption in its own tokens, as the view `NAME@TEACHER`.
    """

    def image(view: View, reader: Towers) -> ImageView:
        return image_view(
            view, reader.preprocess_cfg, size=reader.image_size, crop_scale=crop_scale, recipes=recipes
        )

    def text(view: View, reader: Towers) -> TextView:
        return text_view(view, reader.tokenizer, reader.context_length, reader.text_trim)

    images = [image(view, towers) for view in needs.of_tower("image")]
    texts = [text(view, towers) for view in needs.of_tower("text")]
    known = {view.name: view for view in needs.views}
    for teacher, reader in teachers:
        for view in (known[name] for name in teacher.views):
            own = replace(view, name=f"{view.name}@{teacher.name}")
            if view.tower == "image" and reader.image_size != towers.image_size:
                images.append(image(own, reader))
            elif view.tower == "text" and vocabulary(reader) != vocabulary(towers):
                texts.append(text(own, reader))
    return Views(tuple(images), tuple(texts))


def vocabulary(towers: Towers) -> tuple[Any, ...]:
    """Returns what must be equal for two pairs of towers to read the same token ids."""
    return towers.tokenizer_spec, towers.context_length, towers.text_trim


def fake_batch(learner: Learner, views: Views, stored: Mapping[str, int], rows: int = FAKE_ROWS) -> Batch:
    """Returns a batch of noise images and captions, to see which parameters get a gradient."""
    generator = torch.Generator().manual_seed(0)
    needs, numbers = learner.needs, torch.arange(rows)

    def captions(first: int) -> list[str]:
        return [f"a photo of number {row + first}" for row in range(rows)]

    return Batch(
        images={
            view.name: torch.randint(0, 256, (rows, 3, *view.size), generator=generator, dtype=torch.uint8)
            for view in views.images
        },
        texts={view.name: view.encode(captions(at)) for at, view in enumerate(views.texts)},
        stored={
            name: torch.randn(rows, stored.get(name, learner.towers.embed_dim), generator=generator)
            for name in needs.stored
        },
        labels=dict.fromkeys(needs.labels, numbers // 2),
        present={view.name: numbers >= 0 for view in optional(needs.views)},
        ids=numbers,
        slots=numbers,
        keys=tuple(map(str, range(rows))),
    )


def optional(views: Iterable[View]) -> Iterator[View]:
    """Yields the views that a sample may lack."""
    return (view for view in views if view.optional)
