"""The samples of one shard in order, read from its beginning and no further than they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from clipkit.data.fingerprints import fingerprints
from clipkit.data.options import DEFAULT_STORAGE, Storage
from clipkit.data.remote import ShardFiles
from clipkit.data.sample import RawSample
from clipkit.data.scan import Blocks, SampleSpan, ShardWalk

BLOCK = 4 << 20


def walked_samples(shard: str, storage: Storage = DEFAULT_STORAGE, block: int = BLOCK) -> Iterator[RawSample]:
    """Yields the samples of a shard; about `block` bytes are in memory, or one sample where that is larger.

    Raises DataError of any damage, when it is reached, and of a shard that is out of reach.
    """
    files = ShardFiles([shard], storage)
    (facts,) = fingerprints([shard], storage)
    blocks = Blocks(lambda begin, end: files.read(0, begin, end, facts), facts[0], block)
    blocks.keep = True
    for span in ShardWalk(shard, blocks.read, *facts).samples():
        yield taken(span, blocks)
        blocks.release(span.end)


def taken(span: SampleSpan, blocks: Blocks) -> RawSample:
    """Returns the sample that lies at `span`, read as one piece."""
    members = {
        extension: (member.data - span.start, member.data - span.start + member.size)
        for extension, member in span.members.items()
    }
    return RawSample(span.key, members, blocks.read(span.start, span.end - span.start))
