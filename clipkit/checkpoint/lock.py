"""One process group per run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from clipkit.dist import World, gather_objects
from clipkit.lock import HeldError, held
from clipkit.types import ConfigError

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def run_lock(run_dir: Path | str, world: World | None = None) -> Iterator[Path]:
    """Holds the lock file of `run_dir` while the block runs; yields its path. All ranks enter together.

    Rank 0 takes it and every rank gets the verdict. The lock of a dead process (pid gone, or given to
    another process since) is taken over. Raises ConfigError naming host and pid of a living holder.
    """
    world = World.current() if world is None else world
    path = (Path(run_dir) / LOCK_FILE).resolve()
    failure = None
    with contextlib.ExitStack() as stack:
        if world.is_main:
            try:
                stack.enter_context(held(path))
            except HeldError as error:
                failure = ConfigError(
                    f"run directory {path.parent} is in use by {error.holder}",
                    f"wait for it or stop it, or set another run.dir (if it is surely gone, remove {path})",
                )
            except OSError as error:
                failure = ConfigError(
                    f"run directory {path.parent} cannot be written to ({error.strerror or error})",
                    "set run.dir to a folder that this user can write to",
                )
        if world.size > 1:
            failure = gather_objects(failure)[0]
        if failure is not None:
            raise failure
        yield path
