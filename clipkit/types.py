"""Core types and THE shape legend. Loads no torch, so that the command line stays light.

Shape legend, used in every docstring of this package:
    B  rows on this rank            N  rows of the global batch; B * W where ranks hold equally many
    W  ranks                        D  joint (shared embedding) width
    F  trunk width of one tower     T  tokens of a text
    H, V  image height and width in pixels
    Q  entries of a queue           K  prototypes
`image` comes before `text`, always.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from clipkit.redaction import redact, visible

if TYPE_CHECKING:
    from torch import Tensor


class ClipkitError(Exception):
    """A failure with a known cause: one line of cause, one of cure, fit for a terminal; one exit code."""

    exit_code = 1

    def __init__(self, cause: str, cure: str) -> None:
        cause, cure = visible(redact(cause)), visible(redact(cure))
        super().__init__(f"{cause}\n{cure}")
        self.cause = cause
        self.cure = cure

    def __reduce__(self) -> tuple[Any, ...]:
        # DataLoader workers send exceptions through pickle; the default protocol would pass one argument.
        return type(self), (self.cause, self.cure)


class ConfigError(ClipkitError):
    """Wrong usage or configuration (exit code 2)."""

    exit_code = 2


class DataError(ClipkitError):
    """Unusable data: missing, damaged or too often rejected (exit code 3)."""

    exit_code = 3


class GateError(ClipkitError):
    """A requested gate was not reached (exit code 4)."""

    exit_code = 4


@dataclass(frozen=True)
class Reject:
    """One sample that could not be used: where it stood, why, and which sample took its slot."""

    key: str
    shard: str
    reason: str
    detail: str
    slot: int
    substitute: str


@dataclass(frozen=True)
class Batch:
    """What the loader hands to a rank: B rows in global lane order.

    images    view name -> uint8 (B, 3, H, V), not normalised
    texts     view name -> int64 (B, T), T a multiple of 8 where the tower allows trimming
    stored    name -> (B, Dn) precomputed embeddings
    labels    name -> int64 (B,)
    present   name -> bool (B,), False where an optional field is absent
    ids       int64 (B,), identity of the sample, other ones in every source
    slots     int64 (B,), position of the row in its epoch (what augmentation seeds derive from)
    keys      sample keys, for messages
    shares    rows of the global batch on every rank, () where all hold equally many
    rejects   samples that were replaced while this batch was built
    retries   reads that failed and were tried again while it was built
    counts    what its rows came from -> how many, such as "captions/txt"; only where there is a choice
    """

    images: dict[str, Tensor]
    texts: dict[str, Tensor]
    ids: Tensor
    slots: Tensor
    keys: tuple[str, ...]
    stored: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    rejects: tuple[Reject, ...] = ()
    retries: int = 0
    shares: tuple[int, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, dict) and entry.name != "counts":
                changed[entry.name] = {name: change(tensor) for name, tensor in value.items()}
            elif entry.name in ("ids", "slots"):
                changed[entry.name] = change(value)
        return replace(self, **changed)

    def to(self, device: Any, non_blocking: bool = True) -> Batch:
        """Returns the batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory, so that `.to` can copy asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def rows(self, start: int, stop: int) -> Batch:
        """Returns rows start..stop as a batch of its own (a micro-batch)."""
        part = self._map(lambda tensor: tensor[start:stop])
        return replace(part, keys=self.keys[start:stop], rejects=(), shares=(), counts={})


@dataclass(frozen=True)
class TeacherEmbeddings:
    """What a teacher says about this rank's rows: trunk (B, F) and joint (B, D) by view, and its scale ()."""

    trunk: dict[str, Tensor]
    joint: dict[str, Tensor]
    logit_scale: Tensor


@dataclass(frozen=True)
class Embeddings:
    """What objectives see: never images, tokens, towers or ranks' data other than their own rows.

    trunk     view name -> (B, F) pooled features before the joint projection
    joint     view name -> (B, D), L2-normalised, at least fp32 (fp64 stays fp64)
    teachers  teacher name -> TeacherEmbeddings of the views it reads, without gradient
    progress  fraction of the run that is done, 0..1
    logit_scale   (1,), already exponentiated; logit_bias (1,) or None
    """

    trunk: dict[str, Tensor]
    joint: dict[str, Tensor]
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    teachers: dict[str, TeacherEmbeddings] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0


@dataclass(frozen=True)
class View:
    """One view of a sample: what the loader builds, a tower reads and an objective finds by `name`.

    tower     "image" or "text"
    recipe    image: the name of an augmentation recipe, "" for the default crop
              text: "" for the caption as it is, "dropout" for the same caption, "eda" for an edited one
    index     which view of a recipe whose views differ (byol), or which caption of a list
    field     caption field of a text view; None: the field that data.train names
    optional  a sample without the field is kept, and `present[name]` is False
    """

    name: str
    tower: str
    recipe: str = ""
    index: int = 0
    field: str | None = None
    optional: bool = False


IMAGE = View("image", "image")
TEXT = View("text", "text")


@dataclass(frozen=True)
class Teacher:
    """A second pair of towers that is never trained: a moving average of the trained ones, or fixed weights.

    momentum  of the moving average, per step; None for fixed weights
    schedule  "constant", or "cosine": from `momentum` to 1 over the run (BYOL, arXiv:2006.07733 section 3.3)
    model     fixed weights: an exported directory or an open_clip `name:tag`
    views     names of the views that it embeds
    """

    name: str
    views: tuple[str, ...]
    momentum: float | None = None
    schedule: str = "constant"
    model: str | None = None

    def momentum_at(self, progress: float) -> float:
        """Returns the momentum at `progress` 0..1 of the run."""
        momentum = self.momentum or 0.0
        if self.schedule == "constant":
            return momentum
        return 1 - (1 - momentum) * (math.cos(math.pi * progress) + 1) / 2


@dataclass(frozen=True)
class Needs:
    """What an objective declares; the loader builds nothing else, and required members follow from it.

    labels  "caption" or "caption:FIELD" (equal captions have equal labels), or a field such as "cls" or
            "json.category"
    stored  members that hold a vector each, such as "teacher_image.npy"
    """

    views: tuple[View, ...] = ()
    teachers: tuple[Teacher, ...] = ()
    labels: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        """Returns the union, in first-seen order. Teachers of one name embed the views of both."""
        teachers = {teacher.name: teacher for teacher in self.teachers}
        for teacher in other.teachers:
            known = teachers.get(teacher.name)
            if known is not None:
                teacher = replace(teacher, views=tuple(dict.fromkeys(known.views + teacher.views)))
                if replace(known, views=teacher.views) != teacher:
                    raise ConfigError(
                        f"two objectives describe the teacher `{teacher.name}` differently",
                        "one name stands for one momentum, schedule and model: rename one of them (fixed "
                        "models are named after their path)",
                    )
            teachers[teacher.name] = teacher
        merged = Needs(
            tuple(dict.fromkeys(self.views + other.views)),
            tuple(teachers.values()),
            tuple(dict.fromkeys(self.labels + other.labels)),
            tuple(dict.fromkeys(self.stored + other.stored)),
        )
        names = [view.name for view in merged.views]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"two objectives mean different things by the view `{name}`",
                    "give one of them another recipe or field",
                )
        return merged

    def of_tower(self, tower: str) -> tuple[View, ...]:
        """Returns the views that `tower` ("image" or "text") reads."""
        return tuple(view for view in self.views if view.tower == tower)
