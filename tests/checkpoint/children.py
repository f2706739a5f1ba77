"""Forked children that die, and the little run whose checkpoints the tests write."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit.checkpoint import CheckpointStore
from clipkit.dist import World

KILLED = 137
# The calls of which a save consists, as the interpreter reports them, plus fsync, which it does not report.
WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")


def in_child(work: Callable[[], Any]) -> int:
    """Runs `work` in a forked child; returns its wait status (0: it returned)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def on_call(number: int, act: Callable[[], Any]) -> Callable[[], None]:
    """Arranges that `act` runs before the `number`-th watched call of this process (for children only).

    Returns what ends the counting.
    """
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            act()

    def stop() -> None:
        nonlocal calls
        calls = number + 1

    def hook(event: str, arguments: Any) -> None:
        # Python opens files of its own; those of a save are named after steps, or `latest`.
        if event in WATCHED and (
            event != "open" or any(part in str(arguments[0]) for part in ("step-", "latest"))
        ):
            count()

    # A killed process loses nothing that it handed to the kernel: here fsync is a point in time, no more.
    os.fsync = lambda descriptor: count()
    sys.addaudithook(hook)
    return stop


def die_at_call(number: int) -> None:
    """Makes this process vanish before its `number`-th watched call, as kill -9 would."""
    on_call(number, lambda: os._exit(KILLED))


FIXED = {"model": {"trunk": torch.linspace(-1, 1, 24).view(4, 6)}}


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    """Returns weights and optimizer state that differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(8, 4, generator=generator), "log_scale": torch.tensor(float(step))},
        "optimizer": {"weight.exp_avg": torch.randn(8, 4, generator=generator)},
    }


def save(store: CheckpointStore, step: int, **changes: Any) -> Path:
    """Saves the tensors of `step` and those that never change, with whatever `changes` replaces."""
    arguments: dict[str, Any] = {
        "tensors": tensors_of(step),
        "fixed": {} if "tensors" in changes else FIXED,
        "rank_tensors": {"state": torch.tensor([step, store.world.rank])},
        "documents": {"trainer": {"step": step}, "data": {"batch": step}},
        "identity": {"seed": 7},
    }
    return store.save(step, **{**arguments, **changes})


def assert_complete(store: CheckpointStore, steps: tuple[int, ...]) -> int:
    """Asserts that the newest checkpoint is of one of `steps` and as it was saved; returns its step."""
    found = store.newest()
    assert found is not None
    assert found.step in steps
    for stem, wanted in tensors_of(found.step).items():
        read, wanted = found.tensors(stem), {**wanted, **FIXED.get(stem, {})}
        assert read.keys() == wanted.keys()
        assert all(torch.equal(read[name], wanted[name]) for name in wanted)
    assert found.document("trainer") == {"step": found.step}
    own = found.rank_tensors(0)
    assert own is not None
    assert own["state"].tolist() == [found.step, 0]
    return found.step


def single(folder: Path, keep: int = 2) -> CheckpointStore:
    """Returns the store of a run of one process."""
    return CheckpointStore(folder, World(), keep)


def flip_byte(path: Path) -> None:
    """Changes one bit of a file, not its size."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
