"""`clipkit configs ls`, `show` and `validate`."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.output import say, table
from clipkit.types import ClipkitError, ConfigError, DataError

if TYPE_CHECKING:
    from clipkit.config import Config
    from clipkit.types import Needs

app = typer.Typer(help="List, show and check configurations.", no_args_is_help=True, rich_markup_mode=None)
_PACKAGE = Path(__file__).resolve().parents[1]
# An installed package carries its configurations inside, a source checkout beside it.
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")

Paths = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[PATH]...", help="Files or folders; default: those of clipkit."),
]


def _files(paths: list[Path] | None) -> list[Path]:
    roots = paths or [folder for folder in _SHIPPED if folder.is_dir()][:1]
    if not roots:
        raise ConfigError(
            "no configurations are installed", "name YAML files, or work in a checkout of clipkit"
        )
    found: list[Path] = []
    for root in roots:
        if not root.exists():
            raise ConfigError(f"{root} does not exist", "check the path")
        found += sorted(root.rglob("*.yaml")) if root.is_dir() else [root]
    return found


def _near(path: Path) -> Path:
    """The path as short as it can be written from here."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path


def _summary(path: Path) -> str:
    """The first sentence of the comment on top, which says what a configuration is."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return re.split(r"(?<=\.)\s", " ".join(line.lstrip("# ") for line in comment), maxsplit=1)[0]


@app.command("ls")
def ls(paths: Paths = None) -> None:
    """List configurations and what each is for."""
    rows = [[str(_near(path)), _summary(path)] for path in _files(paths)]
    say(*(table(rows) or ["no configurations"]))


@app.command("show")
def show(
    config: Annotated[Path, typer.Argument(show_default=False, help="A YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Print the complete configuration: file, what it extends, overrides and every default."""
    from clipkit.config import load_config

    say(*load_config(config, overrides or []).dump().rstrip().split("\n"))


def _look(config: Config, needs: Needs) -> list[str]:
    """What a few samples of every source hold; nothing of those that are not on this machine."""
    from clipkit.data import preflight
    from clipkit.data.raw import check_columns, raw_of
    from clipkit.data.raw.reading import raw_path
    from clipkit.data.source import expand_shards, is_remote, needs_stream

    lines: list[str] = []
    for number, entry in enumerate(config.data.train):
        source = entry.source
        raw = raw_path(source.shards)
        if raw is not None:
            # Its shards are made when a run begins.
            if raw.exists():
                check_columns(raw_of(source, raw))
            continue
        try:
            shards = expand_shards(source.shards, allow_pipe=config.data.allow_pipe)
        except DataError:
            continue
        if any(is_remote(shard) or needs_stream(shard) or not Path(shard).is_file() for shard in shards):
            continue
        wanted = preflight.Wanted.of(needs, source)
        found = preflight.look(shards, wanted)
        preflight.check(found, wanted, f"data.train.{number}")
        lines += preflight.describe(found, wanted)
    return lines


@app.command("validate")
def validate(paths: Paths = None) -> None:
    """Check configurations completely, objectives and their options included; exit 2 on a problem.

    Where the shards are on this machine, a few of their samples are looked at too: a caption field or label
    that none of them holds is a problem. So are columns that a table of pairs does not have.
    """
    from clipkit.config import ConfigErrors, load_config
    from clipkit.config.problems import Origin, Problem
    from clipkit.objectives import OBJECTIVES, build_objectives, check_batch_size, needs_of

    problems: list[Problem] = []
    files = _files(paths)
    for path in files:
        try:
            checked = load_config(path)
            entries = [{"name": e.name, "weight": e.weight, **e.options} for e in checked.objectives]
            objectives = build_objectives(entries, OBJECTIVES)
            check_batch_size(objectives, checked.data.batch_size)
            lines = _look(checked, needs_of(part for part, _ in objectives.values()))
        except ConfigErrors as error:
            problems += error.problems
        except ClipkitError as error:
            problems.append(Problem(Origin(str(path)), error.cause, error.cure))
        else:
            say(f"{_near(path)}: valid", *(f"  {line}" for line in lines))
    if problems:
        raise ConfigErrors(problems)
