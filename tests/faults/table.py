"""The table of faults: rows declared by tests, results recorded by a run of them."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

GUIDE = Path(__file__).parents[2] / "examples" / "guides" / "faults.md"
_HEAD = "| row | fault | what happens | last result |\n|---|---|---|---|\n"
_MEASURED = re.compile(r"\d+ passed, (\S+), (\d+ cores): (.*)")
_LINE = re.compile(r"^\| (F\d+) \| (.*?) \| (.*?) \| (.*?) \|$", flags=re.MULTILINE)


class Row(NamedTuple):
    """What a test declares by `pytest.mark.fault(name, injected, outcome)`."""

    name: str
    injected: str
    outcome: str


def rows_of(marks: Iterator[pytest.Mark] | list[pytest.Mark]) -> list[Row]:
    """Returns the rows among the marks of a test."""
    return [Row(*mark.args) for mark in marks if mark.name == "fault"]


def declared() -> dict[str, list[Row]]:
    """Returns test -> its rows, of every test in this folder, without running any."""
    found: dict[str, list[Row]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.faults.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("test_f") and function.__module__ == module.__name__:
                found[f"{path.name}::{name}"] = rows_of(getattr(function, "pytestmark", []))
    return found


def read(text: str) -> dict[Row, str]:
    """Returns row -> last result of a written table."""
    return {Row(*found[:3]): found[3] for found in _LINE.findall(text)}


def write(text: str, results: Mapping[Row, str]) -> str:
    """Returns the guide with the table of every declared row, results of this run over the earlier ones."""
    kept = read(text)
    kept |= {row: combined(kept.get(row, ""), result) for row, result in results.items()}
    rows = {row for found in declared().values() for row in found}
    order = sorted(rows, key=lambda row: (int(row.name[1:]), row.injected))
    lines = [f"| {' | '.join([*row, kept.get(row, 'not run')])} |\n" for row in order]
    before = text.partition(_HEAD)[0]
    return before + _HEAD + "".join(lines)


def combined(old: str, new: str) -> str:
    """Returns the newer result of a row, with the cases of the older one that were measured and not repeated.

    A matrix of hours may be run in parts: a case is known by what stands before its colon.
    """
    before, after = _MEASURED.fullmatch(old), _MEASURED.fullmatch(new)
    if before is None or after is None:
        return new
    cases = {case.partition(":")[0]: case for found in (before, after) for case in found[3].split("; ")}
    return f"{len(cases)} passed, {after[1]}, {after[2]}: {'; '.join(cases.values())}"


def summary(outcomes: list[str], measured: list[Any], day: str, cores: int | None) -> str:
    """Returns the result of the cases of one row: what failed or was skipped, then when it was."""
    counts = {outcome: outcomes.count(outcome) for outcome in ("failed", "passed", "skipped")}
    parts = [f"{count} {outcome}" for outcome, count in counts.items() if count]
    extra = f", {cores} cores: {'; '.join(map(str, measured))}" if measured else ""
    return f"{', '.join(parts)}, {day}{extra}"
