"""`clipkit index` and the jobs of `clipkit data`: one file each, one program each in data_scripts/."""

from __future__ import annotations

import sys

import typer

from clipkit.cli.data.check_shards import check_shards
from clipkit.cli.data.index import index
from clipkit.cli.data.make_shards import make_shards
from clipkit.cli.data.reshard import reshard
from clipkit.cli.data.stats import stats

__all__ = ["app", "index", "script"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make, check, describe, reshard and filter shards.",
)
app.command("make-shards")(make_shards)
app.command("reshard")(reshard)
app.command("check-shards")(check_shards)
app.command("stats")(stats)


def script(job: str) -> int:
    """Runs `clipkit data JOB` with the arguments of this process and returns its exit code."""
    from clipkit.cli.app import main

    return main(["data", job, *sys.argv[1:]])
