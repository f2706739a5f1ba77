"""What the `data` section of a config says, as the loader takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CaptionField:
    """Where captions stand: a member ("txt") or a path into a JSON member ("json.caption").

    weight  how often it is drawn, relative to the other fields
    lines   every line of the text is a caption of its own
    """

    field: str = "txt"
    weight: float = 1.0
    lines: bool = False


@dataclass(frozen=True)
class Source:
    """A set of shards and the fields its captions are read from.

    weight   of each of its samples among those of other sources: their parts of a batch are as the weights
    missing  what becomes of a sample that lacks the field drawn for it: another field is drawn ("fallback"),
             or the sample is unusable ("reject")
    name     under which its samples are counted; None: from the path of the shards
    image_root  of raw data, which stands in the place of shards: where a table's images lie
    image_key   of raw data: a table's column of image paths
    content     a hash of the shards' bytes where they are known to stand for raw data: a saved position
                continues only on the same
    """

    shards: str | tuple[str, ...]
    captions: tuple[CaptionField, ...] = (CaptionField(),)
    weight: float = 1.0
    missing: Literal["fallback", "reject"] = "fallback"
    name: str | None = None
    image_root: str | None = None
    image_key: str | None = None
    content: str = ""


@dataclass(frozen=True)
class Storage:
    """Where s3:, gs: and hf: addresses lead; None: as their clients find it in the environment."""

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None


DEFAULT_STORAGE = Storage()


@dataclass(frozen=True)
class LoaderOptions:
    """Options of the training stream.

    source               one, or several that make a mixture
    batch_size           samples over all ranks
    workers              worker processes per rank; 0 builds batches in the main process
    lanes                None: chosen from batch size and ranks
    uneven               ranks that do not divide the lanes take one lane more or less
    window_bytes         raw bytes of the shuffle windows, per rank
    max_pixels           of an image, compared with its header before it is decoded
    max_reject_fraction  tolerated share of unusable samples
    max_consecutive      unusable samples in a row that stop the run
    max_lost_chunks      chunks that may be out of reach before the run stops
    timeout              seconds without a sub-batch after which a worker counts as lost; 0: for ever
    start_method         "fork", "spawn", "forkserver" or None for the platform's default
    prefetch             sub-batches built ahead per worker
    on_no_range          "refuse" a server without byte ranges, or "stream" it without an exact order
    index_dir            where the index is kept; None: beside the shards, or in the user's cache folder
    index                "eager": before the first step; "lazy": while the first epoch is read
    holdout              pairs that are never trained on: an int is their number, a float their share
    """

    source: Source | tuple[Source, ...]
    batch_size: int
    seed: int
    workers: int = 0
    lanes: int | None = None
    uneven: bool = False
    window_bytes: int = 1 << 30
    max_pixels: int = 64_000_000
    max_reject_fraction: float = 0.01
    max_consecutive: int = 100
    max_lost_chunks: int = 0
    allow_pipe: bool = False
    timeout: float = 0.0
    start_method: str | None = None
    prefetch: int = 2
    on_no_range: str = "refuse"
    index_dir: str | None = None
    index: str = "eager"
    storage: Storage = DEFAULT_STORAGE
    holdout: int | float | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources, also where there is one."""
        return (self.source,) if isinstance(self.source, Source) else self.source
