"""The guide of faults holds exactly what the tests declare, and no row without a good result."""

from __future__ import annotations

import re

from tests.faults import table


def test_every_row_of_the_list_has_a_test_named_after_it() -> None:
    rows = {row.name for found in table.declared().values() for row in found}
    assert rows == {f"F{number}" for number in range(1, 35)}
    for test, found in table.declared().items():
        named = re.search(r"::test_((?:f\d\d_)+)", test)
        assert named is not None, test
        assert {f"F{int(part[1:])}" for part in named[1].split("_") if part} == {row.name for row in found}, (
            test
        )


def test_the_guide_has_the_rows_of_the_tests_and_their_results() -> None:
    written = table.read(table.GUIDE.read_text(encoding="utf-8"))
    declared = {row for found in table.declared().values() for row in found}
    assert set(written) == declared, "write it again: pytest -n 0 tests/faults --fault-table"
    for row, result in written.items():
        assert re.fullmatch(r"\d+ passed, 20\d\d-\d\d-\d\d(, \d+ cores: .*)?", result), (row, result)


def test_results_of_other_runs_are_kept() -> None:
    old = table.Row("F1", "a", "b")
    first, *_ = [row for found in table.declared().values() for row in found]
    text = table.write(table.write("# Head\n\n", {first: "1 passed, today"}), {old: "2 passed, today"})
    assert text.startswith("# Head\n\n| row |")
    assert table.read(text)[first] == "1 passed, today"
    assert old not in table.read(text), "no test declares it"
    parts = [f"1 passed, {day}, 2 cores: {case}" for day, case in (("old", "a: 1"), ("new", "b: 2"))]
    assert table.combined(*parts) == "2 passed, new, 2 cores: a: 1; b: 2"
    assert table.combined(parts[0], "1 failed, new") == "1 failed, new"
    assert table.summary(["passed", "failed", "passed"], ["3 kills"], "today", 2) == (
        "1 failed, 2 passed, today, 2 cores: 3 kills"
    )
