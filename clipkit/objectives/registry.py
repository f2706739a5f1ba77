"""From the list `objectives` of a configuration to weighted objectives, built-in or brought by the user."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from clipkit.objectives.base import Objective, check_number
from clipkit.types import ConfigError, Needs

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
        try:
            found = installed[name].load()
        except Exception as error:
            raise ConfigError(
                f"objective `{name}` of an installed package cannot be loaded: {_said(error)}",
                "repair or reinstall the package; --traceback shows where it fails",
            ) from error
        return _checked(found, name)
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
    # As an import would: dataclasses and pickle look a class up under the name of its module.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        raise ConfigError(
            f"{path} cannot be executed: {_said(error)}",
            "correct the file, or install what it imports; --traceback shows the line",
        ) from error
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


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def options_of(kind: type[Objective]) -> dict[str, bool]:
    """Returns option -> whether it must be given, for the options that an objective names."""
    named = inspect.signature(kind.__init__).parameters.values()
    return {
        option.name: option.default is option.empty
        for option in named
        if option.name != "self" and option.kind not in (option.VAR_POSITIONAL, option.VAR_KEYWORD)
    }


def takes_anything(kind: type[Objective]) -> bool:
    """Returns whether an objective has **options beside those that it names."""
    if kind.__init__ is nn.Module.__init__:  # its **kwargs end in an error
        return False
    named = inspect.signature(kind.__init__).parameters.values()
    return any(option.kind is option.VAR_KEYWORD for option in named)


def check_options(name: str, kind: type[Objective], given: Mapping[str, Any]) -> None:
    """Raises ConfigError when the options `given` to an objective are unknown or not all that it needs."""
    known = options_of(kind)
    for word in given:
        if word not in known and not takes_anything(kind):
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            raise ConfigError(
                f"objective `{name}` has no option `{word}`",
                f"{hint}options of `{name}`: {', '.join(known) or 'none'}",
            )
    missing = [word for word, needed in known.items() if needed and word not in given]
    if missing:
        example = ", ".join(f"{word}: ..." for word in ["name", *missing]).replace("...", name, 1)
        raise ConfigError(f"objective `{name}` needs {' and '.join(missing)}", f"write {{{example}}}")


def _built(name: str, kind: type[Objective], options: dict[str, Any]) -> Objective:
    try:
        return kind(**options)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"objective `{name}` refuses its options: {_said(error)}",
            "give values of the kind its description names; --traceback shows where it fails",
        ) from error


def build_objectives(
    entries: Sequence[Mapping[str, Any]], registry: Mapping[str, type[Objective]]
) -> dict[str, tuple[Objective, float]]:
    """Returns label -> (objective, weight) in the order of the configuration.

    A repeated name gets the labels `clip`, `clip_2`, ...  Raises ConfigError for an unknown name, for an
    unknown or missing option, and for options of the wrong value, naming the nearest valid word.
    """
    built: dict[str, tuple[Objective, float]] = {}
    for entry in entries:
        options = dict(entry)
        name, weight = str(options.pop("name")), check_number("weight", options.pop("weight", 1.0), 0.0)
        kind = find_objective(name, registry)
        check_options(name, kind, options)
        label = name if ".py:" not in name else name.rsplit(":", 1)[1].lower()
        # A label becomes the name of a submodule, where dots separate.
        label = label.replace(".", "_")
        count = 1 + sum(known == label or known.startswith(f"{label}_") for known in built)
        built[label if count == 1 else f"{label}_{count}"] = (_built(name, kind, options), weight)
    if not built:
        raise ConfigError("the list `objectives` is empty", "add one, e.g. objectives: [{name: clip}]")
    return built


def needs_of(objectives: Iterable[Objective]) -> Needs:
    """Returns the union of what objectives declare; raises ConfigError where they contradict each other."""
    needs = Needs()
    for part in objectives:
        needs = needs | part.needs
    return needs
