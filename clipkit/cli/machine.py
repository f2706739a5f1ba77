"""`clipkit doctor`."""

from __future__ import annotations

import typer

from clipkit.cli.output import say, table


def doctor() -> None:
    """Look at versions, devices, memory, disk and limits; exit 1, with cures, when something is wrong."""
    from clipkit.doctor import examine

    findings = examine()
    say(table([[finding.name, finding.value] for finding in findings]))
    problems = [finding for finding in findings if finding.cure]
    for finding in problems:
        say(f"problem: {finding.name}: {finding.value}\n  cure: {finding.cure}")
    if problems:
        raise typer.Exit(1)
