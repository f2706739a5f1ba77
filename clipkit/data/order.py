"""The order of samples as pure arithmetic: a function of (seed, epoch, position), of nothing else.

    chunks      runs of `chunk_size` consecutive samples of a shard, permuted per epoch and laid end to end
    lanes       the permuted samples cut into L equal parts
    windows     `window_chunks` consecutive chunks of a lane, whose samples are permuted among themselves
    batch b     samples [b * q, (b + 1) * q) of every lane, q = B / L, lane after lane

The N mod B samples that fill no batch are left out; they are the next N mod B ids every epoch, so those of
consecutive epochs differ and in the long run every sample is used equally often.
Permutations come from splitmix64 keys and a stable sort, so no library version can change them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipkit.types import ConfigError

ORDER_VERSION = 1
MAX_CHUNK = 64
MAX_WINDOW_CHUNKS = 8
# Up to this batch size every row is a lane of its own, so that every number of ranks that divides the batch
# sees the same global batches. Beyond it, lanes per rank stay few enough for their windows to fit in memory.
FREE_LANES = 512
LANES_PER_RANK = 16

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 8

Ids = NDArray[np.int64]
Keys = NDArray[np.uint64]


def hash_key(*parts: str | int) -> int:
    """Returns 64 bits that depend on every part and its type (blake2b), for use as a seed or key."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        state.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(state.digest(), "little")


def mix(key: int, counters: NDArray[Any]) -> Keys:
    """Returns splitmix64(key, counter) for every counter: 64 bits each, distinct for distinct counters.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), Stafford's mix 13.
    """
    z: Keys = np.asarray(counters).astype(np.uint64)
    return _mixed(key, z)


def _mixed(key: int, z: Keys) -> Keys:
    """`mix` in place."""
    shifted = np.empty_like(z)
    z *= _GOLDEN
    z += np.array(key, dtype=np.uint64)
    z ^= np.right_shift(z, np.uint64(30), out=shifted)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= np.right_shift(z, np.uint64(27), out=shifted)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= np.right_shift(z, np.uint64(31), out=shifted)
    return z


def permutation(count: int, key: int) -> Ids:
    """Returns a permutation of 0..count-1, (count,) int64, that depends on `key` only."""
    order: Ids = np.argsort(_mixed(key, np.arange(1, count + 1, dtype=np.uint64)), kind="stable")
    return order


def permuted(count: int, key: int, positions: Ids) -> Ids:
    """Returns where a permutation of 0..count-1 that depends on `key` only takes `positions`.

    Costs nothing per entry elsewhere, unlike `permutation`: for orders too long to hold. A Feistel network
    over the next even number of bits, applied again to what leaves the range (Black, Rogaway, "Ciphers with
    arbitrary finite domains", 2002, cycle walking).
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    mask = np.uint64((1 << half) - 1)
    rounds = [hash_key(key, number) for number in range(_FEISTEL_ROUNDS)]
    found = positions.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = found[outside] >> np.uint64(half), found[outside] & mask
        for each in rounds:
            left, right = right, left ^ (mix(each, right) & mask)
        found[outside] = left << np.uint64(half) | right
        outside = outside[found[outside] >= count]
    return found.astype(np.int64)


class Window(NamedTuple):
    """The samples of one window in their order. `start` is the position of the first within its lane."""

    start: int
    ids: Ids


@dataclass(frozen=True, eq=False)
class Order:
    """The numbers that define the order of all epochs. Raises ConfigError when they do not fit together.

    counts   (S,) samples per shard; N = counts.sum() >= batch_size; lanes divides batch_size
    """

    counts: Ids
    batch_size: int
    lanes: int
    chunk_size: int
    window_chunks: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.lanes < 1 or self.chunk_size < 1 or self.window_chunks < 1:
            raise ConfigError(
                "batch size, lanes, chunk and window sizes must be at least 1", "correct data.*"
            )
        if self.batch_size % self.lanes:
            raise ConfigError(
                f"data.lanes={self.lanes} does not divide data.batch_size={self.batch_size}",
                "choose a divisor of the batch size",
            )
        if self.num_samples < self.batch_size:
            raise ConfigError(
                f"data.batch_size={self.batch_size} is larger than the set of {self.num_samples} samples",
                f"set data.batch_size to at most {self.num_samples}",
            )

    @cached_property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch_size

    @cached_property
    def quota(self) -> int:
        """Samples of each lane in a global batch."""
        return self.batch_size // self.lanes

    @cached_property
    def lane_length(self) -> int:
        """Samples of a lane in an epoch."""
        return self.steps_per_epoch * self.quota

    @cached_property
    def num_chunks(self) -> int:
        return int((-(-self.counts // self.chunk_size)).sum())

    def chunk_starts(self) -> Ids:
        """Returns the id of the first sample of every chunk, (chunks,); not kept, it can be large."""
        per_shard = -(-self.counts // self.chunk_size)
        first_id = np.cumsum(self.counts) - self.counts
        first_chunk = np.cumsum(per_shard) - per_shard
        starts: Ids = np.arange(self.num_chunks)
        starts *= self.chunk_size
        starts += np.repeat(first_id - first_chunk * self.chunk_size, per_shard)
        return starts

    def left_out(self, epoch: int) -> tuple[tuple[int, int], ...]:
        """Returns the ranges of ids [begin, end) that this epoch leaves out, ascending; N mod B in all."""
        length = self.num_samples % self.batch_size
        if not length:
            return ()
        begin = (hash_key(self.seed, "left out") + epoch * length) % self.num_samples
        end = begin + length
        if end <= self.num_samples:
            return ((begin, end),)
        return ((0, end - self.num_samples), (begin, self.num_samples))

    def epoch(self, epoch: int, lanes: tuple[int, int] | None = None) -> EpochOrder:
        """Returns the order of one epoch; `lanes` = (first, end) keeps only what those need in memory."""
        return EpochOrder(self, epoch, lanes or (0, self.lanes))


class EpochOrder:
    """The order of one epoch, for a range of lanes. Look-ups cost a binary search and one window."""

    def __init__(self, order: Order, epoch: int, lanes: tuple[int, int]) -> None:
        self.order = order
        self.number = epoch
        self._holes = order.left_out(epoch)
        # Half a billion samples are 8 million chunks, 63 MB per array of them: before the other arrays exist,
        # in 32 bits where they fit, and without copies in between.
        chunks = permutation(order.num_chunks, hash_key(order.seed, epoch, "chunks"))
        if order.num_chunks < 1 << 31:
            chunks = chunks.astype(np.int32)
        starts = order.chunk_starts()
        sizes = np.empty(len(starts), dtype=np.int32)
        np.subtract(starts[1:], starts[:-1], out=sizes[:-1], casting="unsafe")
        sizes[-1] = order.num_samples - starts[-1]
        # Last hole first: one chunk can hold both, and the ends of chunks are taken from the reduced sizes.
        for begin, end in reversed(self._holes):
            first = int(np.searchsorted(starts, begin, side="right")) - 1
            last = int(np.searchsorted(starts, end))
            held = np.minimum(starts[first:last] + sizes[first:last], end)
            sizes[first:last] -= (held - np.maximum(starts[first:last], begin)).astype(np.int32)
        bounds = np.zeros(len(chunks) + 1, dtype=np.int64)
        bounds[1:] = sizes[chunks]
        del sizes
        np.cumsum(bounds, out=bounds)
        low = int(np.searchsorted(bounds, lanes[0] * order.lane_length, side="right")) - 1
        high = int(np.searchsorted(bounds, lanes[1] * order.lane_length, side="left"))
        self._starts = starts[chunks[low:high]]
        del starts
        self._bounds = bounds if (low, high) == (0, len(chunks)) else bounds[low : high + 1].copy()

    def window_at(self, lane: int, position: int) -> Window:
        """Returns the window of a lane that holds `position` (0..lane_length-1)."""
        order = self.order
        begin, end = lane * order.lane_length, (lane + 1) * order.lane_length
        first, chunk, last = (
            int(bound) - 1
            for bound in np.searchsorted(self._bounds, [begin, begin + position, end - 1], side="right")
        )
        size = order.window_chunks
        # Lanes start at different phases of their first window, so as not to read all at the same step.
        shift = lane % size if last - first >= 4 * size else 0
        number = (chunk - first + shift) // size
        low = max(first, first + number * size - shift)
        high = min(last + 1, first + (number + 1) * size - shift)
        start, stop = max(int(self._bounds[low]), begin), min(int(self._bounds[high]), end)
        ids = self._ids(low, high, start, stop)
        shuffled = ids[permutation(len(ids), hash_key(order.seed, self.number, "window", lane, number))]
        return Window(start - begin, shuffled)

    def _ids(self, low: int, high: int, start: int, stop: int) -> Ids:
        """Ids at positions start..stop of the permuted samples, which lie in chunks low..high."""
        begins, ends = self._bounds[low:high], self._bounds[low + 1 : high + 1]
        chunk = np.repeat(np.arange(high - low), np.minimum(ends, stop) - np.maximum(begins, start))
        first = self._starts[low:high]
        ids = np.arange(start, stop) + (first - begins)[chunk]
        for hole_begin, hole_end in self._holes:
            if not np.any((first < hole_end) & (first + self.order.chunk_size > hole_begin)):
                continue
            cut = np.maximum(first, hole_begin)[chunk]
            ids = np.where((ids >= cut) & (first[chunk] < hole_end), ids + hole_end - cut, ids)
        return ids

    def batch(self, step: int) -> Ids:
        """Returns the ids of global batch `step` of this epoch, (B,), without any reading."""
        quota = self.order.quota
        rows = []
        for lane in range(self.order.lanes):
            position = step * quota
            while position < (step + 1) * quota:
                window = self.window_at(lane, position)
                stop = min((step + 1) * quota, window.start + len(window.ids))
                rows.append(window.ids[position - window.start : stop - window.start])
                position = stop
        return np.concatenate(rows)


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def check_shares(world_size: int, units: int, name: str, uneven: bool) -> None:
    """Raises ConfigError when `world_size` ranks cannot share `units` of a batch, called `name`.

    Equally, or with `uneven` at least one each.
    """
    if world_size > units or (units % world_size and not uneven):
        allowed = divisors(units)
        shown = ", ".join(map(str, allowed[:12])) + (", ..." if len(allowed) > 12 else "")
        other = f"; data.uneven=true takes any up to {units}" if world_size <= units and not uneven else ""
        raise ConfigError(
            f"{name} is not a multiple of the {world_size} processes",
            f"start one of these numbers of processes: {shown}{other}",
        )


def default_lanes(
    batch_size: int, world_size: int, window_samples: float = float("inf"), uneven: bool = False
) -> int:
    """Returns L: the batch size itself up to 512, beyond it the largest fitting divisor of it.

    A divisor fits when it is a multiple of the number of ranks, at most max(512, 16 per rank), and the
    smallest windows of a rank's lanes (16 samples each) stay within `window_samples`. With `uneven` ranks
    that do not divide the batch it need only be as large as their number. Raises ConfigError for others.
    """
    check_shares(world_size, batch_size, f"data.batch_size={batch_size}", uneven)
    most = max(FREE_LANES, LANES_PER_RANK * world_size)
    step = 1 if batch_size % world_size else world_size
    lanes = [each for each in divisors(batch_size) if each >= world_size and each % step == 0]
    for each in reversed(lanes):
        per_rank = -(-each // world_size)
        if each <= most and (per_rank * 16 <= window_samples or per_rank == 1):
            return each
    return lanes[0]


def default_chunks(
    num_samples: int, lanes: int, lanes_per_rank: int, window_samples: float = float("inf"), stride: int = 1
) -> tuple[int, int]:
    """Returns (chunk_size, window_chunks): 64 and 8, less for small sets and to keep windows within memory.

    A lane gets at least four chunks where possible; chunk sizes are multiples of the index's stride.
    """
    chunk = min(MAX_CHUNK, -(-num_samples // (4 * lanes)))
    affordable = min(window_samples / max(1, lanes_per_rank), num_samples)
    chunk = int(max(1, min(chunk, affordable)))
    chunk = max(stride, chunk // stride * stride)
    lane_chunks = -(-(num_samples // lanes) // chunk) + 1
    return chunk, max(1, min(MAX_WINDOW_CHUNKS, lane_chunks, int(affordable // chunk)))
