"""Core types and THE shape legend. Loads no torch, so that the command line stays light.

Shape legend, used in every docstring of this package:
    B  rows on this rank            N  rows of the global batch, N = B * W
    W  ranks                        D  joint (shared embedding) width
    F  trunk width of one tower     T  tokens of a text
    H, V  image height and width in pixels
    Q  entries of a queue           K  prototypes
`image` comes before `text`, always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class ClipkitError(Exception):
    """A failure with a known cause: one line of cause, one line of cure, one exit code."""

    exit_code = 1

    def __init__(self, cause: str, cure: str) -> None:
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
    ids       int64 (B,), identity of the sample in its source
    slots     int64 (B,), position of the row in its epoch (what augmentation seeds derive from)
    keys      sample keys, for messages
    rejects   samples that were replaced while this batch was built
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

    def __len__(self) -> int:
        return len(self.keys)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, dict):
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
        return replace(part, keys=self.keys[start:stop], rejects=())


@dataclass(frozen=True)
class Embeddings:
    """What objectives see: never images, tokens, towers or ranks' data other than their own rows.

    trunk     view name -> (B, F) pooled features before the joint projection
    joint     view name -> (B, D), L2-normalised, at least fp32 (fp64 stays fp64)
    teachers  teacher name -> {"trunk" | "joint": {view: (B, Dn)}, "scale": ()}
    progress  fraction of the run that is done, 0..1
    logit_scale   (1,), already exponentiated; logit_bias (1,) or None
    """

    trunk: dict[str, Tensor]
    joint: dict[str, Tensor]
    logit_scale: Tensor
    logit_bias: Tensor | None = None
    teachers: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Tensor] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    progress: float = 0.0


@dataclass(frozen=True)
class Needs:
    """What an objective declares; the loader builds nothing else, and required members follow from it."""

    image_views: tuple[str, ...] = ()
    text_views: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        """Returns the union, in first-seen order."""
        return Needs(
            *(
                tuple(dict.fromkeys(getattr(self, entry.name) + getattr(other, entry.name)))
                for entry in fields(self)
            )
        )
