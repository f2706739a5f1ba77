"""A folder that is about to take shards: what of an earlier run goes, and what is not clipkit's and stays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from clipkit.data.source import is_remote
from clipkit.types import ConfigError

SUMMARIES = ("sizes.json", "manifest.json")  # in the order of removal: sizes.json is known by the manifest
MANIFEST_FORMAT = "clipkit shards "


def begin_shards(folder: Path, *summaries: str) -> None:
    """Makes the folder and removes the summaries of an earlier run, written again when all is there.

    Raises ConfigError, before anything is touched, for a file that has their name and is not clipkit's.
    """
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in summaries:
        (folder / name).unlink(missing_ok=True)


def shards_in(folders: Iterable[Path]) -> Iterator[Path]:
    """Yields the tar files that lie in these folders."""
    for folder in folders:
        yield from sorted(folder.glob("*.tar"))


def refuse_source(folders: Iterable[Path], shards: Sequence[str], option: str = "--out") -> None:
    """Raises ConfigError when a shard that is read lies where `option` writes, which would replace it."""
    taken = {os.path.realpath(folder): folder for folder in folders}
    for shard in shards:
        if is_remote(shard):
            continue
        # A linked shard lies in two folders, and writing to either would replace it.
        for folder in (
            os.path.realpath(os.path.dirname(shard) or "."),
            os.path.dirname(os.path.realpath(shard)),
        ):
            if folder in taken:
                raise ConfigError(
                    f"{option} {taken[folder]} holds {shard}, which is read and would be replaced",
                    "choose another folder",
                )


def refuse_other_layout(out: Path, train: bool) -> None:
    """Raises ConfigError when an evaluation set lies where training shards are to go, or the other way round.

    Both describe what they left out in one rejects.jsonl, and --overwrite replaces shards of its own layout.
    """
    shard = out / "test" / "0.tar" if train else next(iter(sorted(out.glob("*.tar"))), None)
    if shard is not None and shard.exists():
        kind = "an evaluation set" if train else "training shards"
        raise ConfigError(f"{out} already holds {kind}: {shard}", "choose another folder")


def refuse_foreign(folder: Path) -> None:
    """Raises ConfigError when sizes.json or manifest.json of `folder` belongs to something else."""
    # The manifest is read first: another machine that begins the same job removes it last.
    ours = has_format(folder / "manifest.json", MANIFEST_FORMAT)
    if not ours:
        _refuse(folder / "manifest.json")
        if not any(folder.glob("*.tar")):
            _refuse(folder / "sizes.json")


def has_format(path: Path, *formats: str) -> bool:
    """Returns whether `path` is a JSON object whose "format" begins with one of `formats`."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("format", "")).startswith(tuple(formats))


def _refuse(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise ConfigError(
            f"{path}: is not of clipkit's shards, and writing there would replace it", "choose another folder"
        )
