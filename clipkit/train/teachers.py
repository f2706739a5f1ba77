"""Fixed teachers, stored once per run, so that a run outlives the place they came from.

RUN/teachers/NAME/    an open_clip directory; every checkpoint records the size and hash of its files
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clipkit import dist
from clipkit.checkpoint import Checkpoint
from clipkit.checkpoint.manifest import Defect, check_files, record_of
from clipkit.data.waiting import together
from clipkit.export.open_clip import TEXT_FOLDER, save_open_clip
from clipkit.models import Towers
from clipkit.train.setup import Run
from clipkit.types import ClipkitError

FOLDER = "teachers"
Records = dict[str, dict[str, Any]]


def stored_teachers(found: Checkpoint | None) -> dict[str, Path]:
    """Returns name -> directory of the teachers that the checkpoint's run has stored; all ranks call it.

    One that is not there is left out and read again from where the configuration says. Raises ClipkitError
    naming the file of one that is not what the checkpoint records.
    """
    if found is None:
        return {}
    paths = together(lambda: _checked(found) if dist.World.current().is_main else {})
    first: dict[str, Path] = dist.gather_objects(paths)[0]
    return first


def _checked(found: Checkpoint) -> dict[str, Path]:
    # RUN/checkpoints/step-...: its teachers lie in RUN.
    folder = found.path.resolve().parent.parent / FOLDER
    paths = {}
    for name, records in recorded(found).items():
        path = folder / name
        if not path.is_dir():
            continue
        try:
            check_files(path, {"files": records})
        except Defect as defect:
            raise ClipkitError(
                f"the stored teacher {path} is damaged: {defect}",
                "restore that directory from a copy, or remove it: the teacher is then read again from where "
                "the configuration says",
            ) from defect
        paths[name] = path
    return paths


def recorded(found: Checkpoint) -> dict[str, Records]:
    """Returns teacher -> file -> {bytes, sha256}; {} of checkpoints older than stored teachers."""
    records: dict[str, Records] = found.document("trainer").get("teacher_files", {})
    return records


def store_teachers(run: Run, read: Mapping[str, Path], found: Checkpoint | None) -> None:
    """Writes the fixed teachers into the run directory and sets `run.teacher_files`; all ranks call it.

    Those that were `read` from there stay as they are. Raises ClipkitError when the disk refuses.
    """
    teachers = run.bare.teachers
    if teachers is None:
        return
    known = {} if found is None else recorded(found)
    folder = run.folder.resolve() / FOLDER

    def work() -> None:
        # Left by a process that was killed while it wrote; the run lock is ours. What stays costs space only.
        for leftover in (path for ending in ("tmp", "old") for path in folder.glob(f".*.{ending}")):
            shutil.rmtree(leftover, ignore_errors=True)
        for name, towers in teachers.fixed_towers.items():
            own = read.get(name) == folder / name
            run.teacher_files[name] = known[name] if own else _store(towers, folder / name)

    together(lambda: work() if run.world.is_main else None)


def _store(towers: Towers, folder: Path) -> Records:
    try:
        # The name of the copy inside: a path would change with the directory, and its hash with it.
        save_open_clip(towers, folder, hf_name=TEXT_FOLDER)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): record_of(path) for path in files}
    except (OSError, SafetensorError) as error:
        raise ClipkitError(
            f"the teacher {folder.name} cannot be stored in {folder.parent}: {error}",
            "free disk space or repair what the message names, then start the same command again",
        ) from error
