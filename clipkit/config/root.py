"""The whole configuration, and the two ways to get one: a file with overrides, or values from Python."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from clipkit.config.interval import parse_interval
from clipkit.config.problems import validate
from clipkit.config.reading import Values, dump_yaml, layer, read_values
from clipkit.config.schema import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    Section,
)
from clipkit.config.values import as_tuple, refuse
from clipkit.redaction import redact_all
from clipkit.types import ConfigError

# A run directory continues only with the same values of these; what is absent may change freely
# (workers, limits, micro-batch, precision, cadences: none of them changes what is computed on which samples).
_IDENTITY = (
    "model",
    "objectives",
    "data.train",
    "data.holdout",
    "data.batch_size",
    "data.lanes",
    "data.window_bytes",
    "data.max_pixels",
    "data.crop_scale",
    "data.recipes",
    "optim",
    "run.samples",
    "run.epochs",
    "run.steps",
    "run.seed",
    "run.weight_ema",
)
# Values that say what runs did before these keys existed: they tell no two runs apart.
_AS_BEFORE = {"missing": "fallback", "lines": False}
_WARMUP_LIMIT = 0.25


class Config(Section):
    """A complete, checked, immutable configuration of one run."""

    model: ModelConfig
    objectives: Annotated[tuple[ObjectiveConfig, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        ObjectiveConfig(name="clip"),
    )
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    run: RunConfig

    @field_validator("objectives")
    @classmethod
    def _some_weight(cls, value: tuple[ObjectiveConfig, ...]) -> tuple[ObjectiveConfig, ...]:
        if not any(objective.weight > 0 for objective in value):
            raise refuse("every objective has weight 0", "give at least one a weight above 0")
        return value

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        batch, world = self.data.batch_size, self.run.world_size
        if world is not None and (world > batch or (batch % world and not self.data.uneven)):
            raise refuse(
                f"run.world_size {world} does not divide data.batch_size {batch}",
                "data.batch_size is the global batch: make it a multiple of the number of processes, or set "
                "data.uneven: true for any number up to it",
            )
        if self.data.index == "lazy" and self.run.epochs is not None:
            raise refuse(
                "run.epochs needs the number of samples, which data.index: lazy does not know",
                "give run.samples or run.steps instead",
            )
        if self.data.index == "lazy" and len(self.data.train) > 1:
            raise refuse(
                "data.index: lazy does not go with several sources: their sizes must be known",
                "leave data.index out; `clipkit index` prepares the sources, on several machines if need be",
            )
        for key in ("checkpoint_every", "evaluate_every"):
            every = getattr(self.run, key)
            if self.data.index == "lazy" and every is not None and parse_interval(every).epochs is not None:
                raise refuse(
                    f"run.{key} {every} needs the length of an epoch, which data.index: lazy does not know",
                    "give a number of steps, a time or a share of the run",
                )
        if self.data.holdout is not None and self.data.index == "lazy":
            raise refuse(
                "data.holdout picks pairs before the first step, when data.index: lazy does not know them",
                "leave data.index out, or evaluate on a set of its own (run.evaluate)",
            )
        if self.data.holdout is not None and "holdout" in {entry.label for entry in self.run.evaluate}:
            raise refuse(
                "an evaluation is called holdout, and so is the one of data.holdout",
                "give the entry of run.evaluate another `name`",
            )
        if self.data.uneven and self.data.index == "lazy":
            raise refuse(
                "data.uneven does not go with data.index: lazy, whose first epoch deals whole shards",
                "leave one of the two out",
            )
        if self.data.uneven and self.data.micro_batch is not None and self.run.sharding != "none":
            raise refuse(
                "data.uneven with run.sharding and data.micro_batch: every piece of a batch gathers weights, "
                "and ranks would have different numbers of pieces",
                "leave one of the three out",
            )
        if self.run.samples is not None and self.run.samples < batch:
            raise refuse(
                f"run.samples {self.run.samples} is less than one batch of {batch}",
                f"raise run.samples to at least {batch}",
            )
        if self.run.steps is not None or self.run.samples is not None:
            _refuse_long_warmup(self, self.run.steps or (self.run.samples or 0) // batch)
        return self

    @property
    def learning_rate(self) -> float:
        """Returns optim.lr, or the default for this batch: 5e-4 from 16,384 on, 1e-3 below."""
        if self.optim.lr is not None:
            return self.optim.lr
        return 5e-4 if self.data.batch_size >= 16_384 else 1e-3

    def warmup_steps(self, total_steps: int) -> int:
        """Returns the number of warm-up steps in a run of `total_steps`."""
        if self.optim.warmup in (0, "0", "0%"):
            return 0
        return parse_interval(self.optim.warmup).in_steps(total_steps) or 0

    def total_steps(self, steps_per_epoch: int | None) -> int:
        """Returns the length of the run in optimizer steps (samples are rounded down to whole batches)."""
        if self.run.steps is not None:
            return self.run.steps
        if self.run.epochs is not None:
            assert steps_per_epoch is not None, "a lazy index does not go with run.epochs"
            return self.run.epochs * steps_per_epoch
        return (self.run.samples or 0) // self.data.batch_size

    def values(self) -> dict[str, Any]:
        """Returns the resolved values as plain JSON-able data, secrets in URLs replaced by ***."""
        values: dict[str, Any] = redact_all(self.model_dump(mode="json"))
        return values

    def flat(self) -> dict[str, Any]:
        """Returns dotted key -> value of everything that is set, secrets in URLs replaced by ***."""
        return _flatten(self.values())

    def dump(self) -> str:
        """Returns the resolved configuration as YAML; it loads to the same configuration, but for secrets."""
        return dump_yaml(self.values())

    def identity(self) -> dict[str, Any]:
        """Returns dotted key -> value of everything that must stay the same when a run is continued."""
        return _identity_of(self.values())

    def digest(self) -> str:
        """Returns a short hash of `identity()`."""
        return hashlib.blake2b(repr(sorted(self.identity().items())).encode(), digest_size=8).hexdigest()

    def differences(self, other: Config | Mapping[str, Any]) -> list[str]:
        """Returns `key: theirs -> ours` for each value that forbids continuing the run that `other` began.

        other: a Config or the resolved values in a run directory.
        """
        theirs = other.identity() if isinstance(other, Config) else _identity_of(other)
        ours = self.identity()
        return [
            f"{key}: {theirs.get(key)!r} -> {ours.get(key)!r}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]


def _identity_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in _flatten(redact_all(values)).items()
        if key.startswith(_IDENTITY) and _AS_BEFORE.get(key.rpartition(".")[2]) != value
    }


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    children = (
        enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else None
    )
    if children is None:
        return {} if value is None else {prefix[:-1]: value}
    return {
        key: leaf for name, child in children for key, leaf in _flatten(child, f"{prefix}{name}.").items()
    }


def _refuse_long_warmup(config: Config, total_steps: int) -> None:
    warmup = config.warmup_steps(total_steps)
    if warmup > max(1, _WARMUP_LIMIT * total_steps):
        raise refuse(
            f"optim.warmup of {warmup} steps is over 25% of the run of {total_steps} steps",
            f"set optim.warmup to at most {int(_WARMUP_LIMIT * total_steps)}, or train longer",
        )


def check_schedule(config: Config, total_steps: int) -> list[str]:
    """Returns warnings (each with its cure) about a run whose length in steps is now known.

    Raises ConfigError when the run is empty or the warm-up is over 25 % of it.
    """
    if total_steps < 1:
        raise ConfigError("the run has no step", "raise run.samples, run.epochs or run.steps")
    try:
        _refuse_long_warmup(config, total_steps)
    except ValueError as error:
        context = getattr(error, "context", None) or {}
        raise ConfigError(str(error), str(context.get("cure", "lower optim.warmup"))) from error
    warnings = []
    if config.data.batch_size < 256:
        warnings.append(
            f"data.batch_size {config.data.batch_size} is below 256: a contrastive batch is its own set of "
            "negatives; raise it (data.micro_batch keeps the memory constant)"
        )
    if total_steps < 5000:
        warnings.append(
            f"the run has {total_steps:,} steps, fewer than 5,000: results will be far from converged; "
            "raise run.epochs (or samples, steps), or lower data.batch_size"
        )
    return warnings


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the checked configuration of a YAML file, with `key=value` overrides applied last.

    run.dir becomes runs/<name of the file> unless it is set. Relative paths are relative to the working
    directory, the one after `extends:` to the file. Raises ConfigError (exit 2) naming every problem.
    """
    values = read_values(path, overrides)
    run = values.tree.get("run")
    if isinstance(run, dict) and run.get("dir") is None:
        values.tree["run"] = {**run, "dir": str(Path("runs") / Path(path).stem)}
    return validate(Config, values.tree, values.origins, str(path))


def make_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Returns the checked configuration of values given from Python, with the spellings a file may use."""
    merged = layer([Values(dict(values))], overrides)
    return validate(Config, merged.tree, merged.origins, "config")
