"""The saved position of a stream: what must be equal for it to be continued, and the sizes that it fixes."""

from __future__ import annotations

from typing import Any

from clipkit import dist
from clipkit.data.options import LoaderOptions
from clipkit.data.order import default_chunks, default_lanes
from clipkit.data.tar_index import Index
from clipkit.types import ConfigError

_STATE_KEYS = (
    "order_version", "exact", "seed", "batch_size", "lanes", "chunk_size", "window_chunks", "num_samples",
    "index_sha", "first_lanes", "first_window", "shards_sha", "mixture_version", "held_out", "contents",
)  # fmt: skip


class PositionChangedError(ConfigError):
    """A saved position that these shards and settings cannot continue exactly."""


def check_position(saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises PositionChangedError naming the keys in which a saved position differs from the one found."""
    theirs, ours = _identity(saved), _identity(found)
    differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if differing:
        changes = ", ".join(f"{key}: {theirs.get(key)} -> {ours.get(key)}" for key in differing)
        raise PositionChangedError(
            f"the saved position in the data cannot be continued, it differs in {changes}",
            "bring back the same shards and settings, or say how to go on with "
            "run.resume_data=restart_epoch or continue_reseeded, or start a new run directory",
        )


def _identity(position: dict[str, Any]) -> dict[str, Any]:
    """What a position must agree in with another one, those of a mixture source by source."""
    sources = {
        f"sources.{number}.{key}": value
        for number, source in enumerate(position.get("sources", ()))
        for key, value in source.items()
    }
    return {key: position.get(key) for key in _STATE_KEYS} | sources


def order_sizes(
    index: Index,
    num_samples: int,
    stride: int,
    options: LoaderOptions,
    world: dist.World,
    saved: dict[str, Any] | None,
) -> tuple[int, int, int]:
    """Returns lanes, chunk size and chunks of a window: those of the run if it is continued.

    index: where the size of a sample comes from; num_samples and stride: of the whole set.
    """
    window_samples = options.window_bytes / max(1.0, index.sample_bytes)
    lanes = saved_lanes(options, saved)
    if lanes is not None and saved is not None and saved.get("chunk_size"):
        return lanes, int(saved["chunk_size"]), int(saved["window_chunks"])
    lanes = options.lanes or default_lanes(options.batch_size, world.size, window_samples, options.uneven)
    return lanes, *default_chunks(num_samples, lanes, -(-lanes // world.size), window_samples, stride)


def saved_lanes(options: LoaderOptions, saved: dict[str, Any] | None) -> int | None:
    """Returns the lanes of a saved position, None where there are none.

    Raises ConfigError where the options ask for others, or count other batches.
    """
    if saved is None:
        return None
    if saved.get("batch_size") != options.batch_size:
        raise PositionChangedError(
            f"the saved position counts batches of {saved.get('batch_size')}, not of {options.batch_size}",
            f"set data.batch_size={saved.get('batch_size')}, or say how to go on with "
            "run.resume_data=restart_epoch or continue_reseeded",
        )
    if not saved.get("lanes"):
        return None
    lanes = int(saved["lanes"])
    if options.lanes not in (None, lanes):
        raise ConfigError(
            f"data.lanes={options.lanes}, but this run was started with {lanes}",
            f"set data.lanes={lanes} or leave it out",
        )
    return lanes
