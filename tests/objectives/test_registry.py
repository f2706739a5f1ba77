"""Objectives that are not clipkit's, from a file or an installed package, and what goes wrong with them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from clipkit.objectives import OBJECTIVES, Objective, build_objectives
from clipkit.objectives.registry import ENTRY_POINTS
from clipkit.types import ConfigError

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from clipkit import Objective

@dataclass
class Settings:
    strength: float

class Own(Objective):
    def __init__(self, needed, strength=1.0, **others):
        super().__init__()
        self.settings, self.others = Settings(float(strength)), others

class Plain(Objective):
    pass
"""


def entry(path: Path, name: str = "Own", **options: Any) -> dict[str, Any]:
    return {"name": f"{path}:{name}", **options}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_file_brings_an_objective_with_its_options(own: Path) -> None:
    parts = build_objectives([entry(own, needed=1, strength=2, more=3, weight=0.5)], OBJECTIVES)
    ((label, (part, weight)),) = parts.items()
    assert (label, weight) == ("own", 0.5)
    assert (part.settings.strength, part.others) == (2.0, {"more": 3})
    assert list(build_objectives([entry(own, "Plain")], OBJECTIVES)) == ["plain"]


@pytest.mark.parametrize(
    ("name", "options", "cause", "cure"),
    [
        ("Own", {}, "needs needed", "needed: ..."),
        ("Own", {"needed": 1, "strength": "a lot"}, "ValueError: could not convert", "--traceback"),
        ("Plain", {"strength": 1}, "no option `strength`", "none"),
        ("Other", {}, "no class `Other`", "Own"),
        ("Settings", {}, "not an objective", "clipkit.Objective"),
    ],
)
def test_what_a_file_does_not_offer_is_named(
    own: Path, name: str, options: dict[str, Any], cause: str, cure: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_objectives([entry(own, name, **options)], OBJECTIVES)
    assert cause in caught.value.cause
    assert cure in caught.value.cure


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("import a_package_that_is_not_there", ModuleNotFoundError),
        ("class Own(:", SyntaxError),
        ("1 / 0", ZeroDivisionError),
    ],
)
def test_a_file_that_cannot_be_executed_is_named_with_its_error(
    tmp_path: Path, source: str, kind: type[Exception]
) -> None:
    path = tmp_path / "own.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=kind.__name__) as caught:
        build_objectives([entry(path)], OBJECTIVES)
    assert str(path) in caught.value.cause
    assert isinstance(caught.value.__cause__, kind)
    assert "correct the file" in caught.value.cure


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        build_objectives([entry(tmp_path / "none.py")], OBJECTIVES)


class FromPackage(Objective):
    pass


def test_an_installed_package_brings_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    group = [
        importlib.metadata.EntryPoint("from_package", f"{__name__}:FromPackage", ENTRY_POINTS),
        importlib.metadata.EntryPoint("a.function", f"{__name__}:entry", ENTRY_POINTS),
        importlib.metadata.EntryPoint("gone", "a_package_that_is_not_there:Own", ENTRY_POINTS),
    ]

    def entry_points(*, group: str, known: Any = tuple(group)) -> Any:
        assert group == ENTRY_POINTS
        return known

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    ((label, (part, _)),) = build_objectives([{"name": "from_package"}], OBJECTIVES).items()
    assert label == "from_package"
    assert type(part) is FromPackage
    with pytest.raises(ConfigError, match="not an objective"):
        build_objectives([{"name": "a.function"}], OBJECTIVES)
    with pytest.raises(ConfigError, match="cannot be loaded: ModuleNotFoundError") as caught:
        build_objectives([{"name": "gone"}], OBJECTIVES)
    assert "reinstall" in caught.value.cure
    with pytest.raises(ConfigError) as caught:
        build_objectives([{"name": "from_packages"}], OBJECTIVES)
    assert "did you mean `from_package`?" in caught.value.cure
