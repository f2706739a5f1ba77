"""Worker processes: each builds a fixed range of a rank's rows, step after step."""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipkit.data.options import LoaderOptions
from clipkit.data.ranges import RowRanges
from clipkit.data.rows import SubBatch
from clipkit.types import ClipkitError


class RowReader(Protocol):
    """Builds rows of global batches; picklable, one copy per worker."""

    def sub_batch(self, step: int, first: int, end: int) -> SubBatch | None:
        """Returns rows first..end of global batch `step`, None behind the last one."""


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: raised there, torch would turn it into a RuntimeError."""

    error: ClipkitError


class _Steps(IterableDataset[Any]):
    """The sub-batches of one worker for steps start..stop."""

    def __init__(self, reader: RowReader, ranges: list[tuple[int, int]], start: int, stop: int) -> None:
        self.reader, self.ranges, self.start, self.stop = reader, ranges, start, stop

    def __iter__(self) -> Iterator[SubBatch | _Failure | None]:
        info = get_worker_info()
        first, end = self.ranges[info.id if info else 0]
        try:
            for step in range(self.start, self.stop):
                built = self.reader.sub_batch(step, first, end)
                yield built
                if built is None:
                    return
        except ClipkitError as error:
            yield _Failure(error)


def _unchanged(item: Any) -> Any:
    return item


def _prepare_worker(_: int) -> None:
    """Workers outlive the first Ctrl-C or SIGTERM, so that the main process can finish its step and save.

    They leave when told to, at a second SIGTERM, or when the main process is gone, however it went.
    """
    seen: list[int] = []

    def on_terminate(number: int, _: Any) -> None:
        if seen:
            os._exit(0)
        seen.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Torch's own watch compares process ids every 5 s and, under forkserver, watches the wrong process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def built_parts(
    reader: RowReader, row_ranges: RowRanges, options: LoaderOptions, start_step: int, stop_step: int
) -> Generator[list[SubBatch | None]]:
    """Yields what each worker of this rank builds of steps start..stop-1, None behind the last one there is.

    Raises ClipkitError, also of a worker that was lost.
    """
    ranges = row_ranges.of_workers()
    if not options.workers:
        steps: Any = iter(_Steps(reader, ranges, start_step, stop_step))
    else:
        steps = _workers(_Steps(reader, ranges, start_step, stop_step), options)
    try:
        for _ in range(start_step, stop_step):
            yield [_next(steps, options.timeout) for _ in ranges]
    finally:
        # torch ends its workers in __del__, which fails when the iterator hangs in a traceback: the
        # garbage collector finalises the queues first, and the workers never hear of the end.
        end_workers = getattr(steps, "_shutdown_workers", None)
        if end_workers is not None:
            end_workers()


def _workers(steps: _Steps, options: LoaderOptions) -> Iterator[SubBatch | _Failure | None]:
    context = multiprocessing.get_context(options.start_method)
    if context.get_start_method() == "forkserver":
        # Imported once in the server instead of once per worker; no effect on a server that runs already.
        context.set_forkserver_preload(["__main__", "clipkit.data.window"])
    with warnings.catch_warnings():
        # torch counts processors and warns; the number of workers was chosen by the user.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        loader: DataLoader[Any] = DataLoader(
            steps,
            batch_size=None,
            num_workers=len(steps.ranges),
            collate_fn=_unchanged,
            worker_init_fn=_prepare_worker,
            prefetch_factor=options.prefetch,
            timeout=options.timeout,
            multiprocessing_context=context,
            # Without a generator of its own, iter() draws from the default one: the model's.
            generator=torch.Generator(),
        )
        return iter(loader)


def _next(steps: Iterator[SubBatch | _Failure | None], timeout: float) -> SubBatch | None:
    try:
        part = next(steps)
    except RuntimeError as error:
        # torch's own message about a lost worker; errors raised inside one begin with "Caught".
        if str(error).startswith("DataLoader worker"):
            raise ClipkitError(
                str(error).splitlines()[0],
                "a worker was lost, most often for memory: lower data.workers or data.window_bytes",
            ) from None
        if str(error).startswith("DataLoader timed out"):
            raise ClipkitError(
                f"the loader's workers have built nothing for {timeout:.0f} s",
                "look for a disk or a server that hangs, or raise run.timeout; the same command goes on",
            ) from None
        raise
    if isinstance(part, _Failure):
        raise part.error
    return part
