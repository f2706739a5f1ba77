"""The kinds of values in a configuration: how YAML's are read, and what they are refused for."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from clipkit.config.interval import parse_interval
from clipkit.data.engine import usable_processors


def _whole(value: Any) -> Any:
    """YAML reads 12.8e9 as a float; a count written that way is still a count."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


def as_tuple(value: Any) -> Any:
    """Returns a list as the tuple it becomes in an immutable section; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def refuse(cause: str, cure: str) -> PydanticCustomError:
    """Returns the error a validator raises: a cause about the key at hand, and a cure of its own."""
    # Braces in values must not be read as fields of the message template.
    return PydanticCustomError("clipkit", "{cause}", {"cause": cause, "cure": cure})


def _interval(value: Any) -> int | str:
    value = _whole(value)
    try:
        parse_interval(value)
    except ValueError as error:
        raise refuse(str(error), "write 500 (steps), 30min, 5% or 1epoch") from error
    return value


def _warmup(value: Any) -> int | str:
    value = _whole(value)
    if not isinstance(value, bool) and value in (0, "0", "0%"):
        return 0
    cure = "write 500 (steps) or a share of the run up to 25%"
    try:
        parsed = parse_interval(value)
    except ValueError as error:
        raise refuse(str(error), cure) from error
    if parsed.seconds is not None or parsed.epochs is not None:
        raise refuse(f"expected a number of steps or a share of the run, not {value!r}", cure)
    if parsed.fraction is not None and parsed.fraction > 0.25:
        raise refuse(f"warm-up over 25% of the run, {value!r}", cure)
    return value


def _holdout(value: Any) -> int | str | None:
    """None, a number of pairs, or a share of them as text: 1%."""
    value = _whole(value)
    cure = "write a number of pairs, such as 5000, or a share of them, such as 1%"
    if value is None or (type(value) is int and value > 0):
        return value
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            share = parse_interval(value).fraction
        except ValueError as error:
            raise refuse(str(error), cure) from error
        if share is not None and share <= 0.5:
            return value
        raise refuse(f"more than half of the pairs are held out: {value!r}", cure)
    raise refuse(f"expected a number of pairs or a share of them, not {value!r}", cure)


def _freeze(value: Any) -> bool | str:
    if value is True or value is False or value in ("trunk", "all"):
        return value
    raise refuse(f"expected false, true, trunk or all, not {value!r}", "true means trunk")


def _weight_ema(value: Any) -> bool | float | str:
    if value is True or value is False or value == "auto":
        return value
    if isinstance(value, float) and 0.0 < value < 1.0:
        return value
    raise refuse(
        f"expected auto, true, false or a decay between 0 and 1, not {value!r}",
        "auto averages the weights of runs on fewer than 20 million pairs",
    )


def default_workers() -> int:
    """Returns the number of loader workers where none is asked for: at most 2, one per processor."""
    return min(2, usable_processors())


def _duration(value: Any) -> str:
    try:
        if isinstance(value, str) and parse_interval(value).seconds is not None:
            return value
    except ValueError:
        pass
    raise refuse(f"expected a time, not {value!r}", "write for example 90s, 30min or 2h")


def _on_spike(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


def _workers(value: Any) -> Any:
    return default_workers() if value == "auto" else _whole(value)


def as_sources(value: Any) -> Any:
    """Returns a string, or a list of strings, as one source with the default caption field.

    Among sources that are written out, a string is a source of its own.
    """
    if isinstance(value, str):
        return ({"shards": value},)
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return ({"shards": value},)
    if isinstance(value, list):
        return tuple({"shards": entry} if isinstance(entry, str) else entry for entry in value)
    return value


def as_captions(value: Any) -> Any:
    """Returns a caption field, or a list of them, with every one that is only named as a section."""
    entries = (value,) if isinstance(value, str) else as_tuple(value)
    if not isinstance(entries, tuple):
        return value
    return tuple({"field": entry} if isinstance(entry, str) else entry for entry in entries)


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else as_tuple(value)


def _shards(value: Any) -> str | tuple[str, ...]:
    entries = (value,) if isinstance(value, str) else as_tuple(value)
    if not isinstance(entries, tuple) or not entries or not all(isinstance(e, str) and e for e in entries):
        raise refuse(
            f"expected a path, pattern or folder, or a list of them, not {value!r}",
            "for example train/{000..015}.tar or a folder of .tar files",
        )
    return value if isinstance(value, str) else entries


# The names that accelerate.tracking knows; to ask it would load torch.
Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"
]
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Every = Annotated[int | str, PlainValidator(_interval)]
OptionalEvery = Annotated[
    int | str | None, PlainValidator(lambda value: None if value is None else _interval(value))
]
Holdout = Annotated[int | str | None, PlainValidator(_holdout)]
Freeze = Annotated[bool | str, PlainValidator(_freeze)]
Warmup = Annotated[int | str, PlainValidator(_warmup)]
WeightEma = Annotated[bool | float | str, PlainValidator(_weight_ema)]
Duration = Annotated[str, PlainValidator(_duration)]
Workers = Annotated[int, BeforeValidator(_workers), Field(ge=0)]
Shards = Annotated[str | tuple[str, ...], PlainValidator(_shards)]
Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_one_or_several)]
OnSpike = Annotated[Literal["off", "warn", "skip", "rollback"], BeforeValidator(_on_spike)]
