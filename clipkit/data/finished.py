"""What of a job is done already: a small record per finished output, valid for one description of the job.

An output is renamed into place before its record is written, so a record never speaks of less than the whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clipkit.data.tar_index import replacing
from clipkit.types import ClipkitError

FOLDER = ".clipkit-job"
BEGUN = "begun"


class Finished:
    """Records of the finished outputs of a job in `folder`/.clipkit-job.

    job: everything that the bytes of the outputs depend on, JSON-able. Records of another description are
    removed when the first record of this one is written.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        text = json.dumps(job, sort_keys=True, ensure_ascii=False)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        self._all = folder / FOLDER
        self._own = self._all / self.digest

    def get(self, name: str) -> dict[str, Any] | None:
        """Returns the record of output `name`, None when it is not finished or its record is damaged."""
        try:
            record = json.loads((self._own / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # made again: the same bytes
        return record if isinstance(record, dict) else None

    @property
    def begun(self) -> bool:
        """Whether this job, by its description, was begun here and is not finished."""
        return self._own.is_dir()

    def place(self, name: str) -> Path:
        """Returns where a file that lasts as long as the records may lie; records of other jobs go."""
        if not self._own.is_dir():
            # Machines that share a job may come here at once: never the own folder, and what is gone is gone.
            for other in self._all.glob("*"):
                if other != self._own:
                    shutil.rmtree(other, ignore_errors=True)
            self._own.mkdir(parents=True, exist_ok=True)
        return self._own / name

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Writes the record of output `name`."""
        # Not under one temporary name: machines that share a job may write the same record.
        with replacing(self.place(f"{name}.json")) as out:
            out.write(json.dumps(record, ensure_ascii=False).encode())

    @property
    def empty(self) -> bool:
        """Whether nothing is kept of this job or of another one."""
        return not any(path.is_file() and path.name != BEGUN for path in self._all.rglob("*"))

    def clear(self) -> None:
        """Removes all records, once the job as a whole is finished."""
        shutil.rmtree(self._all, ignore_errors=True)


def is_whole(path: Path, size: int) -> bool:
    """Returns whether an output is still there in its recorded size: users remove and cut files, too."""
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


@contextmanager
def storing(folder: Path, *, continues: bool = True) -> Iterator[None]:
    """Turns a failure of the storage, such as a full disk, into one line of cause and one of cure.

    continues: whether what is finished in `folder` is kept for the next start.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # of the terminal
    except OSError as error:
        again = "start the same command again" + (": it continues" if continues else "")
        raise ClipkitError(
            f"{error.filename or folder}: {error.strerror or error}",
            f"make room or repair the storage, then {again}",
        ) from error
