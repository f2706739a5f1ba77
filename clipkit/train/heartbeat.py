"""Which rank is missing: every rank signs a file, and who waits in vain reads those of the others.

A collective that fails or never ends says nothing about the rank that it waits for. The files do, on every
backend: RUN/heartbeat/rank-N names host, process, step and what it is doing, and its time of change says
that the process was running. One process alone needs none of this and writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from clipkit.dist import World
from clipkit.lock import process_start
from clipkit.log import redact
from clipkit.types import ClipkitError

FOLDER = "heartbeat"
DOINGS = ("starting", "waiting for data", "in a step", "saving a checkpoint", "evaluating", "indexing")
# These may take their time without a word; only a rank that gives no sign at all ends them.
PATIENT = DOINGS[3:]
GONE_AFTER_S = 5.0  # of waiting, until a process that is gone counts: it may just have left at the end
SILENT_AFTER_S = 3.0  # without a sign, and three intervals
# What torch's backends say in a plain RuntimeError when a collective fails.
_COLLECTIVE = re.compile(r"(?i)gloo|nccl|process ?group|connection (closed|reset)|timed out waiting")
CURE = (
    "look at what that rank wrote last (killed for memory, machine lost, paused?) and run the same command "
    "again: it continues after the last checkpoint; run.timeout is how long ranks wait for each other"
)


@dataclass(frozen=True)
class Sign:
    """The last sign of a rank. left: why it left; "" when it left because another one was missing."""

    rank: int
    host: str
    pid: int
    start: str | None
    step: int
    doing: str
    left: str | None = None
    age: float = 0.0  # seconds since it was written

    @property
    def name(self) -> str:
        """Returns how messages name the rank."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def gone(self) -> bool:
        """Returns whether the process, of this host, has ended without a word."""
        here = self.left is None and self.host == socket.gethostname()
        return here and process_start(self.pid) != self.start


def read_signs(folder: Path) -> list[Sign]:
    """Returns the signs in `folder`, in rank order; torn and foreign files are passed over."""
    found = []
    for path in folder.glob("rank-*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            # Both times from the file system: the clocks of two machines differ.
            found.append((Sign(**json.loads(path.read_text(encoding="utf-8"))), path.stat().st_mtime))
    newest = max((touched for _, touched in found), default=0.0)
    signs = (Sign(**{**asdict(sign), "age": newest - touched}) for sign, touched in found)
    return sorted(signs, key=lambda sign: sign.rank)


def missing(signs: Sequence[Sign], rank: int, silent_after: float) -> list[str]:
    """Returns sentences about the ranks that `rank` waits for, by the strongest evidence there is.

    A process that is gone or left by an error of its own; else one without a sign for `silent_after` seconds;
    else none.
    """
    others = [sign for sign in signs if sign.rank != rank]
    found = [f"{sign.name} is gone, last {sign.doing} after step {sign.step}" for sign in others if sign.gone]
    found += [f"{sign.name} left after step {sign.step}: {sign.left}" for sign in others if sign.left]
    return found or [
        f"{sign.name} has given no sign for {sign.age:.0f} s, last {sign.doing} after step {sign.step}"
        for sign in others
        if sign.left is None and sign.age > silent_after
    ]


def behind(signs: Sequence[Sign]) -> list[str]:
    """Returns sentences about the ranks that are not as far as others; none when all are equally far."""
    places = {sign.rank: (sign.step, DOINGS.index(sign.doing)) for sign in signs if sign.left is None}
    if len(set(places.values())) < 2:
        return []
    least = min(places.values())
    late = [sign for sign in signs if places.get(sign.rank) == least]
    return [f"{sign.name} is still {sign.doing} after step {sign.step}, others are further" for sign in late]


class Heartbeat:
    """Context manager around a training: signs for this rank, and ends it when another one is missing.

    timeout  seconds without progress after which a rank that waits leaves
    Inside, a failed collective becomes a ClipkitError that names the missing rank. A wait that does not even
    fail ends the process with code 1 and the same message: its main thread cannot be reached.
    """

    def __init__(self, run_dir: Path, world: World, timeout: float) -> None:
        self.folder = run_dir / FOLDER
        self.world, self.timeout = world, timeout
        self.interval = min(5.0, max(0.2, timeout / 60))
        self.step, self.doing = 0, DOINGS[0]
        self._left: str | None = None
        self._progress = time.monotonic()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._start: str | None = None
        self._known: dict[int, Sign] = {}

    def prepare(self) -> None:
        """Removes what earlier processes left; before a collective that precedes every `with`."""
        if self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def at(self, step: int, doing: str) -> None:
        """Notes that this rank has taken `step` steps and begins with `doing`, one of DOINGS."""
        self.step, self.doing, self._progress = step, doing, time.monotonic()

    def __enter__(self) -> Heartbeat:
        self._progress = time.monotonic()
        if self.world.size > 1:
            self._start = process_start(os.getpid())
            self._sign()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._end.set()
        self._thread.join()
        if error is None:
            with contextlib.suppress(OSError):
                self._path.unlink()
                self.folder.rmdir()
        elif isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error)):
            self._left = ""
            raise self._lost("a collective failed") from error
        else:
            self._left = " ".join(str(error).split())[:200] or type(error).__name__
            self._sign()

    @property
    def _path(self) -> Path:
        return self.folder / f"rank-{self.world.rank}"

    def _sign(self) -> None:
        me: dict[str, Any] = asdict(
            Sign(
                self.world.rank,
                socket.gethostname(),
                os.getpid(),
                self._start,
                self.step,
                self.doing,
                None if self._left is None else redact(self._left),
            )
        )
        temporary = self.folder / f".rank-{self.world.rank}"
        # A full disk is no reason to end a run; the others see a rank that gives no sign only when they wait.
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(me), encoding="utf-8")
            os.replace(temporary, self._path)

    def _watch(self) -> None:
        while not self._end.wait(self.interval):
            self._sign()
            waited = time.monotonic() - self._progress
            if waited > self.timeout:
                signs = read_signs(self.folder)
                if self.doing not in PATIENT or missing(signs, self.world.rank, self.timeout):
                    self._leave(f"no progress for {waited:.0f} s after step {self.step}")
            elif waited > GONE_AFTER_S and self._someone_is_gone():
                self._leave(f"step {self.step + 1} waits in vain")

    def _someone_is_gone(self) -> bool:
        # Which processes there are does not change: thousands of ranks need not read each other's files every
        # few seconds. One that has ended may have said so: then its file tells.
        if len(self._known) < self.world.size:
            self._known = {sign.rank: sign for sign in read_signs(self.folder)}
        if not any(sign.gone for sign in self._known.values()):
            return False
        return any(sign.gone for sign in read_signs(self.folder))

    def _lost(self, what: str) -> ClipkitError:
        # A machine that is lost cannot say so: wait until its silence does.
        silent = max(3 * self.interval, SILENT_AFTER_S)
        until = time.monotonic() + silent + self.interval
        while True:
            self._sign()
            signs = read_signs(self.folder)
            found = missing(signs, self.world.rank, silent)
            if found or time.monotonic() > until:
                break
            time.sleep(self.interval / 2)
        found = found or behind(signs) or [f"none of {self.world.size} ranks stands out"]
        return ClipkitError(f"{what}: {'; '.join(found)}", CURE)

    def _leave(self, what: str) -> None:
        self._left = ""
        error = self._lost(what)
        for child in multiprocessing.active_children():
            child.kill()
        message = redact(f"rank {self.world.rank}: error: {error.cause}\n  cure: {error.cure}\n")
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), message.encode("utf-8", "backslashreplace"))
        # Not an exception: the main thread stands in a collective and would never see it.
        os._exit(ClipkitError.exit_code)
