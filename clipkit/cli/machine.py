"""`clipkit doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import say, table


def doctor(
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Look at what is between the ranks that torchrun started.")
    ] = False,
    directory: Annotated[
        Path, typer.Option("--dir", help="With --distributed: where the run directory will be.")
    ] = Path(),
) -> None:
    """Look at versions, devices, memory, disk and limits; exit 1, with cures, when something is wrong.

    Between ranks: torchrun --nproc_per_node 2 -m clipkit doctor --distributed
    """
    from clipkit.doctor import examine, examine_ranks

    findings = examine_ranks(directory) if distributed else examine()
    say(*table([[finding.name, finding.value] for finding in findings]))
    problems = [finding for finding in findings if finding.cure]
    for finding in problems:
        say(f"problem: {finding.name}: {finding.value}", f"  cure: {finding.cure}")
    if problems:
        raise typer.Exit(1)
