"""One checkpoint on disk, and which of several is the newest that can be trusted. Changes nothing on disk."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipkit.checkpoint.manifest import Defect, check_files, read_manifest
from clipkit.checkpoint.rows import Stored, rows_file, stored
from clipkit.types import ClipkitError, ConfigError

LATEST = "latest"
# `.old-<id>`: an earlier save of the same step that had to step aside while its successor was moved in.
_FINISHED = re.compile(r"step-(\d{8,})(\.old-[0-9a-f]{12})?")


class Skipped(NamedTuple):
    """A checkpoint that was passed over, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint; its files are read when asked for."""

    path: Path
    step: int
    manifest: dict[str, Any]
    skipped: tuple[Skipped, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return int(self.manifest["world_size"])

    @property
    def sharded(self) -> bool:
        """Whether every rank wrote its own rows of the weights."""
        return rows_file(0, "json") in self.manifest["files"]

    @property
    def identity(self) -> dict[str, Any]:
        """What `save` was given as `identity`."""
        return dict(self.manifest["identity"])

    def _file(self, name: str) -> Path:
        if name not in self.manifest["files"]:
            known = ", ".join(self.manifest["files"])
            raise ClipkitError(f"checkpoint {self.path} holds no {name} (it holds {known})", cure(self.path))
        return self.path / name

    def _load(self, name: str) -> dict[str, Tensor]:
        path = self._file(name)
        try:
            return load_file(path, device="cpu")
        except (OSError, SafetensorError) as error:
            raise ClipkitError(f"{path} cannot be read: {error}", cure(self.path)) from error

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Returns the tensors saved under `stem`, on the CPU, those that the run keeps once among them."""
        return {name: x.read() for name, x in self.stored(stem).items()}

    def stored(self, stem: str) -> dict[str, Stored]:
        """Returns the same tensors unread, for those who need some of them, or some of their rows."""
        return stored(self._file(f"{stem}.safetensors").parent, stem, self.manifest["files"], cure(self.path))

    def rank_tensors(self, rank: int) -> dict[str, Tensor] | None:
        """Returns what rank `rank` saved, or None when the checkpoint was written by fewer ranks."""
        return self._load(rank_file(rank)) if rank < self.world_size else None

    def document(self, stem: str) -> dict[str, Any]:
        """Returns the JSON document saved under `stem`."""
        path = self._file(f"{stem}.json")
        try:
            return dict(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise ClipkitError(f"{path} cannot be read: {error}", cure(self.path)) from error


@dataclass(frozen=True)
class Candidate:
    """A directory named like a finished checkpoint; `manifest` is None when it cannot be trusted."""

    path: Path
    step: int
    replaced: bool
    manifest: dict[str, Any] | None
    reason: str = ""

    @property
    def sequence(self) -> int:
        """Which save of the run this was, from 1; 0 when unknown."""
        return int(self.manifest["sequence"]) if self.manifest else 0


def rank_file(rank: int) -> str:
    """Returns the file name of the random states of one rank."""
    return f"rng-rank{rank}.safetensors"


def cure(path: Path) -> str:
    """Returns the line of cure for a checkpoint that cannot be used."""
    return f"give another checkpoint of {path.parent}, or --resume auto to take the newest intact one"


def _candidate(path: Path, tolerant: bool) -> Candidate | None:
    match = _FINISHED.fullmatch(path.name)
    if match is None or not path.is_dir():
        return None
    step, replaced = int(match[1]), match[2] is not None
    try:
        manifest = read_manifest(path)
        if manifest["step"] != step:
            raise Defect(f"was renamed (its manifest is of step {manifest['step']})")
    except Defect as defect:
        return Candidate(path, step, replaced, None, str(defect))
    except OSError as error:
        if not tolerant:
            raise
        return Candidate(path, step, replaced, None, f"its manifest cannot be read ({error.strerror})")
    return Candidate(path, step, replaced, manifest)


def candidates(folder: Path, *, tolerant: bool = False) -> list[Candidate]:
    """Returns the finished checkpoints of a folder, newest first, those without a usable manifest last.

    A reader is `tolerant` of a manifest that the disk does not give; a writer is not (OSError), because it
    numbers and prunes by what it read, and would remove a good checkpoint after a passing read error.
    """
    if not folder.is_dir():
        return []
    found = [candidate for path in folder.iterdir() if (candidate := _candidate(path, tolerant))]
    return sorted(found, key=lambda c: (c.sequence, c.step, not c.replaced), reverse=True)


def newest_in(folder: Path) -> Checkpoint | None:
    """Returns the newest intact checkpoint, None when there is none at all.

    Raises ClipkitError with every reason when there are checkpoints and none of them is intact.
    """
    found = candidates(folder, tolerant=True)
    skipped = _pointer_defects(folder)
    for candidate in found:
        try:
            if candidate.manifest is None:
                raise Defect(candidate.reason)
            check_files(candidate.path, candidate.manifest)
        except Defect as defect:
            skipped.append(Skipped(candidate.path.name, str(defect)))
            continue
        # Those without a usable manifest sort last, although they may well have been the newest.
        skipped += [
            Skipped(other.path.name, other.reason)
            for other in found
            if other.manifest is None and other.step >= candidate.step
        ]
        return Checkpoint(candidate.path, candidate.step, candidate.manifest, tuple(skipped))
    if not found:
        return None
    reasons = "; ".join(str(entry) for entry in skipped)
    raise ClipkitError(
        f"no checkpoint in {folder} is intact: {reasons}",
        "restore one of them from a copy, or start anew in another run.dir",
    )


def _pointer_defects(folder: Path) -> list[Skipped]:
    """`latest` is for people and scripts: a broken one is reported; the manifests decide."""
    pointer = folder / LATEST
    if not pointer.is_file():
        return []
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not _FINISHED.fullmatch(name):
        return [Skipped(LATEST, "names no checkpoint")]
    return [] if (folder / name).is_dir() else [Skipped(LATEST, f"names {name}, which is not there")]


def open_path(path: Path) -> Checkpoint:
    """Returns the checkpoint in the directory `path`, or the one that a file `latest` names.

    Raises ConfigError when nothing is there, ClipkitError naming the defect when it is not intact.
    """
    if path.name == LATEST and path.is_file():
        path = path.parent / path.read_text(encoding="utf-8", errors="replace").strip()
    if not path.is_dir():
        raise ConfigError(f"there is no checkpoint directory {path}", cure(path))
    try:
        manifest = read_manifest(path)
        check_files(path, manifest)
    except (Defect, OSError) as defect:
        raise ClipkitError(f"checkpoint {path} is damaged: {defect}", cure(path)) from defect
    return Checkpoint(path, int(manifest["step"]), manifest)
