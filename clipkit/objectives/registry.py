"""From the list `objectives` of a configuration to weighted objectives, built-in or brought by the user."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipkit.objectives.base import Objective
from clipkit.types import ConfigError

ENTRY_POINTS = "clipkit.objectives"


def find_objective(name: str, registry: Mapping[str, type[Objective]]) -> type[Objective]:
    """Returns the class behind a name.

    `name` is a key of `registry`, the name of an entry point of the group "clipkit.objectives" in an
    installed package, or PATH.py:CLASS, a file that is executed. Raises ConfigError.
    """
    if name in registry:
        return registry[name]
    if ".py:" in name:
        return _from_file(*name.rsplit(":", 1))
    installed = {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name in installed:
        return _checked(installed[name].load(), name)
    near = difflib.get_close_matches(name, [*registry, *installed], n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise ConfigError(
        f"unknown objective `{name}`",
        f"{hint}known: {', '.join(sorted([*registry, *installed]))}; or a file of yours, path.py:Class",
    )


def _from_file(path: str, name: str) -> type[Objective]:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no file {path}", "give the path of the Python file, seen from this directory")
    spec = importlib.util.spec_from_file_location(f"clipkit_objective_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Objective)]
        raise ConfigError(
            f"{path} has no class `{name}`", f"objectives in it: {', '.join(classes) or 'none'}"
        )
    return _checked(getattr(module, name), f"{path}:{name}")


def _checked(found: Any, name: str) -> type[Objective]:
    if not (inspect.isclass(found) and issubclass(found, Objective)):
        raise ConfigError(f"`{name}` is not an objective", "derive the class from clipkit.Objective")
    return found


def options_of(kind: type[Objective]) -> list[str]:
    """Returns the names of the options that an objective takes."""
    return [word for word in inspect.signature(kind.__init__).parameters if word != "self"]


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
        kind = find_objective(name, registry)
        known = options_of(kind)
        for word in options:
            if word not in known:
                near = difflib.get_close_matches(word, known, n=1)
                hint = f"did you mean `{near[0]}`? " if near else ""
                raise ConfigError(
                    f"objective `{name}` has no option `{word}`",
                    f"{hint}options of `{name}`: {', '.join(known) or 'none'}",
                )
        label = name if ".py:" not in name else name.rsplit(":", 1)[1].lower()
        # A label becomes the name of a submodule, where dots separate.
        label = label.replace(".", "_")
        count = 1 + sum(known == label or known.startswith(f"{label}_") for known in built)
        built[label if count == 1 else f"{label}_{count}"] = (kind(**options), weight)
    if not built:
        raise ConfigError("the list `objectives` is empty", "add one, e.g. objectives: [{name: clip}]")
    return built
