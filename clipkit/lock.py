"""A lock file that names its holder and that no dead process can hold. Loads no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Record locks belong to a process: closing any descriptor of the file drops them, so the same process must
# not open a lock file that it holds.
_held: set[tuple[int, Path]] = set()


class HeldError(Exception):
    """A living process has the lock; `holder` says which."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock file `path` while the block runs, and removes it then.

    The lock of a dead process (pid gone, or given to another process since) is taken over. Raises HeldError
    when a living one has it, OSError when the file cannot be written.
    """
    path = path.resolve()
    entry = (os.getpid(), path)
    if entry in _held:
        raise HeldError(_described({"pid": os.getpid(), "host": socket.gethostname()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path)
    _held.add(entry)
    try:
        yield
    finally:
        # A forked copy of the holder must not give away what it does not hold.
        if os.getpid() == entry[0]:
            _held.discard(entry)
            path.unlink(missing_ok=True)
            os.close(descriptor)


def process_start(pid: int) -> str | None:
    """Returns a text that no later process under the same pid has, None when the process is gone."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        except OSError:
            return None
        # proc(5): the name in parentheses may hold anything; then state is field 3 and starttime field 22.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
    found = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return found or None


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _read_holder(descriptor: int) -> dict[str, Any]:
    """Returns who wrote the lock; {} for an empty or torn file, which only a process that died leaves."""
    with contextlib.suppress(ValueError):
        holder = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(holder, dict) and isinstance(holder.get("pid"), int):
            return holder
    return {}


def _record_lock(descriptor: int) -> bool | None:
    """Returns True when the kernel gave the lock, False when a process has it, None without support."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _acquire(path: Path) -> int:
    """Returns the open descriptor of the lock file, ours now; raises HeldError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked = _record_lock(descriptor)
            holder = _read_holder(descriptor)
            if locked is False or (holder and _lives(holder, assumed=locked is None)):
                raise HeldError(_described(holder))
            # The file may have been removed by its holder between our open and our lock.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    me = {
                        "host": socket.gethostname(),
                        "pid": os.getpid(),
                        "start": process_start(os.getpid()),
                    }
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, (json.dumps(me) + "\n").encode(), 0)
                    os.fsync(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lives(holder: dict[str, Any], *, assumed: bool) -> bool:
    """Whether the recorded process runs; `assumed` of another host, where only the kernel's lock can tell."""
    if holder.get("host") != socket.gethostname():
        return assumed
    return process_start(int(holder["pid"])) == holder.get("start")
