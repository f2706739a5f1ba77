"""The house rules that a reader relies on: floors, names, sizes, light imports, pins."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clipkit"

FLOORS = {
    "redaction": 0,
    "types": 0,
    "dist": 0,
    "lock": 0,
    "losses": 1,
    "data": 1,
    "models": 1,
    "optim": 1,
    "objectives": 2,
    "learner": 3,
    "config": 3,
    "log": 3,
    "checkpoint": 3,
    "export": 3,
    "evaluation": 3,
    "train": 4,
    "report": 4,
    "bench": 4,
    "quickstart": 5,
    "doctor": 5,
    "proposal": 5,
    "cli": 5,
}

# importer -> imported, on the same floor, and why.
SAME_FLOOR = {
    ("dist", "types"): "ranks report failures in the words of types",
    ("types", "redaction"): "no error carries a secret, wherever it is shown",
    ("export", "checkpoint"): "a run directory is loaded from its newest checkpoint",
    ("export", "config"): "an export carries the resolved configuration",
    ("evaluation", "log"): "long evaluations report progress",
    ("cli", "quickstart"): "a command calls one function",
    ("cli", "doctor"): "a command calls one function",
    ("cli", "proposal"): "a command calls one function",
    ("proposal", "doctor"): "a run file is proposed for the machine that doctor describes",
}

# Files at the top that are not on a floor: they name others only lazily or run them.
DOORS = {"__init__", "__main__"}

MAX_FILE = 400
MAX_FUNCTION = 60
# Path, or path::function -> why it may be longer.
ALLOWED_LENGTH: dict[str, str] = {}

FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "clipkit",
    "data_scripts",
    "configs",
    "tests",
    "examples",
    ".ci",
    ".gitignore",
}


def tracked() -> list[Path]:
    """Files of the repository: what git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True)
    if found.returncode:
        pytest.skip("this is no git checkout: run the test in a clone")
    paths = (ROOT / name for name in found.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports anywhere, functions and TYPE_CHECKING blocks included."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from clipkit import dist` names a module by its alias; deeper ones by the module itself.
            names = [f"{stem}.{alias.name}" for alias in node.names] if stem == "clipkit" else [stem]
            yield from ((name, node.lineno) for name in names)


def part_of(name: str) -> str | None:
    """The floor member that a dotted name belongs to; None outside clipkit and for its promised names."""
    parts = name.split(".")
    return parts[1] if parts[0] == "clipkit" and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_module_stands_on_a_floor() -> None:
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in sources("clipkit")}
    assert parts - DOORS <= FLOORS.keys()


def test_imports_point_down() -> None:
    wrong = []
    for path in sources("clipkit"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own in DOORS:
            continue
        for name, line in imported(path):
            other = part_of(name)
            if other is None or other == own:
                continue
            beside = FLOORS[other] == FLOORS[own] and (own, other) in SAME_FLOOR
            if FLOORS[other] >= FLOORS[own] and not beside:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_losses_import_torch_only() -> None:
    standard = {"__future__", "math", "collections", "dataclasses", "typing", "functools"}
    for path in sources("clipkit/losses"):
        for name, line in imported(path):
            root = name.split(".")[0]
            assert root in {"torch", *standard} or name.startswith("clipkit.losses"), f"{path}:{line} {name}"


@pytest.mark.parametrize(
    ("importer", "never"),
    [("objectives", {"data"}), ("evaluation", {"train", "learner"})],
)
def test_parts_that_must_not_know_each_other(importer: str, never: set[str]) -> None:
    for path in sources(f"clipkit/{importer}"):
        for name, line in imported(path):
            assert part_of(name) not in never, f"{path}:{line} imports {name}"


def test_light_modules_load_nothing_heavy_when_imported() -> None:
    # By the source and not by sys.modules, so that the offending line is named.
    heavy = {"torch", "torchvision", "open_clip", "timm", "transformers", "accelerate", "webdataset"}
    light = [
        PACKAGE / f"{name}.py" for name in ("__init__", "__main__", "redaction", "types", "log", "doctor")
    ]
    for path in [*light, *sources("clipkit/cli", "clipkit/config")]:
        for node in parsed(path).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] not in heavy, f"{path.name}:{node.lineno} imports {name}"


def test_no_file_or_function_is_too_long() -> None:
    long = {}
    for path in sources("clipkit", "data_scripts"):
        name = str(path.relative_to(ROOT))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            long[name] = f"{lines} lines"
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    long[f"{name}::{node.name}"] = f"{length} lines"
    assert {name: count for name, count in long.items() if name not in ALLOWED_LENGTH} == {}
    assert sorted(ALLOWED_LENGTH.keys() - long.keys()) == [], "these are short enough now"


def test_examples_configs_and_readme_stay_short() -> None:
    limits = {**dict.fromkeys((ROOT / "examples").glob("*.py"), 100), ROOT / "README.md": 400}
    limits |= dict.fromkeys((ROOT / "configs").rglob("*.yaml"), 40)
    for path, limit in limits.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines"


def test_names_say_what_things_are() -> None:
    for path in sources("clipkit", "data_scripts", "tests", "examples"):
        words = {word for part in path.relative_to(ROOT).with_suffix("").parts for word in part.split("_")}
        assert not words & FORBIDDEN_NAMES, path


def test_the_top_level_is_fixed() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in tracked()} <= TOP_LEVEL


def test_no_file_speaks_of_one_machine_or_holds_an_unfinished_note() -> None:
    # Joined from halves, so that this file does not contain what it forbids.
    forbidden = [
        "/ho" + "me/",
        "/ro" + "ot/",
        "/wo" + "rk/",
        "/Us" + "ers/",
        "TO" + "DO",
        "FIX" + "ME",
        "XX" + "X",
    ]
    pattern = re.compile("|".join(map(re.escape, forbidden)))
    found = []
    for path in tracked():
        if path.name == "LICENSE" or path.suffix not in {".py", ".md", ".toml", ".yaml", ".yml", ""}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}")
    assert found == []


def test_public_names_are_few_and_explained() -> None:
    import clipkit

    assert len(clipkit.__all__) <= 20
    assert (PACKAGE / "py.typed").is_file()
    for name in clipkit.__all__:
        value = getattr(clipkit, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        assert inspect.getdoc(value), f"clipkit.{name} has no docstring"
        for member, entry in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and (inspect.isfunction(entry) or isinstance(entry, property)):
                assert inspect.getdoc(entry), f"clipkit.{name}.{member} has no docstring"
    for path in PACKAGE.rglob("__init__.py"):
        for node in parsed(path).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                assert len(ast.literal_eval(node.value)) <= 20, f"{path.relative_to(ROOT)}: __all__"


def test_pins_are_exact_and_satisfy_the_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins: dict[str, list[Requirement]] = {}
    for text in project["tool"]["uv"]["constraint-dependencies"]:
        pin = Requirement(text)
        assert [part.operator for part in pin.specifier] == ["=="], text
        assert "://" not in text
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for text in project["project"]["dependencies"] + project["dependency-groups"]["dev"]:
        wanted = Requirement(text)
        found = pins.get(canonicalize_name(wanted.name), [])
        assert found, f"{wanted.name} has no pin"
        for pin in found:
            (version,) = pin.specifier
            assert wanted.specifier.contains(version.version), f"{pin} does not satisfy {wanted}"
