"""Checkpoints that are written while training goes on, from a copy of its state in host memory."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from clipkit.checkpoint import CheckpointStore, CheckpointWriteError
from clipkit.data.rejects import RejectBudget
from clipkit.log import RunLog
from clipkit.train.setup import Run
from clipkit.train.state import TrainState, snapshot

MAX_FAILED_SAVES = 3
LAST_WAIT_S = 60.0


def host_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies in host memory that no later step can change."""
    return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}


class Saver:
    """Writes one checkpoint at a time; all ranks call its methods at the same steps.

    The store's collectives must run in a group of their own (`dist.background_group`).
    """

    def __init__(self, run: Run, store: CheckpointStore, log: RunLog) -> None:
        self.run, self.store, self.log = run, store, log
        self.failed = 0  # saves in a row
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Returns whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, state: TrainState, budget: RejectBudget) -> None:
        """Waits for the save before this one, copies the state of the run and begins to write it."""
        self.settle()
        arguments = snapshot(self.run, state, budget)
        if not self.run.config.run.background_save:
            self._write(arguments)
            return
        # What never changes is not copied: the store knows it by its address.
        arguments["tensors"] = {stem: host_copy(part) for stem, part in arguments["tensors"].items()}
        rows = {name: piece.rows for name, piece in arguments["rows"].items()}
        arguments["rows"] = {
            name: replace(arguments["rows"][name], rows=x) for name, x in host_copy(rows).items()
        }
        arguments["documents"] = copy.deepcopy(arguments["documents"])
        self._thread = threading.Thread(target=self._write, args=(arguments,), daemon=True)
        self._thread.start()

    def settle(self, must_succeed: bool = False) -> None:
        """Waits for the save that was begun and reports how it ended.

        Raises CheckpointWriteError when it failed and must succeed, or is the third that failed in a row.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if isinstance(error, CheckpointWriteError):
            self.failed += 1
            self.log.note(f"warning: {error.cause} ({error.cure})")
            if must_succeed or self.failed >= MAX_FAILED_SAVES:
                raise error
        elif error is not None:
            raise error
        for line in self.store.warnings:
            self.log.note(f"warning: {line}")
        self.store.warnings.clear()

    def leave(self) -> None:
        """Gives a save that is being written a minute to end; what is left of it then is removed later."""
        if self._thread is not None:
            self._thread.join(LAST_WAIT_S)

    def _write(self, arguments: dict[str, Any]) -> None:
        try:
            self.store.save(**arguments)
            self.failed = 0
        except BaseException as error:  # of another thread: `settle` raises it in this one
            self._error = error
