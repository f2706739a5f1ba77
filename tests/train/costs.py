"""What a look at the embeddings costs beside a step, in seconds of process time."""

from __future__ import annotations

import math
import statistics
import time

import torch

from clipkit.dist import World
from clipkit.train.setup import make_accelerator, wrap
from clipkit.train.step import step
from clipkit.train.watch import Watch
from tests.train.test_one_big_batch import batch_of, make


class Silent:
    """A log that keeps nothing."""

    def note(self, text: str) -> None:
        """Ignores a line."""

    def append(self, record: object) -> None:
        """Ignores a record."""


def look_and_step_seconds(repeats: int = 5) -> tuple[float, float]:
    """Returns medians: what inspecting and looking add to a step, and a plain step."""
    bare, views = make("native", "clip")
    accelerator = make_accelerator("fp32")
    learner, optimizer = wrap(accelerator, bare, torch.optim.SGD(bare.parameters(), lr=0.0))
    watch = Watch(bare, 12, Silent())  # type: ignore[arg-type]
    batch = batch_of(bare, views, 0, World())
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for inspect in (False, True):
            began = time.process_time()
            result = step(learner, accelerator, optimizer, batch, inspect=inspect)
            if inspect:
                watch.look(1, batch, result.seen, result.terms, math.inf)
            seconds[inspect].append(time.process_time() - began)
    plain = statistics.median(seconds[False])
    return statistics.median(seconds[True]) - plain, plain
