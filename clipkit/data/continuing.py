"""Where a run that continues takes up its data: exactly where it stood, or as the user says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from clipkit.data.loader import TrainStream
from clipkit.data.options import LoaderOptions
from clipkit.data.order import hash_key
from clipkit.data.position import PositionChangedError

Opener = Callable[[LoaderOptions, dict[str, Any] | None], TrainStream]


def open_continued(
    opener: Opener, options: LoaderOptions, saved: dict[str, Any], when_changed: str
) -> TrainStream:
    """Returns the stream at the saved position; called by all ranks.

    opener        opens a stream from options and a saved position, which it checks
    when_changed  "exact": a position that cannot be continued exactly raises PositionChangedError.
                  "restart_epoch": the epoch in progress begins again, in the order of the new settings.
                  "continue_reseeded": so too, in an order of its own that depends on the step as well
    What was not continued stands in `changed` of the stream. After either, samples of
    the epoch in progress may come twice; from there on the run is exact again.
    """
    kept = options
    if saved.get("config_seed") == options.seed:
        kept = replace(options, seed=int(saved["seed"]))
    try:
        stream = opener(kept, saved)
    except PositionChangedError as problem:
        if when_changed == "exact":
            raise
        changed = problem.cause
    else:
        stream.renumber(saved["step"], saved["epoch"], saved["batch_in_epoch"], options.seed)
        return stream
    if when_changed == "continue_reseeded":
        kept = replace(options, seed=hash_key(options.seed, "continued", saved["step"]))
    else:
        kept = options
    stream = opener(kept, None)
    stream.renumber(saved["step"], saved["epoch"], 0, options.seed)
    stream.changed = changed
    return stream
