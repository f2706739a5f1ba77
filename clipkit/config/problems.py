"""Every problem of a configuration at once, each with file, line, key, value and the nearest valid key."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, overload

from pydantic import BaseModel, ValidationError

from clipkit.redaction import redact, visible
from clipkit.types import ConfigError

Path_ = tuple[str | int, ...]
ModelT = TypeVar("ModelT", bound=BaseModel)

# What other trainers call the same thing.
_SYNONYMS = {
    "accum_freq": "data.micro_batch",
    "batch": "data.batch_size",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "ema": "run.weight_ema",
    "grad_clip": "optim.clip_norm",
    "grad_clip_norm": "optim.clip_norm",
    "learning_rate": "optim.lr",
    "logs": "run.dir",
    "loss": "objectives",
    "losses": "objectives",
    "max_grad_norm": "optim.clip_norm",
    "num_workers": "data.workers",
    "output_dir": "run.dir",
    "table": "data.train.0.shards",
    "train_data": "data.train",
    "val_data": "run.evaluate",
    "warmup_steps": "optim.warmup",
    "wd": "optim.weight_decay",
}

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section of `key: value` lines",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_attributes_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
    "string_too_short": "a text that is not empty",
    "string_type": "a text",
    "too_long": "a shorter list",
    "too_short": "a longer list",
    "tuple_type": "a list",
}


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and line, or an override."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where, and what cures it."""

    origin: Origin
    cause: str
    cure: str

    def __str__(self) -> str:
        return visible(redact(f"{self.origin}: {self.cause}" if self.origin.source else self.cause))


class ConfigErrors(ConfigError):
    """All problems of one configuration. `problems` lists them; cause and cure join them on one line."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "; ".join(str(problem) for problem in self.problems),
            "; ".join(dict.fromkeys(redact(problem.cure) for problem in self.problems)),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


@overload
def raise_problems(problems: list[Problem]) -> NoReturn: ...
@overload
def raise_problems(problems: Sequence[Problem]) -> None: ...
def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises ConfigErrors when there is at least one problem."""
    if problems:
        raise ConfigErrors(problems)


def dotted(path: Sequence[str | int]) -> str:
    """Returns a path as it is written in an override: data.train.0.shards."""
    return ".".join(str(part) for part in path) or "the file"


def shown(value: Any) -> str:
    """Returns a value for a message: one short line without secrets."""
    text = redact(" ".join(repr(value).split()))
    return text if len(text) <= 80 else text[:77] + "..."


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _submodel(part))), None)


def _model_at(root: type[BaseModel], path: Path_) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        entry = model.model_fields.get(part)
        model = _submodel(entry.annotation) if entry else None
    return model


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, entry in model.model_fields.items():
        yield prefix + name
        below = _submodel(entry.annotation)
        if below is not None:
            yield from _all_keys(below, f"{prefix}{name}.")


def nearest_key(root: type[BaseModel], path: Path_) -> str:
    """Returns the cure for the unknown key at `path`: the nearest valid key, or the keys there are."""
    *parent, key = path
    model = _model_at(root, tuple(parent))
    siblings = list(model.model_fields) if model else []
    close = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {dotted((*parent, close[0]))}?"
    spelt = str(key).replace("-", "_").lower()
    synonym = difflib.get_close_matches(spelt, _SYNONYMS, n=1, cutoff=0.85)
    if synonym:
        return f"did you mean {_SYNONYMS[synonym[0]]}?"
    elsewhere = {known.rpartition(".")[2]: known for known in reversed(list(_all_keys(root)))}
    close = difflib.get_close_matches(spelt, elsewhere, n=1, cutoff=0.75)
    if close:
        return f"did you mean {elsewhere[close[0]]}?"
    return f"remove it; {dotted(parent) if parent else 'a configuration'} has {', '.join(siblings)}"


def _origin(path: Path_, origins: Mapping[Path_, Origin], name: str) -> Origin:
    for end in range(len(path), 0, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return Origin(name)


def _bounds(error: Mapping[str, Any]) -> str | None:
    context = error.get("ctx", {})
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    return next((f"a number {word} {context[key]:g}" for key, word in words.items() if key in context), None)


def _expected(error: Mapping[str, Any]) -> str | None:
    if error["type"] == "literal_error":
        return str(error["ctx"]["expected"]).replace("'", "")
    return _EXPECTED.get(error["type"]) or _bounds(error)


def _describe(
    error: Mapping[str, Any], root: type[BaseModel], origins: Mapping[Path_, Origin], name: str
) -> Problem:
    path: Path_ = tuple(error["loc"])
    key = dotted(path)
    if error["type"] == "missing" and isinstance(path[-1], int):
        origin = _origin(path, origins, name)
        return Problem(origin, f"{dotted(path[:-1])} has too few entries", f"give it at least {path[-1] + 1}")
    if error["type"] == "missing":
        origin = _origin(path[:-1], origins, name)
        return Problem(
            origin, f"{key} is missing", f"add {path[-1]} to {dotted(path[:-1])}, or pass {key}=..."
        )
    origin, value = _origin(path, origins, name), shown(error["input"])
    if error["type"] == "extra_forbidden":
        return Problem(origin, f"unknown key {key} (value {value})", nearest_key(root, path))
    if error["type"] == "clipkit":
        return Problem(origin, f"{key}: {error['msg']}", error["ctx"]["cure"])
    expected = _expected(error)
    if expected is None:
        return Problem(origin, f"{key}: {error['msg']}, not {value}", f"correct {key}")
    return Problem(origin, f"{key}: expected {expected}, not {value}", f"set {key} to {expected}")


def _without(tree: Any, paths: list[Path_]) -> Any:
    """Returns a copy of nested values without the entries at `paths`."""
    gone = {path[0] for path in paths if len(path) == 1}
    if isinstance(tree, Mapping):
        items = {
            key: _without(value, [p[1:] for p in paths if len(p) > 1 and p[0] == key])
            for key, value in tree.items()
        }
        return {key: value for key, value in items.items() if key not in gone}
    if isinstance(tree, list):
        return [
            _without(value, [p[1:] for p in paths if len(p) > 1 and p[0] == i])
            for i, value in enumerate(tree)
        ]
    return tree


def validate(
    root: type[ModelT], tree: Mapping[str, Any], origins: Mapping[Path_, Origin], name: str
) -> ModelT:
    """Returns the checked model of `tree`. Raises ConfigErrors with every problem there is."""
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        errors: list[Any] = error.errors(include_url=False)
    # Rules between keys are checked only where every key is known: look again without the unknown ones.
    unknown = [tuple(entry["loc"]) for entry in errors if entry["type"] == "extra_forbidden"]
    try:
        root.model_validate(_without(tree, unknown))
    except ValidationError as error:
        seen = {(entry["loc"], entry["type"]) for entry in errors}
        errors += [e for e in error.errors(include_url=False) if (e["loc"], e["type"]) not in seen]
    raise_problems([_describe(entry, root, origins, name) for entry in errors])
