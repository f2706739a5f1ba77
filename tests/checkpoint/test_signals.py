"""Signals: one is a request, two interrupts leave at once, children and earlier handlers are respected."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from clipkit.checkpoint import StopSignals


def send(number: int, pid: int | None = None) -> None:
    os.kill(os.getpid() if pid is None else pid, number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_the_program_goes_on(number: signal.Signals) -> None:
    with StopSignals() as signals:
        assert signals.poll() == (None, False)
        send(number)
        assert signals.requested == number
        assert signals.poll() == (number, False)
        assert signals.poll() == (number, False), "a request to stop stays"


def test_the_first_request_to_stop_is_the_one_reported() -> None:
    with StopSignals() as signals:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert signals.requested == signal.SIGTERM


def test_usr1_asks_for_a_checkpoint_once_and_not_for_the_end() -> None:
    with StopSignals() as signals:
        send(signal.SIGUSR1)
        send(signal.SIGUSR1)
        assert (signals.requested, signals.save_requested) == (None, True)
        assert signals.poll() == (None, True)
        assert signals.poll() == (None, False)


def test_earlier_handlers_come_back() -> None:
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in watched]
    with pytest.raises(RuntimeError, match="inside"), StopSignals() as signals:
        raise RuntimeError(f"inside {signals.requested}")
    with StopSignals():
        assert not {signal.getsignal(number) for number in watched} & set(before)
    assert [signal.getsignal(number) for number in watched] == before


def test_outside_the_main_thread_nothing_is_watched() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside: list[Any] = []

    def work() -> None:
        with StopSignals() as signals:
            inside.extend([signal.getsignal(signal.SIGTERM), signals.requested])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before, None]


def test_forked_workers_survive_an_interrupt_and_obey_sigterm() -> None:
    with StopSignals() as signals:
        ready, is_ready = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(is_ready, b"1")
                for _ in range(600):
                    time.sleep(0.1)
            finally:
                os._exit(0)
        os.read(ready, 1)
        for _ in range(3):
            send(signal.SIGINT, pid)
            time.sleep(0.05)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "three interrupts do not end a worker"
        send(signal.SIGTERM, pid)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert signals.requested is None
        os.close(ready)
        os.close(is_ready)
