"""Signals as requests: remembered when they arrive, obeyed by all ranks at the end of a step."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from clipkit.dist import agree

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
INTERRUPTED = 130


class StopSignals:
    """Context manager that turns signals into flags; the earlier handlers come back at its end.

    SIGINT, SIGTERM   `requested` becomes the signal's number: save at the end of the step and leave.
    SIGHUP            the same, unless it is ignored (nohup): a closed terminal costs no step.
    SIGUSR1           `save_requested` becomes True: save at the end of the step and go on.
    SIGINT twice      the process leaves at once with code 130; the last complete checkpoint stands.

    Outside the main thread Python allows no handlers: then nothing is watched and nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self.save_requested = False
        self._interrupts = 0
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> StopSignals:
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in _WATCHED:
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: the earlier handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def poll(self) -> tuple[int | None, bool]:
        """Returns (signal that asks to stop or None, whether to save), agreed over all ranks.

        A collective: every rank calls it at the same step. A request to save is answered once.
        """
        save, self.save_requested = self.save_requested, False
        stop, saving = agree([float(self.requested or 0), float(save)], "max")
        return int(stop) or None, saving > 0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._receive_in_child(number)
        elif number == signal.SIGUSR1:
            self.save_requested = True
        else:
            self.requested = self.requested or number
            self._interrupts += number == signal.SIGINT
            if self._interrupts > 1:
                self._leave_now()

    def _receive_in_child(self, number: int) -> None:
        # Forked loader workers inherit the handler. Ctrl-C reaches them too and they must finish the step;
        # SIGTERM is how they are told to end, and must keep doing so.
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _leave_now(self) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        with contextlib.suppress(OSError, ValueError):
            os.write(
                sys.stderr.fileno(),
                b"\ninterrupted twice: leaving at once, without saving\n",
            )
        # Not sys.exit: a collective or a lock on the way out could hold the process.
        os._exit(INTERRUPTED)
