"""`clipkit init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipkit.cli.output import StageProgress, check_out, say, table
from clipkit.types import ConfigError

Budget = Annotated[
    str | None, typer.Option(metavar="TIME", help="How long the run may take, for example 10h.")
]


def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            show_default=False,
            help="A CSV, TSV or Parquet table, a folder of images with same-stem .txt, or shards.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Fine-tune it: an export, a run, or a name:tag."),
    ] = None,
    budget: Budget = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The run file.")] = Path("run.yaml"),
    image_root: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder or zip of a table's images.")
    ] = None,
    image_key: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="A table's column of image paths.")
    ] = None,
    captions: Annotated[
        list[str] | None,
        typer.Option("--caption", metavar="FIELD", help="A caption column or field; repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run file.")] = False,
) -> None:
    """Look at data and machine and write a run file with the reason behind every value.

    Counts pairs, looks at up to 4,096 of them, measures a few real training steps. Writes the run file alone.

    Example: clipkit init catalogue/pairs.csv --budget 10h && clipkit pretrain run.yaml
    """
    seconds = _seconds(budget)
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already", "choose another --out, or pass --overwrite")
    check_out(out)
    from clipkit.data.shards import write_text
    from clipkit.proposal import propose

    with StageProgress() as progress:
        found = propose(
            data,
            model=model,
            budget=budget,
            budget_s=seconds,
            image_root=image_root,
            image_key=image_key,
            captions=tuple(captions or ()),
            progress=progress,
        )
    write_text(out, found.text)
    say(
        *table(found.rows),
        "",
        *found.text.splitlines(),
        "",
        f"written to {out}; next: clipkit pretrain {out}",
    )


def _seconds(budget: str | None) -> float | None:
    from clipkit.config import parse_interval

    if budget is None:
        return None
    try:
        seconds = parse_interval(budget).seconds
    except ValueError:
        seconds = None
    if seconds is None:
        raise ConfigError(f"--budget {budget} is no time", "write for example 90min, 10h or 2d")
    return seconds
