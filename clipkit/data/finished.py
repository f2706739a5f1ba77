"""What of a job is done already, and what its command does when it is given again: one rule for every job
that writes an output.

- The job has ended, its inputs are the same: nothing is to do, nothing is written, exit 0. Outputs that are
  missing since then are made again; a file of another size in the place of one is named and refused.
- The job was killed: it continues. Of its outputs those that lie there in their recorded size are kept.
- Another command, or an input that changed since: refused (exit 2), naming the options with both values and
  the inputs that differ. `--overwrite`, where a job has it, or another output is the cure.

Shards and files are the same while size and time of change are (remote ones: their stamp); tables of
make-shards by what their rows say, images by their names. An output is renamed into place before its record
is written, so a record never speaks of less than the whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.data.tar_index import replacing
from clipkit.types import ClipkitError, ConfigError

FOLDER = ".clipkit-job"
OVERWRITE = "choose another output, or pass --overwrite"
ELSEWHERE = "choose another folder"

_DONE, _DESCRIPTION = "done.json", "description.json"
_NAMED = 5  # differences that a message names
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Ended:
    """A job that has ended and whose outputs are all there; result: what it left for the next call."""

    shards: int
    samples: int
    result: Any = None

    def line(self, out: Path | None) -> str:
        """Returns what a command says that is given once more."""
        shards = f"{self.shards:,} shards, " if self.shards else ""
        return (
            f"nothing to do: {out} was made by this very command from the same inputs "
            f"({shards}{self.samples:,} samples)"
        )


class Finished:
    """Records of the finished outputs of a job in `folder`/.clipkit-job, and at the end one of all.

    job: everything that the bytes of the outputs depend on, JSON-able: `job`, its name; `options` by their
    names on the command line; `inputs`, a list of [name, facts...]. Records of another job are removed when
    this one begins.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        text = json.dumps(job, sort_keys=True, ensure_ascii=False)
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        self._job = json.loads(text)
        self._folder = folder
        self._all = folder / FOLDER
        self._own = self._all / self.digest
        self._made_folder = False

    def begin(
        self, held: Iterable[Path], *, overwrite: bool = False, take: bool = True, cure: str = OVERWRITE
    ) -> Ended | None:
        """Takes the output for this job, to begin or to continue; returns what is there once it has ended.

        held: outputs of any job that lie there now. overwrite: outputs of other jobs are replaced, and those
        of this one made again once it has ended. take: False writes nothing. Raises ConfigError, with `cure`,
        where the rule above refuses, and for a folder that cannot be written.
        """
        done = self._done()
        if done is not None and not overwrite:
            outputs = {os.path.abspath(self._folder / name): size for name, size in done["outputs"].items()}
            lost = {path for path, size in outputs.items() if not is_whole(Path(path), size)}
            if not lost:
                self._remove_left()
                shards = sum(path.endswith(".tar") for path in outputs)
                return Ended(shards, done["samples"], done["result"])
            others = {*map(os.path.abspath, held)} - outputs.keys()
            strange = sorted(others) + sorted(filter(os.path.lexists, lost))
            if strange:
                raise ConfigError(f"{strange[0]} is not what this command wrote there", cure)
        elif not overwrite and not self.begun:
            self._refuse_other(held, cure)
        if take:
            self._made_folder = not self._folder.exists()
            with beginning(self._folder):
                self._remove_left()
                self.place("")
                # After that: killed in between, the outputs are still known to somebody.
                (self._all / _DONE).unlink(missing_ok=True)
        return None

    def end(self, outputs: Iterable[Path], samples: int, result: Any = None) -> None:
        """Records that the job has ended with these outputs, and removes its other records."""
        sizes = {os.path.relpath(path, self._folder): path.stat().st_size for path in outputs}
        record = {"job": self._job, "outputs": sizes, "samples": samples, "result": result}
        with replacing(self._all / _DONE) as out:
            out.write(json.dumps(record, sort_keys=True).encode())
        shutil.rmtree(self._own, ignore_errors=True)

    def get(self, name: str) -> dict[str, Any] | None:
        """Returns the record of output `name`, None when it is not finished or its record is damaged."""
        return _read(self._own / f"{name}.json")  # else made again: the same bytes

    @property
    def begun(self) -> bool:
        """Whether this job, by its description, was begun here and is not finished."""
        return self._own.is_dir()

    def place(self, name: str) -> Path:
        """Returns where a file that lasts as long as the records may lie; records of other jobs go."""
        if not self._own.is_dir():
            # Machines that share a job may come here at once: never the own folder, and what is gone is gone.
            for other in self._all.glob("*/"):
                if other != self._own:
                    shutil.rmtree(other, ignore_errors=True)
            self._own.mkdir(parents=True, exist_ok=True)
            with replacing(self._own / _DESCRIPTION) as out:
                out.write(json.dumps(self._job).encode())
        return self._own / name

    def put(self, name: str, record: Mapping[str, Any]) -> None:
        """Writes the record of output `name`."""
        # Not under one temporary name: machines that share a job may write the same record.
        with replacing(self.place(f"{name}.json")) as out:
            out.write(json.dumps(record, ensure_ascii=False).encode())

    @property
    def empty(self) -> bool:
        """Whether nothing is kept of this job or of another one."""
        return not any(path.is_file() and path.name != _DESCRIPTION for path in self._all.rglob("*"))

    def clear(self) -> None:
        """Removes all records, and the folder if the job made it and nothing else lies there."""
        shutil.rmtree(self._all, ignore_errors=True)
        if self._made_folder:
            with suppress(OSError):  # what else lies there keeps it
                self._folder.rmdir()

    def _remove_left(self) -> None:
        """Removes the records that a kill left between the last two steps of a job that has ended."""
        # Asked now: while its outputs were looked at, a machine that shares the job may have begun it anew.
        if self._done() is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    def _done(self) -> dict[str, Any] | None:
        done = _read(self._all / _DONE)
        return done if done is not None and done.get("job") == self._job else None

    def _refuse_other(self, held: Iterable[Path], cure: str) -> None:
        first = next(iter(held), None)
        if first is None:
            return
        cause = (
            f"{first.parent} already holds shards" if first.suffix == ".tar" else f"{first} exists already"
        )
        done = _read(self._all / _DONE) or {}
        begun = map(_read, sorted(self._all.glob(f"*/{_DESCRIPTION}")))
        for other in (done.get("job"), *begun):
            if isinstance(other, dict):
                cause += f", made otherwise: {differences(other, self._job)}"
                break
        raise ConfigError(cause, cure)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns in words what differs between two descriptions of jobs: options, then inputs."""
    if before.get("job") != now.get("job"):
        return f"by {before.get('job')}, and not by {now.get('job')}"
    old, new = before.get("options", {}), now.get("options", {})
    found = [
        f"--{name} {_shown(old.get(name))} -> {_shown(new.get(name))}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    were = {name: facts for name, *facts in before.get("inputs", [])}
    are = {name: facts for name, *facts in now.get("inputs", [])}
    found += [f"{name} changed" for name, facts in are.items() if name in were and were[name] != facts]
    found += [f"{name} was not read then" for name in are if name not in were]
    found += [f"{name} was read then" for name in were if name not in are]
    more = f"; and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + more or "the inputs in another order"


def _shown(value: Any) -> str:
    text = "unset" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def is_whole(path: Path, size: int) -> bool:
    """Returns whether an output is still there in its recorded size: users remove and cut files, too."""
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


@contextmanager
def beginning(folder: Path) -> Iterator[None]:
    """Turns a failure to write the first files of a job into one line of cause and one of cure."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error})",
            "choose a folder that you may write to",
        ) from error


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
        if isinstance(error, FileNotFoundError):
            # Of two commands that make the same output, the first to end removes the records of both.
            raise ClipkitError(
                f"{error.filename or folder} vanished while it was needed: another command "
                "writes there, too, or somebody removed it",
                f"let one command at a time write there, then {again}",
            ) from error
        raise ClipkitError(
            f"{error.filename or folder}: {error.strerror or error}",
            f"make room or repair the storage, then {again}",
        ) from error
