"""Byte ranges of objects in s3:, gs: and hf: storage, through the fsspec plug-in of each, if installed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from clipkit.data.http_ranges import Answer, Transient, stamp_of
from clipkit.data.options import Storage
from clipkit.data.source import scheme_of
from clipkit.types import ConfigError, DataError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime")
_KEPT_FACTS = 4096


class ObjectStores:
    """Reads of objects; clients are made on first use. Not for several threads or processes.

    What an object is (size, tag) is asked for once per object, not with every read.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._systems: dict[str, Any] = {}
        self._facts: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def close(self) -> None:
        """Forgets the clients."""
        self._systems.clear()

    def ranged(self, url: str, begin: int, end: int) -> Answer:
        """Returns bytes begin..end of an object. Raises Transient, or DataError, ConfigError for good."""
        system = self._system(url)
        with _failures(url):
            facts = self._facts.get(url)
            if facts is None:
                facts = _facts_of(url, system.info(url))
                while len(self._facts) >= _KEPT_FACTS:
                    self._facts.popitem(last=False)
                self._facts[url] = facts
            size, stamp = facts
            stop = min(end, size)
            data = bytes(system.cat_file(url, start=begin, end=stop)) if begin < stop else b""
        if len(data) > stop - begin:
            raise Transient(f"{len(data)} bytes instead of {stop - begin}")
        return Answer(data, size, stamp)

    @contextmanager
    def whole(self, url: str) -> Iterator[IO[bytes]]:
        """The object from front to back."""
        with self._system(url).open(url, "rb") as stream:
            yield stream

    def _system(self, url: str) -> Any:
        scheme = scheme_of(url)
        if scheme not in self._systems:
            try:
                import fsspec

                options = _options(scheme, self._storage)
                # An instance of another process, or a listing of yesterday, must not be found in a cache.
                self._systems[scheme] = fsspec.filesystem(
                    scheme, skip_instance_cache=True, use_listings_cache=False, **options
                )
            except ImportError:
                package = PACKAGES[scheme]
                raise ConfigError(
                    f"{scheme}: addresses need the package {package}, which is not installed",
                    f"run: pip install {package} (or copy the shards and give their path)",
                ) from None
        return self._systems[scheme]


def _options(scheme: str, storage: Storage) -> dict[str, Any]:
    if scheme != "s3" and (storage.region or storage.profile):
        raise ConfigError(
            f"data.storage.region and profile mean nothing to {scheme}: addresses", "leave them out"
        )
    options: dict[str, Any] = {}
    if storage.endpoint:
        options["endpoint" if scheme == "hf" else "endpoint_url"] = storage.endpoint
    if storage.region:
        options["client_kwargs"] = {"region_name": storage.region}
    if storage.profile:
        options["profile"] = storage.profile
    return options


def _facts_of(url: str, info: dict[str, Any]) -> tuple[int, int]:
    size = info.get("size")
    if info.get("type", "file") != "file" or size is None:
        raise DataError(f"{url}: not a file", "name every shard: prefix/{00000..00099}.tar")
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    return int(size), stamp_of(tag)


@contextmanager
def _failures(url: str) -> Iterator[None]:
    """Every plug-in has its own exceptions; those of the standard library say what will not change."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{url}: there is no such file", "correct data.train") from None
    except PermissionError as error:
        raise DataError(f"{url}: access denied ({_line(error)})", "check the credentials") from None
    except Exception as error:
        raise Transient(f"{type(error).__name__}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
