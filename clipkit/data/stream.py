"""The reader for shards without random access (gzip, no ranges, an allowed pipe): webdataset's, seeded.

Everything it yields is labelled exact=False: a resumed run reads its epoch from the start and skips, bad
samples shift those after them, and a damaged tar can end early without a word. Members are never unpickled:
webdataset's `decode` is not used, and streams are opened here, not by its URL rewriting.
"""

from __future__ import annotations

import gzip
import random
import subprocess
import tarfile
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import IO, Any, cast

import webdataset

from clipkit import dist
from clipkit.data.loader import TrainStream
from clipkit.data.options import DEFAULT_STORAGE, LoaderOptions, Storage
from clipkit.data.order import ORDER_VERSION, hash_key, permutation
from clipkit.data.ranges import RowRanges
from clipkit.data.rejects import reject
from clipkit.data.remote import RemoteShards
from clipkit.data.rows import Recipe, Row, SubBatch
from clipkit.data.sample import RawSample, Unusable
from clipkit.data.source import is_remote, needs_stream, scheme_of
from clipkit.data.targets import stored_widths
from clipkit.data.waiting import while_others_wait
from clipkit.types import ClipkitError, ConfigError, DataError

SHUFFLE_BUFFER = 1000  # raw samples per worker
_TIMEOUT = 60  # seconds without an answer
_READ_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)


def open_stream(options: LoaderOptions, shards: list[str], recipe: Recipe, world: dist.World) -> TrainStream:
    """Returns the training stream over shards that are read from front to back; called by all ranks.

    Reads every shard once to count the samples. Raises ConfigError or DataError, the same on every rank.
    """
    count, widths = _surveyed(shards, recipe, options, world)
    recipe = replace(recipe.for_pairs(count), widths=widths)
    if count < options.batch_size:
        raise ConfigError(
            f"data.batch_size={options.batch_size} is larger than the set of {count} samples",
            f"set data.batch_size to at most {count}",
        )
    ranges = RowRanges(options.batch_size, options.batch_size, world, options.workers, options.uneven)
    position = {
        "order_version": ORDER_VERSION,
        "exact": False,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "lanes": None,
        "chunk_size": None,
        "window_chunks": None,
        "num_samples": count,
        "index_sha": None,
    }
    banner = {"samples": count, "shards": len(shards), "exact": False, "index": "none"}
    reader = StreamReader(shards, recipe, options, count)
    return TrainStream(reader, ranges, recipe, options, position, banner)


class StreamReader:
    """Builds rows from front-to-back streams: row r takes samples r, r + B, ... of the shuffled shards.

    Every reader goes through all shards and keeps its share, so that all ranks have equally many samples.
    """

    def __init__(self, shards: list[str], recipe: Recipe, options: LoaderOptions, num_samples: int) -> None:
        self.shards = shards
        self.recipe = recipe
        self.batch_size = options.batch_size
        self.steps_per_epoch = num_samples // options.batch_size
        self.max_consecutive = options.max_consecutive
        self.storage = options.storage
        self._next_step = -1
        self._samples: Iterator[tuple[int, dict[str, Any]]] = iter(())

    def sub_batch(self, step: int, first: int, end: int) -> SubBatch:
        """Returns rows first..end of global batch `step`; a step out of turn starts its epoch and skips."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if step != self._next_step or within == 0:
            self._samples = self._share(epoch, first, end)
            for _ in range(within * (end - first)):
                next(self._samples)
        self._next_step = step + 1
        base = within * self.batch_size
        slots = range(base + first, base + end)
        return self.recipe.build(epoch, slots, (self._row(epoch, slot) for slot in slots))

    def _row(self, epoch: int, slot: int) -> Row:
        rejected: list[tuple[RawSample, str, Unusable]] = []
        while len(rejected) < self.max_consecutive:
            sample_id, members = next(self._samples)
            sample = _raw(members)
            try:
                content = self.recipe.prepare(sample, epoch, slot)
            except Unusable as problem:
                rejected.append((sample, members["__url__"], problem))
                continue
            rejects = tuple(reject(bad.key, url, why, slot, sample.key) for bad, url, why in rejected)
            return Row(slot, sample_id, sample.key, content, rejects)
        sample, url, why = rejected[0]
        raise DataError(
            f"{len(rejected)} unusable samples in a row, the first: {sample.key} in {url} "
            f"({why.reason}: {why.detail})",
            "repair the shards, or raise data.max_consecutive",
        )

    def _share(self, epoch: int, first: int, end: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """This reader's samples of an epoch, shuffled in a buffer; started over when rejects used them up."""
        shuffler = random.Random(hash_key(self.recipe.seed, epoch, "buffer", first))
        shards = [
            self.shards[at]
            for at in permutation(len(self.shards), hash_key(self.recipe.seed, epoch, "shards"))
        ]
        while True:
            mine = (
                (at, sample)
                for at, sample in enumerate(read_samples(shards, self.storage))
                if first <= at % self.batch_size < end
            )
            yield from webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=shuffler)(mine)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_samples": iter(()), "_next_step": -1}


def read_samples(shards: Iterable[str], storage: Storage = DEFAULT_STORAGE) -> Iterator[dict[str, Any]]:
    """Yields the samples of all shards in turn: {"__key__", "__url__", extension: bytes}.

    Raises DataError naming the shard.
    """
    for shard in shards:
        try:
            with _opened(shard, storage) as stream:
                files = webdataset.tariterators.tar_file_expander([{"url": shard, "stream": stream}])
                yield from webdataset.tariterators.group_by_keys(files)
        except _READ_ERRORS as error:
            problem = str(error.args[0]) if error.args else type(error).__name__
            raise DataError(
                f"{shard}: cannot be read ({problem})", "check the shard or the command"
            ) from None


def raw_samples(shards: Iterable[str], storage: Storage = DEFAULT_STORAGE) -> Generator[RawSample]:
    """Yields the samples of all shards in turn. Raises DataError naming the shard."""
    with closing(cast("Generator[dict[str, Any]]", read_samples(shards, storage))) as samples:
        for members in samples:
            yield _raw(members)


@contextmanager
def _opened(shard: str, storage: Storage) -> Iterator[IO[bytes]]:
    scheme = scheme_of(shard)
    if scheme == "pipe":
        command = shard[len("pipe:") :].strip()
        # The user wrote this command and allowed it (data.allow_pipe); nothing of the data reaches the shell.
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            yield process.stdout
            # What follows the end marker of the tar must be read, or the command dies of a closed pipe.
            while process.stdout.read(1 << 20):
                pass
            if process.wait(_TIMEOUT):
                raise DataError(
                    f"{shard}: the command ended with code {process.returncode}", "correct the command"
                )
        finally:
            process.stdout.close()
            process.terminate()
            process.wait()
    elif is_remote(shard):
        with RemoteShards(storage).whole(shard) as stream:
            packed = needs_stream(shard)
            body = gzip.GzipFile(fileobj=stream) if packed else stream
            yield cast("IO[bytes]", body)
            # An end of the connection before the end of the file is found only by reading on.
            while body.read(1 << 20):
                pass
    elif shard.lower().endswith((".gz", ".tgz")):
        # tarfile's own decompression takes a cut file for its end; gzip raises.
        with gzip.open(shard) as unpacked:
            yield cast("IO[bytes]", unpacked)
            while unpacked.read(1 << 20):
                pass
    else:
        with open(shard, "rb") as stream:
            yield stream


def _raw(members: dict[str, Any]) -> RawSample:
    spans: dict[str, tuple[int, int]] = {}
    parts: list[bytes] = []
    at = 0
    for extension, data in members.items():
        if not extension.startswith("__"):
            spans[extension] = (at, at + len(data))
            parts.append(data)
            at += len(data)
    return RawSample(members["__key__"], spans, b"".join(parts))


def _surveyed(
    shards: list[str], recipe: Recipe, options: LoaderOptions, world: dist.World
) -> tuple[int, tuple[int, ...]]:
    """The number of samples and widths of stored vectors, as the main rank finds them; errors reach all."""

    def survey() -> tuple[int, tuple[int, ...]] | ClipkitError | None:
        if not world.is_main and dist.World.current().size > 1:
            return None
        try:
            samples = read_samples(shards, options.storage)
            widths = stored_widths(map(_raw, samples), recipe.stored, options.max_consecutive)
            return sum(1 for _ in read_samples(shards, options.storage)), widths
        except ClipkitError as error:
            return error

    outcomes = dist.gather_objects(while_others_wait(survey))
    seen = next(found for found in outcomes if found is not None)
    if isinstance(seen, ClipkitError):
        raise seen
    if not seen[0]:
        raise DataError(
            f"no sample in {len(shards)} shard(s), first {shards[0]}", "give shards that hold samples"
        )
    return seen
