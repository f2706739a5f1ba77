"""Data jobs that die where a test says."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def in_a_child(action: Callable[[], None], below: Path, kill_at: int = 0) -> int:
    """Runs `action` in a forked process that SIGKILLs itself at its `kill_at`-th call about a file `below`.

    Returns the number of calls it made, -1 when it was killed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal calls
            # Only of the job's own files: what an import opens differs from run to run.
            if event in WATCHED and str(arguments[0]).startswith(str(below)):
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(hook)
            action()
            os.write(writer, str(calls).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader) as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return -1
    assert os.WEXITSTATUS(status) == 0
    return int(told)
