"""How often captions repeat: distinct ones per pairs, and the share of a batch that has a caption twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clipkit.data.captions import DRAWN, CaptionRules, SlotCaptions, slot_key
from clipkit.data.kept import Kept
from clipkit.data.order import hash_key, mix, permutation
from clipkit.data.remote import ShardBytes
from clipkit.data.sample import RawSample, Unusable
from clipkit.data.source import Unreadable, is_remote
from clipkit.data.tar_format import split_name, walk
from clipkit.data.tar_index import Index
from clipkit.data.targets import caption_label

# About 0.1 ms per pair: reading every caption of more of them would delay the start of every run.
EVERY_PAIR = 50_000
SAMPLED_PAIRS = 32_768
# Behind requests: so many of them, each for neighbours with their images.
REMOTE_RUNS, RUN = 16, 64


@dataclass(frozen=True)
class CaptionSurvey:
    """Captions as they are drawn, equal up to case and white space.

    total   pairs that are trained on
    read    pairs whose caption was read
    repeats int64 (distinct captions,), how many of these pairs have each
    sampled whether only some pairs of the set were looked at
    labels  int64, those captions as labels, ascending; what surveys of several sources are compared by
    """

    total: int
    read: int
    repeats: NDArray[np.int64]
    sampled: bool = False
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def distinct(self) -> int:
        """The number of distinct captions among those read."""
        return len(self.repeats)

    def duplicate_share(self, batch_size: int) -> float:
        """Returns the expected share of the rows of a batch whose caption another row of it has, 0..1.

        Batches are taken for random ones of the pairs read, which is what those of a random sample of the set
        are to the set. With fewer pairs than a batch it is an upper bound, from how often two pairs agree.
        """
        n, b = self.read, min(batch_size, self.total)
        if n < 2 or b < 2:
            return 0.0
        if b > n:
            agree = float((self.repeats * (self.repeats - 1)).sum()) / (n * (n - 1))
            return -math.expm1((b - 1) * math.log1p(-agree)) if agree < 1 else 1.0
        sizes, times = np.unique(self.repeats, return_counts=True)
        alone = [none_of(int(size) - 1, b - 1, n - 1) for size in sizes]
        return max(0.0, float(sum(m * t * (1 - p) for m, t, p in zip(sizes, times, alone, strict=True))) / n)

    def describe(self, batch_size: int) -> str:
        """Returns a line for the banner."""
        if not self.read:
            return "none could be read"
        share, bound = (
            self.duplicate_share(batch_size),
            "at most " * (min(batch_size, self.total) > self.read),
        )
        among = f"a sample of {self.read:,} pairs" if self.sampled else f"{self.read:,} pairs"
        return (
            f"{self.distinct:,} distinct ({self.distinct / self.read:.1%}) in {among}; expected in a batch "
            f"of {batch_size:,}: {bound}{share:.1%} of the rows with the caption of another row"
        )


def survey_captions(kept: Kept, source: ShardBytes, rules: CaptionRules, seed: int) -> CaptionSurvey:
    """Returns how often the captions of a set repeat: of every pair up to 50,000, of a sample beyond.

    What is held out is in no batch, and is left out. The same pairs and captions for the same seed. Unusable
    samples are left out, and so is what is out of reach: both are counted where they are trained on.
    """
    index = kept.index
    labels: list[int] = []
    extensions = {entry.field.partition(".")[0] for entry in rules.fields}
    runs = _runs(index, seed)
    for shard, first, count in runs:
        begin = int(index.first_id[shard]) + first
        held = set(kept.held[slice(*np.searchsorted(kept.held, (begin, begin + count)))].tolist())
        try:
            for identity, sample in enumerate(
                _captions(index, source, shard, first, count, extensions), begin
            ):
                if identity in held:
                    continue
                drawn = SlotCaptions(rules, sample, slot_key(seed, 0, identity))
                try:
                    labels.append(caption_label(drawn.caption(DRAWN)))
                except Unusable:
                    continue
        except Unreadable:
            continue
    distinct, repeats = np.unique(np.array(labels, dtype=np.int64), return_counts=True)
    sampled = sum(count for _, _, count in runs) < index.num_samples
    return CaptionSurvey(kept.num_samples, len(labels), repeats.astype(np.int64), sampled, distinct)


def none_of(others: int, drawn: int, pairs: int) -> float:
    """The probability that none of `others` given pairs is among `drawn` of `pairs` (hypergeometric)."""
    if others > pairs - drawn:
        return 0.0
    logs = (math.lgamma(pairs - others + 1), -math.lgamma(pairs - others - drawn + 1))
    return math.exp(sum(logs) - math.lgamma(pairs + 1) + math.lgamma(pairs - drawn + 1))


def _runs(index: Index, seed: int) -> list[tuple[int, int, int]]:
    """Returns (shard, first sample in it, how many) of what is read, in the order of the shards."""
    remote = any(map(is_remote, index.shards))
    total = index.num_samples
    if total <= EVERY_PAIR and not remote:
        length, chosen = RUN, list(range(-(-total // RUN)))
    else:
        # Neighbours may be alike; an index with an offset per sample can do without them.
        length = RUN if remote else index.stride
        count, pieces = (REMOTE_RUNS if remote else SAMPLED_PAIRS // length), -(-total // length)
        chosen = sorted(_choice(pieces, count, hash_key(seed, "caption survey")))
    runs: list[tuple[int, int, int]] = []
    for piece in chosen:
        first, stop = piece * length, min((piece + 1) * length, total)
        while first < stop:
            shard, position = index.locate(first)
            count = min(stop - first, int(index.counts[shard]) - position)
            runs.append((shard, position, count))
            first += count
    return runs


def _choice(pieces: int, count: int, key: int) -> list[int]:
    if pieces <= 4 * count:
        return [int(piece) for piece in permutation(pieces, key)[:count]]
    return np.unique(mix(key, np.arange(count)) % np.uint64(pieces)).astype(np.int64).tolist()


def _captions(
    index: Index, source: ShardBytes, shard: int, first: int, count: int, extensions: set[str]
) -> Iterator[RawSample]:
    """Yields samples first..first+count of a shard with the members of these extensions alone."""
    stored, _, begin, end = index.span(shard, first, first + count - 1)
    path = index.shards[shard]
    whole = source.read(shard, begin, end) if is_remote(path) else None

    def read(offset: int, size: int) -> bytes:
        if whole is None:
            return source.read(shard, offset, offset + size)
        return whole[offset - begin : offset - begin + size]

    key, at, spans, parts, length = "", stored - 1, dict[str, tuple[int, int]](), list[bytes](), 0
    for member in walk(read, begin, end, path, whole=False, on_header=lambda _: None):
        name = split_name(member.name)
        if name is None:
            continue
        if name[0] != key or at < stored:
            if first <= at < first + count:
                yield RawSample(key, spans, b"".join(parts))
            key, at, spans, parts, length = name[0], at + 1, {}, [], 0
        if name[1] in extensions and first <= at < first + count:
            spans[name[1]] = (length, length + member.size)
            parts.append(read(member.data, member.size))
            length += member.size
    if first <= at < first + count:
        yield RawSample(key, spans, b"".join(parts))
