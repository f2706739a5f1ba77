"""Work of one rank that the others wait for, however long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from clipkit import dist
from clipkit.types import ClipkitError

INTERVAL_S = 10.0  # far below the limit of a collective, which ends a run whose ranks wait in one for longer

Result = TypeVar("Result")


def while_others_wait(work: Callable[[], Result]) -> Result:
    """Returns `work()`; called by all ranks, and returns when the slowest of them is done.

    The ranks meet in short collectives meanwhile, so that no wait reaches their time limit. `work` must not
    use collectives itself.
    """
    if dist.World.current().size == 1:
        return work()
    done = threading.Event()
    failures: list[BaseException] = []
    # Threads choose their CUDA device on their own, and nccl moves objects through it.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def meet() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            while not all(dist.gather_objects(done.is_set())):
                done.wait(INTERVAL_S)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]
    return result


def together(work: Callable[[], Any]) -> Any:
    """Returns `work()` of this rank when all are done; raises the first error of any rank on all of them."""
    result: Any = None
    error: ClipkitError | None = None
    unforeseen: Exception | None = None

    def attempt() -> None:
        nonlocal result, error, unforeseen
        try:
            result = work()
        except ClipkitError as caught:
            error = caught
        except Exception as caught:  # raised below: the others must not wait for this rank
            unforeseen = caught
            summary = f"{type(caught).__name__}: {caught}"
            error = ClipkitError(summary, "run it again with --traceback for details")

    while_others_wait(attempt)
    failures = [failure for failure in dist.gather_objects(error) if failure is not None]
    if unforeseen is not None:
        raise unforeseen
    if failures:
        raise failures[0]
    return result
