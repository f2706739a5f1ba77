"""Where the parts of a data job run: processes of this machine, or a Ray cluster. Loads no torch.

A part is a picklable function with its arguments, independent of all others. Results come in the order of the
parts, so what is made of them does not depend on the engine or the number of workers.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, TypeVar

from clipkit.types import ClipkitError, ConfigError

Result = TypeVar("Result")

# Parts handed out per worker before the oldest result is awaited: bounds memory by workers, not by parts.
_AHEAD = 2
_RAY_RESULTS = 100 << 20  # bytes; Ray refuses less than 75 MiB


def usable_processors() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Engine:
    """How many parts run at a time, and where. kind: processes or ray."""

    workers: int = 1
    kind: str = "processes"

    def map(
        self,
        function: Callable[..., Result],
        parts: Iterable[tuple[Any, ...]],
        on_result: Callable[[Result], None] | None = None,
    ) -> Iterator[Result]:
        """Yields function(*part) of every part, in order, after `on_result` has seen it.

        Raises what a part raises, and ClipkitError when a worker dies. Parts may be a generator: few are
        taken before they are needed.
        """
        for result in self._results(function, parts):
            if on_result is not None:
                on_result(result)
            yield result

    def _results(self, function: Callable[..., Result], parts: Iterable[tuple[Any, ...]]) -> Iterator[Result]:
        if self.kind == "ray":
            return _on_ray(function, parts, self.workers)
        if self.workers == 1:
            return (function(*part) for part in parts)
        return _in_processes(function, parts, self.workers)


def _in_processes(
    function: Callable[..., Result], parts: Iterable[tuple[Any, ...]], workers: int
) -> Iterator[Result]:
    running: deque[Any] = deque()
    with ProcessPoolExecutor(workers, initializer=_begin_worker) as pool:
        try:
            for part in parts:
                running.append(pool.submit(function, *part))
                if len(running) >= _AHEAD * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise ClipkitError(
                "a worker process ended without a word (killed, or out of memory)",
                "start the same command again, with fewer --workers if memory is short",
            ) from error
        finally:
            for future in running:
                future.cancel()


def _begin_worker() -> None:
    # Control-C goes to the whole group: the parent alone reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    # A killed parent cannot end its workers, and they would wait for parts for ever.
    wait([sentinel])
    os._exit(1)


def _on_ray(
    function: Callable[..., Result], parts: Iterable[tuple[Any, ...]], workers: int
) -> Iterator[Result]:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("--engine ray needs the package ray", "install clipkit[ray]") from error
    if not ray.is_initialized():
        _begin_ray(ray, workers)
    # Not the function itself: Ray takes plain functions only, no partial ones.
    remote = ray.remote(_call)
    running: deque[Any] = deque()
    try:
        for part in parts:
            running.append(remote.remote(function, *part))
            if len(running) >= _AHEAD * workers:
                yield _ray_result(ray, running.popleft())
        while running:
            yield _ray_result(ray, running.popleft())
    finally:
        for reference in running:
            ray.cancel(reference)


def _begin_ray(ray: Any, workers: int) -> None:
    # Ray sends statistics about its use to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A cluster is found by RAY_ADDRESS; without one Ray starts on this machine, where it would take a third
    # of the memory for results, which are small here.
    local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "object_store_memory": _RAY_RESULTS}
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **local)


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)


def _ray_result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Ray wraps what a part raised; it leaves as it is.
        raise error.cause if isinstance(error.cause, Exception) else error from error
    except ray.exceptions.RayError as error:
        raise ClipkitError(
            f"a Ray worker failed ({type(error).__name__})", "look at the cluster, then start it again"
        ) from error
