"""Shards on other machines: every read repeated when it fails, and compared with what was indexed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from clipkit.data.http_ranges import Answer, HttpRanges, Transient
from clipkit.data.object_store import ObjectStores
from clipkit.data.options import DEFAULT_STORAGE, Storage
from clipkit.data.source import LocalShards, Unreadable, changed, is_remote, scheme_of
from clipkit.data.tar_index import Index
from clipkit.redaction import redact, visible
from clipkit.types import DataError

RETRIES = (0.5, 2.0, 8.0, 30.0)  # seconds before each further attempt; a server may ask for more
MAX_WAIT_S = 120.0
NOTICE_EVERY_S = 30.0

Facts = tuple[int, int]
"""Size in bytes, and the stamp of the contents (0: the server tells none)."""


class RemoteShards:
    """Reads byte ranges of remote shards. Picklable; clients are made on first use, after a fork.

    retried   failed attempts that were followed by another one, in this process
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.retried = 0
        self._said = float("-inf")
        self._owner = 0
        self._clients: dict[str, HttpRanges | ObjectStores] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"storage": self.storage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def facts(self, url: str) -> Facts:
        """Returns size and stamp of an object. Raises DataError, NoRanges or ConfigError."""
        answer = self._attempts(url, 0, 1, None)
        return answer.size, answer.stamp

    def read(self, url: str, begin: int, end: int, facts: Facts) -> bytes:
        """Returns bytes begin..end of an object that must still have these facts.

        A read that ends early continues where it stopped. Raises Unreadable when every attempt failed,
        DataError when the object is another one now.
        """
        return self._attempts(url, begin, end, facts).data

    def _attempts(self, url: str, begin: int, end: int, facts: Facts | None) -> Answer:
        client = self._client(url)
        pieces: list[bytes] = []
        at = begin
        delays = iter(RETRIES)
        while True:
            wait = 0.0
            try:
                answer = client.ranged(url, at, end)
                size, stamp = facts = facts or (answer.size, answer.stamp)
                # A server that tells no tag in one answer and one in the next has not changed its bytes.
                if answer.size != size or (stamp and answer.stamp and answer.stamp != stamp):
                    raise changed(url, f"{answer.size} bytes, or another version of them, instead of {size}")
                pieces.append(answer.data)
                at += len(answer.data)
                if at >= min(end, size):
                    return answer._replace(data=b"".join(pieces))
                reason = f"{len(answer.data)} of {end - at + len(answer.data)} bytes"
            except Transient as failure:
                reason, wait = failure.reason, failure.wait
            delay = next(delays, None)
            if delay is None:
                raise Unreadable(
                    f"{url}: cannot be read at byte {at} ({reason}; {len(RETRIES) + 1} attempts)",
                    "check the storage, then start the same command again: it continues where it stopped",
                )
            self._note(f"{url}, byte {at}: {reason}")
            time.sleep(min(MAX_WAIT_S, max(delay, wait)))

    def _note(self, text: str) -> None:
        self.retried += 1
        now = time.monotonic()
        if now - self._said >= NOTICE_EVERY_S:
            self._said = now
            print(
                visible(redact(f"reading again ({self.retried} so far): {text}")), file=sys.stderr, flush=True
            )

    def _client(self, url: str) -> HttpRanges | ObjectStores:
        if self._owner != os.getpid():
            # After a fork two processes would read each other's answers. Closing the copies here says nothing
            # to the server: neither http.client nor ssl sends a farewell.
            self.close()
            self._owner = os.getpid()
        kind = "http" if scheme_of(url) in ("https", "http") else "store"
        if kind not in self._clients:
            self._clients[kind] = HttpRanges() if kind == "http" else ObjectStores(self.storage)
        return self._clients[kind]

    @contextmanager
    def whole(self, url: str) -> Iterator[Any]:
        """The object from front to back, as something with `read`; opening it is tried again."""
        client = self._client(url)
        for delay in (*RETRIES, None):
            opened = client.whole(url)
            try:
                stream = opened.__enter__()
                break
            except Transient as failure:
                if delay is None:
                    raise DataError(
                        f"{url}: cannot be read ({failure.reason})", "check the storage"
                    ) from None
                self._note(f"{url}: {failure.reason}")
                time.sleep(min(MAX_WAIT_S, max(delay, failure.wait)))
        try:
            yield stream
        finally:
            opened.__exit__(None, None, None)


class ShardFiles:
    """Reads byte ranges of shards, wherever they lie. Picklable."""

    def __init__(self, shards: Sequence[str], storage: Storage = DEFAULT_STORAGE) -> None:
        self.shards = tuple(shards)
        self._local = LocalShards(shards)
        self._remote = RemoteShards(storage)

    @property
    def retried(self) -> int:
        """Failed reads that were followed by another attempt, in this process."""
        return self._local.retried + self._remote.retried

    def facts(self, shard: int) -> Facts:
        """Returns size and stamp of a remote shard. Raises DataError, NoRanges or ConfigError."""
        return self._remote.facts(self.shards[shard])

    def read(self, shard: int, begin: int, end: int, facts: Facts) -> bytes:
        """Returns bytes begin..end of a shard; a remote one must still have these facts.

        Raises Unreadable, DataError or ConfigError.
        """
        url = self.shards[shard]
        if not is_remote(url):
            return self._local.read(shard, begin, end)
        return self._remote.read(url, begin, end, facts)


class ShardBytes:
    """Reads byte ranges of the shards of an index, wherever they lie. Picklable."""

    def __init__(self, index: Index, storage: Storage = DEFAULT_STORAGE) -> None:
        self._index = index
        self._files = ShardFiles(index.shards, storage)

    @property
    def retried(self) -> int:
        """Failed reads that were followed by another attempt, in this process."""
        return self._files.retried

    def read(self, shard: int, begin: int, end: int) -> bytes:
        """Returns bytes begin..end of a shard. Raises Unreadable, DataError or ConfigError."""
        facts = int(self._index.sizes[shard]), int(self._index.stamps[shard])
        return self._files.read(shard, begin, end, facts)
