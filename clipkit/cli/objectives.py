"""`clipkit test-objective`."""

from __future__ import annotations

from typing import Annotated

import typer

from clipkit.cli.output import say, table


def check_objective(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name of the registry, an entry point, or PATH.py:CLASS.")
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...")] = None,
) -> None:
    """Check an objective: gradients, rows, micro-batches, saved state, 2 and 3 ranks; exit 4 on failure."""
    from clipkit.config import read_options
    from clipkit.objectives import suite
    from clipkit.types import GateError

    findings = suite.check_all(suite.FromEntry({"name": name, **read_options(options or [])}))
    say(*table([["ok" if f.holds else "FAILED", f.check, f.detail] for f in findings]))
    failed = [finding.check for finding in findings if not finding.holds]
    if failed:
        raise GateError(
            f"`{name}` fails {len(failed)} of {len(findings)} checks: {', '.join(failed)}",
            "return the mean over this rank's rows against gathered candidates, keep state in buffers and "
            "change it in after_step alone, and declare what is read; examples/own_objective.py passes",
        )
