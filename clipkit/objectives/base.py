"""The contract of an objective, and how a configuration becomes a weighted list of them."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from clipkit.types import ConfigError, Embeddings, Needs


@dataclass(frozen=True)
class Scale:
    """How an objective wants the shared temperature to start: log of the scale, and a bias or none."""

    log_scale: float = math.log(1 / 0.07)
    bias: float | None = None


class Objective(nn.Module):
    """Maps the embeddings of this rank's rows to one scalar, in nats or the objective's own unit.

    An objective owns its heads, queue and momentum head as submodules and persistent buffers. `needs`
    says which views the loader must build; `scale` says how the shared temperature starts, None when
    the objective does not read it. Options are the keyword arguments of `__init__`.
    """

    needs: ClassVar[Needs] = Needs()
    scale: ClassVar[Scale | None] = None

    def forward(self, e: Embeddings) -> Tensor | dict[str, Tensor]:
        """Returns the mean over THIS rank's anchors against ALL gathered candidates.

        Either a tensor () or a dict with "loss" and further scalars to log.
        """
        raise TypeError(f"{type(self).__name__} must define forward(embeddings)")

    def after_step(self) -> None:
        """Runs after an optimizer step that was taken: enqueue, momentum, normalise prototypes."""


def build_objectives(
    entries: Sequence[Mapping[str, Any]], registry: Mapping[str, type[Objective]]
) -> dict[str, tuple[Objective, float]]:
    """Returns label -> (objective, weight) in the order of the configuration.

    A repeated name gets the labels `clip`, `clip_2`, ...  Raises ConfigError for an unknown name, for an
    unknown option, and for options of the wrong value, naming the nearest valid word.
    """
    built: dict[str, tuple[Objective, float]] = {}
    for entry in entries:
        options = dict(entry)
        name, weight = str(options.pop("name")), float(options.pop("weight", 1.0))
        if name not in registry:
            near = difflib.get_close_matches(name, registry, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise ConfigError(f"unknown objective `{name}`", f"{hint}known: {', '.join(sorted(registry))}")
        known = [word for word in inspect.signature(registry[name].__init__).parameters if word != "self"]
        for word in options:
            if word not in known:
                raise ConfigError(
                    f"objective `{name}` has no option `{word}`",
                    f"options of `{name}`: {', '.join(known) or 'none'}",
                )
        count = 1 + sum(label == name or label.startswith(f"{name}_") for label in built)
        built[name if count == 1 else f"{name}_{count}"] = (registry[name](**options), weight)
    if not built:
        raise ConfigError("the list `objectives` is empty", "add one, e.g. objectives: [{name: clip}]")
    return built


def shared_scale(objectives: Mapping[str, tuple[Objective, float]]) -> Scale:
    """Returns the start of the shared temperature on which all objectives agree, or raises ConfigError."""
    wanted = {label: part.scale for label, (part, _) in objectives.items() if part.scale is not None}
    if len(set(wanted.values())) > 1:
        raise ConfigError(
            f"objectives {', '.join(wanted)} start the shared temperature differently",
            "train them in separate runs, or keep only one of them",
        )
    return next(iter(wanted.values()), Scale())
