"""`pytest -n 0 tests/faults --fault-table` writes the results of the run into the guide of faults."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_tiny_shards
from tests.data.makers import write_shards
from tests.faults import table
from tests.train.runs import values

_rows: dict[str, list[table.Row]] = {}
_outcomes: dict[table.Row, list[str]] = {}
_measured: dict[table.Row, list[Any]] = {}


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples in five uneven shards."""
    return write_shards(tmp_path_factory.mktemp("uneven"), [37, 1, 50, 9, 23])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 samples in two shards, for a test to damage."""
    return write_tiny_shards(tmp_path / "shards", samples=24, per_shard=12)


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> dict[str, Any]:
    """Values of a run of two steps on `shards`."""
    return values(shards, tmp_path / "run", run__steps=2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", action="store_true", help="write examples/guides/faults.md")


def pytest_configure(config: pytest.Config) -> None:
    # Each process of a parallel run would write what it saw alone.
    if config.getoption("--fault-table", default=False) and config.getoption("numprocesses", default=None):
        raise pytest.UsageError("--fault-table needs one process: add -n 0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _rows.update({item.nodeid: table.rows_of(list(item.iter_markers("fault"))) for item in items})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A skip comes from the set-up, a result from the call, and a failure from anywhere.
    if report.when != "call" and report.passed:
        return
    for row in _rows.get(report.nodeid, []):
        _outcomes.setdefault(row, []).append(report.outcome)
        _measured.setdefault(row, []).extend(
            value for name, value in report.user_properties if name == "measured"
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--fault-table", default=False):
        return
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    results = {
        row: table.summary(outcomes, _measured[row], day, os.cpu_count())
        for row, outcomes in _outcomes.items()
        # A slow test that this run left out keeps the result of the run that did not.
        if set(outcomes) != {"skipped"}
    }
    table.GUIDE.write_text(table.write(table.GUIDE.read_text(encoding="utf-8"), results), encoding="utf-8")
