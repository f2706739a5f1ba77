"""The pairs that are held out, read for evaluation: captions at once, pictures when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from clipkit import dist
from clipkit.data.captions import field_captions
from clipkit.data.kept import Kept
from clipkit.data.options import CaptionField, LoaderOptions, Storage
from clipkit.data.remote import ShardBytes
from clipkit.data.sample import (
    Absent,
    RawSample,
    Unusable,
    decode_image,
    image_bytes,
)
from clipkit.data.tar_index import Index
from clipkit.data.waiting import together
from clipkit.data.window import read_samples


class HeldOut(NamedTuple):
    """What is held out of one source, and where its captions stand."""

    kept: Kept
    fields: tuple[CaptionField, ...]


class Refused(NamedTuple):
    """A pair that is held out and cannot be used, and why."""

    key: str
    shard: str
    reason: str
    detail: str


@dataclass(frozen=True)
class HeldPairs:
    """The usable pairs that are held out of one source, by ascending id.

    captions  every caption of each pair, at least one
    refused   the pairs that cannot be used: they are neither trained on nor evaluated
    """

    index: Index
    storage: Storage
    max_pixels: int
    ids: tuple[int, ...]
    captions: tuple[tuple[str, ...], ...]
    refused: tuple[Refused, ...]


def read_held(held: HeldOut, options: LoaderOptions) -> HeldPairs:
    """Returns the pairs that are held out; called by all ranks, which share the reading.

    Every picture is decoded once, so that a bad one is known now and costs no evaluation later. Raises
    DataError when shards are out of reach.
    """
    index, world = held.kept.index, dist.World.current()
    ids = held.kept.held.tolist()
    threads = max(1, min(options.workers, len(ids)))
    cuts = [len(ids) * part // (world.size * threads) for part in range(world.size * threads + 1)]

    def read(part: int) -> list[tuple[str, ...] | Refused]:
        source = ShardBytes(index, options.storage)
        return [
            _checked(index, source, sample_id, held.fields, options.max_pixels)
            for sample_id in ids[cuts[part] : cuts[part + 1]]
        ]

    def read_all() -> list[tuple[str, ...] | Refused]:
        # Pillow decodes without holding Python's lock: threads are enough, and safe to start here.
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(read, range(world.rank * threads, (world.rank + 1) * threads))
            return [found for part in parts for found in part]

    shares = dist.gather_objects(together(read_all))
    found = list(zip(ids, (entry for share in shares for entry in share), strict=True))
    good = [(sample_id, texts) for sample_id, texts in found if not isinstance(texts, Refused)]
    return HeldPairs(
        index,
        options.storage,
        options.max_pixels,
        tuple(sample_id for sample_id, _ in good),
        tuple(texts for _, texts in good),
        tuple(entry for _, entry in found if isinstance(entry, Refused)),
    )


def _checked(
    index: Index, source: ShardBytes, sample_id: int, fields: Sequence[CaptionField], max_pixels: int
) -> tuple[str, ...] | Refused:
    sample = read_samples(index, source, *index.locate(sample_id), 1)[sample_id]
    try:
        texts = _distinct(sample, fields)
        decode_image(image_bytes(sample), max_pixels)
    except Unusable as problem:
        shard = index.shards[index.locate(sample_id)[0]]
        return Refused(sample.key, shard, problem.reason, problem.detail)
    return texts


def _distinct(sample: RawSample, fields: Sequence[CaptionField]) -> tuple[str, ...]:
    """Returns all distinct captions at these fields, in order: each one that training may draw.

    A field or an entry that is absent is passed over. Raises Unusable when there is no caption at all.
    """
    found: dict[str, None] = {}
    missing: Absent | None = None
    for field in fields:
        try:
            found |= dict.fromkeys(field_captions(sample, field))
        except Absent as absent:
            missing = missing or absent
    if not found:
        raise missing or Absent("missing caption", "no field is named")
    return tuple(found)
