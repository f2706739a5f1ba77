"""A first epoch that needs no index: whole shards in a seeded order, walked strictly while they are read.

    lanes       the permuted shards dealt out like cards, shard i to lane i mod lanes; each lane reads its own
                from front to back
    windows     `window` consecutive samples of a lane, permuted among themselves
    batch b     samples [b * q, (b + 1) * q) of every lane, q = B / lanes, lane after lane
    end         the first batch that some lane cannot fill: what other lanes have left is left out

Nothing of this depends on counts, so nothing has to be known before the first batch. A position is found
again from the counts of the shards before it, which were read to the end by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.fingerprints import fingerprints
from clipkit.data.indexing import write_record
from clipkit.data.options import LoaderOptions
from clipkit.data.order import Ids, hash_key, permutation
from clipkit.data.remote import ShardFiles
from clipkit.data.rows import Passed, Recipe, Row, SubBatch
from clipkit.data.sample import RawSample
from clipkit.data.scan import REMOTE_BLOCK, Blocks, SampleSpan, ShardWalk
from clipkit.data.source import changed, is_remote
from clipkit.data.tar_index import Index
from clipkit.data.walked import taken
from clipkit.data.window import Found, Loaded, WindowRows

# Lanes start at different phases of their first window, so as not to read all at the same step.
PHASES = 8
# Dealing may leave out so large a part of the shards (1 / 8) in return for more lanes.
LEFT_OUT = 8
_POSITION_BITS = 32


def sample_id(shard: int, position: int) -> int:
    """Returns the id of a sample where the counts of the shards before it are not known."""
    return shard << _POSITION_BITS | position


def sample_ids(index: Index, ids: Ids) -> Ids:
    """Returns the ids of `sample_id` for those of an index."""
    shards = np.searchsorted(index.first_id, ids, side="right") - 1
    found: Ids = shards << _POSITION_BITS | (ids - index.first_id[shards])
    return found


@dataclass(frozen=True)
class ShardOrder:
    """The order of the first epoch: a function of the seed and the number of shards.

    window   samples that are shuffled among themselves
    """

    num_shards: int
    batch_size: int
    lanes: int
    window: int
    seed: int

    @property
    def quota(self) -> int:
        """Samples of each lane in a global batch."""
        return self.batch_size // self.lanes

    def shards(self, lane: int) -> list[int]:
        """Returns the numbers of the shards of a lane, in the order in which it reads them."""
        dealt = permutation(self.num_shards, hash_key(self.seed, 0, "shards"))
        return [int(number) for number in dealt[lane :: self.lanes]]

    def window_at(self, lane: int, position: int) -> tuple[int, int, int]:
        """Returns (number, start, end) of the window of a lane that holds `position`."""
        shift = lane % PHASES * self.window // PHASES
        number = (position + shift) // self.window
        return number, max(0, number * self.window - shift), (number + 1) * self.window - shift

    def shuffled(self, lane: int, number: int, count: int) -> Ids:
        """Returns the permutation of the `count` samples of a window."""
        return permutation(count, hash_key(self.seed, 0, "lane window", lane, number))


def first_lanes(num_shards: int, lanes: int, world_size: int) -> int | None:
    """Returns how many lanes can share whole shards; None when there are fewer shards than processes.

    The largest divisor of `lanes` that is a multiple of the number of processes and leaves out at most an
    eighth of the shards, or if there is none, the one that leaves out the fewest.
    """
    fitting = [
        count for count in range(world_size, min(lanes, num_shards) + 1, world_size) if lanes % count == 0
    ]
    good = [count for count in fitting if num_shards % count * LEFT_OUT <= num_shards]
    if good:
        return max(good)
    return min(fitting, key=lambda count: (num_shards % count, -count), default=None)


class LaneReader(WindowRows):
    """Builds rows of the first epoch. Picklable; holds one window and one shard per lane it reads.

    known    number of a shard -> how far it was read before, by any rank
    records  the folder that takes the record of every shard that was read to its end, None for none
    block    bytes of a read
    """

    def __init__(
        self,
        shards: list[str],
        order: ShardOrder,
        recipe: Recipe,
        options: LoaderOptions,
        records: Path | None,
        block: int,
    ) -> None:
        super().__init__(recipe, options)
        self.order = order
        self.storage = options.storage
        self.files = ShardFiles(shards, options.storage)
        self.records = records
        self.block = min(REMOTE_BLOCK, block)
        self.known: dict[int, Passed] = {}
        self.passed: dict[int, Passed] = {}
        self._lanes: dict[int, _Lane] = {}
        self._windows: dict[int, Loaded] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lanes": {}, "_windows": {}}

    def sub_batch(self, step: int, first: int, end: int) -> SubBatch | None:
        """Returns rows first..end of global batch `step`, whole lanes; None when a lane is at its end."""
        quota = self.order.quota
        base = step * self.order.batch_size
        before = self.files.retried
        places: list[tuple[Loaded, int, int, int]] = []
        for row in range(first, end):
            lane, offset = divmod(row, quota)
            window = self._window(lane, step * quota + offset)
            if window is None:
                return None
            places.append((window, step * quota + offset - window.start, 0, base + row))
        rows: Iterator[Row] = (self._row(*place) for place in places)
        built = self._build(0, range(base + first, base + end), rows)
        passed, self.passed = self.passed, {}
        return replace(built, retries=self.files.retried - before, passed=passed)

    def hold(self, passed: Mapping[int, Passed]) -> None:
        """Takes over how far shards were read, by this process or another rank."""
        for shard, now in passed.items():
            held = self.known.get(shard)
            if held is None or (held.samples <= now.samples and not held.whole):
                self.known[shard] = now

    def note(self, shard: int, passed: Passed) -> None:
        """Takes down how far a shard was read here."""
        self.hold({shard: passed})
        self.passed[shard] = self.known[shard]

    def _window(self, lane: int, position: int) -> Loaded | None:
        window = self._windows.get(lane)
        if window is None or not window.start <= position < window.start + len(window.ids):
            self._windows.pop(lane, None)
            number, start, end = self.order.window_at(lane, position)
            # Out of the dict while it reads: after an error it would look like a lane at its end.
            reading = self._lanes.pop(lane, None)
            if reading is None or reading.position != start:
                reading = _Lane(self, lane, start)
            taken = reading.take(end - start)
            self._lanes[lane] = reading
            if start + len(taken) <= position:
                return None
            order = self.order.shuffled(lane, number, len(taken))
            ids = list(taken)
            window = Loaded(lane, start, [ids[at] for at in order], taken)
            self._windows[lane] = window
        return window

    def _following(self, window: Loaded, at: int) -> Iterator[tuple[int, Found]]:
        """The samples after the window in its lane, then those before it."""
        end = window.start + len(window.ids)
        yield from _Lane(self, window.lane, end).samples
        yield from islice(_Lane(self, window.lane, 0).samples, window.start)

    def _place(self, sample_id: int) -> tuple[str, int]:
        shard, position = sample_id >> _POSITION_BITS, sample_id & ((1 << _POSITION_BITS) - 1)
        return self.files.shards[shard], position


class _Lane:
    """A lane from one of its samples on; `position` is that of the next one."""

    def __init__(self, reader: LaneReader, lane: int, position: int) -> None:
        self.position = position
        self.samples = self._read(reader, reader.order.shards(lane), position)
        self._reader = reader
        self._shard: _Shard | None = None

    def take(self, count: int) -> dict[int, Found]:
        """Returns the next samples by id, fewer at the end of the lane."""
        taken: dict[int, Found] = dict(islice(self.samples, count))
        self.position += len(taken)
        if self._shard is not None:
            self._reader.note(self._shard.number, self._shard.passed(False))
        return taken

    def _read(self, reader: LaneReader, shards: list[int], skip: int) -> Iterator[tuple[int, RawSample]]:
        for number in shards:
            known = reader.known.get(number)
            if known is not None and known.whole and skip >= known.samples:
                skip -= known.samples
                continue
            shard = self._shard = _Shard(reader, number, known)
            shard.blocks.keep = not skip
            for span in shard.spans():
                if skip:
                    skip -= 1
                    shard.blocks.keep = not skip
                else:
                    yield sample_id(number, shard.samples - 1), shard.take(span)
            reader.note(number, shard.passed(True))
            self._shard = None


class _Shard:
    """One shard under the strict walk, compared with how far it was read before."""

    def __init__(self, reader: LaneReader, number: int, known: Passed | None) -> None:
        self.number = number
        self.samples = 0
        self._known = known
        self._records = reader.records
        self._path = path = reader.files.shards[number]
        # Of a remote shard by the reader, which counts what it had to ask for again.
        remote = is_remote(path)
        facts = reader.files.facts(number) if remote else fingerprints([path], reader.storage)[0]
        self.blocks = Blocks(
            lambda begin, end: reader.files.read(number, begin, end, facts), facts[0], reader.block
        )
        self._walk = ShardWalk(path, self.blocks.read, *facts)

    def passed(self, whole: bool) -> Passed:
        """Returns how far the walk has come."""
        return Passed(self.samples, self._walk.digest, whole)

    def spans(self) -> Iterator[SampleSpan]:
        """Yields where the samples lie and leaves a record at the end. Raises DataError."""
        known = self._known
        for span in self._walk.samples():
            self.samples += 1
            if known is not None and self.samples == known.samples and self._walk.digest != known.digest:
                raise changed(self._path, f"other headers in its first {self.samples} samples")
            yield span
            self.blocks.release(span.end)
        if known is not None and (
            self.samples < known.samples or (known.whole and self.samples > known.samples)
        ):
            raise changed(self._path, f"{self.samples} samples instead of {known.samples}")
        if self._records is not None:
            write_record(self._records, self._path, self._walk.result())

    def take(self, span: SampleSpan) -> RawSample:
        """Returns the sample itself."""
        return taken(span, self.blocks)
