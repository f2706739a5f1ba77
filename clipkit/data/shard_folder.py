"""A folder that is about to take shards: what of an earlier run goes, and what is not clipkit's and stays."""

from __future__ import annotations

import json
from pathlib import Path

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


def refuse_shards(folder: Path) -> None:
    """Raises ConfigError when `folder` already holds tar files, which writing there would replace."""
    if any(folder.glob("*.tar")):
        raise ConfigError(f"{folder} already holds shards", "choose another folder, or pass --overwrite")


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
