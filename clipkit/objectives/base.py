"""The contract of an objective: what it declares, what it maps, what it does after a step."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.dist import own_rows
from clipkit.types import ConfigError, Embeddings, Needs

MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class Scale:
    """How an objective wants the shared temperature to start: log of the scale, and a bias or none."""

    log_scale: float = math.log(1 / 0.07)
    bias: float | None = None


@dataclass(frozen=True)
class Widths:
    """What an objective may know of the towers: widths, and which towers draw random numbers in training.

    trunk       tower name -> F
    joint       D
    stochastic  towers with active dropout (of units, attention or patches)
    """

    trunk: Mapping[str, int]
    joint: int
    stochastic: frozenset[str] = field(default_factory=frozenset)


class Objective(nn.Module):
    """Maps the embeddings of this rank's rows to one scalar, in nats or the objective's own unit.

    An objective owns its heads, queue and momentum head as submodules and persistent buffers. `needs`
    says which views, teachers, labels and stored vectors it reads; `scale` says how the shared temperature
    starts, None when the objective does not read it. Both may be set per instance. Options are the keyword
    arguments of `__init__`, which calls `super().__init__()` first, as every nn.Module does.
    """

    needs: Needs = Needs()
    scale: Scale | None = None
    # Part of the value is a constant on purpose: finite differences must hold what forward detaches.
    stops_gradient: bool = False
    # The smallest global batch that has a loss and a gradient.
    fewest_rows: int = 1
    # Lines for the banner of a run.
    notes: tuple[str, ...] = ()

    def build(self, widths: Widths) -> None:
        """Creates heads, queues and other state; runs once, when the towers exist."""

    def forward(self, e: Embeddings) -> Tensor | dict[str, Tensor]:
        """Returns the mean over THIS rank's anchors against ALL gathered candidates.

        Either a tensor () or a dict with "loss" and further scalars to log.
        """
        raise TypeError(f"{type(self).__name__} must define forward(embeddings)")

    def chance(self, rows: int) -> float | None:
        """Returns the loss of a global batch of `rows` whose embeddings are all equal; None: no such value.

        A loss that stays there has learned nothing.
        """
        return None

    def after_step(self) -> None:
        """Runs after an optimizer step that was taken: enqueue, momentum, normalise prototypes.

        Parameters may be sharded here: `clipkit.dist.own_rows` are the rows to change.
        """


class OwnScale(nn.Module):
    """A temperature that belongs to one objective: trained, clamped like the shared one, not exported."""

    def __init__(self, start: Scale) -> None:
        super().__init__()
        # Shape (1,): sharded training refuses parameters without dimensions.
        self.log_scale = nn.Parameter(torch.full((1,), start.log_scale))
        self.bias = None if start.bias is None else nn.Parameter(torch.full((1,), start.bias))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Returns (scale (1,), bias (1,) or None)."""
        return self.log_scale.exp(), self.bias

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps the log-scale inside [0, log 100], in place."""
        own_rows(self.log_scale).clamp_(0.0, MAX_LOG_SCALE)


def shared_scale(objectives: Mapping[str, tuple[Objective, float]]) -> Scale:
    """Returns the start of the shared temperature on which all objectives agree, or raises ConfigError."""
    wanted = {label: part.scale for label, (part, _) in objectives.items() if part.scale is not None}
    if len(set(wanted.values())) > 1:
        raise ConfigError(
            f"objectives {', '.join(wanted)} start the shared temperature differently",
            "give all but one of them `own_scale: true`, or train them in separate runs",
        )
    return next(iter(wanted.values()), Scale())


def check_batch_size(objectives: Mapping[str, tuple[Objective, float]], rows: int) -> None:
    """Raises ConfigError when a global batch of `rows` is too small for one of the objectives."""
    for label, (part, _) in objectives.items():
        if rows < part.fewest_rows:
            raise ConfigError(
                f"objective `{label}` compares the rows of a batch, and data.batch_size is {rows}",
                f"set data.batch_size to at least {part.fewest_rows}; hundreds are usual",
            )


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """Returns an option of an objective as a finite float; raises ConfigError outside low..high."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        bounds = f" between {low:g} and {high:g}" if high < math.inf else f" of at least {low:g}"
        raise ConfigError(f"{name} is {value!r}", f"give a number{bounds if low > -math.inf else ''}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Returns an option of an objective that is true or false; raises ConfigError for all else.

    YAML 1.2 reads `no` and `off` as texts, which Python holds to be true.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}", "write true or false")
    return value


def check_text(name: str, value: Any, example: str) -> str:
    """Returns an option of an objective that is a text with something in it; raises ConfigError."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} is {value!r}", f"write a text, such as {example}")
    return value


def read_options(name: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `defaults` updated by the option `name`, a mapping with the same keys; raises ConfigError."""
    if given is None:
        return dict(defaults)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {given!r}", f"write a mapping with some of: {', '.join(defaults)}")
    for key in given:
        if key not in defaults:
            near = difflib.get_close_matches(str(key), defaults, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise ConfigError(f"{name} has no key `{key}`", f"{hint}known: {', '.join(defaults)}")
    return {**defaults, **given}


def check_count(name: str, value: Any, low: int) -> int:
    """Returns an option of an objective that is a whole number of at least `low`; raises ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} is {value!r}", f"give a whole number of at least {low}")
    return value


def check_counts(name: str, value: Any, low: int) -> tuple[int, ...]:
    """Returns an option that lists whole numbers of at least `low`, one or more; raises ConfigError."""
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{name} is {value!r}", f"give a list, such as [{low}, {2 * low}]")
    return tuple(check_count(name, number, low) for number in value)


def check_choice(name: str, value: Any, known: Sequence[str]) -> Any:
    """Returns an option of an objective that is one of the words `known`; raises ConfigError."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{name} is {value!r}", f"{hint}known: {', '.join(known)}")
    return value
