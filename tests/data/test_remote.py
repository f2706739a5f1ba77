"""Shards on other machines: the same samples as from a disk, whatever the server does, or an error."""

from __future__ import annotations

import importlib.util
import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipkit.data.http_ranges
import clipkit.data.remote
import clipkit.data.scan
from clipkit.data.indexing import build_index
from clipkit.data.options import Storage
from clipkit.data.remote import RemoteShards, ShardBytes
from clipkit.data.scan import scan_shard
from clipkit.data.source import expand_shards, needs_stream
from clipkit.types import ConfigError, DataError
from tests.data.makers import good, same, stream, take, write_shards, write_tar
from tests.data.servers import ShardServer, addresses, served, serving, status


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No waiting, and a cache of its own."""
    monkeypatch.setattr(clipkit.data.remote, "RETRIES", (0.0, 0.01, 0.01))
    monkeypatch.setattr(clipkit.data.http_ranges, "TIMEOUT_S", 0.3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in three uneven shards; nothing here changes them."""
    return write_shards(tmp_path_factory.mktemp("remote") / "set", [31, 9, 20])


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with serving(folder) as found:
        yield found


STORAGE = Storage()


def test_the_same_samples_as_from_a_disk(folder: Path, server: ShardServer) -> None:
    local = build_index(expand_shards(str(folder)))
    remote = build_index(expand_shards(addresses(server)))
    assert (remote.sha, remote.counts.tolist()) == (local.sha, local.counts.tolist())
    assert np.array_equal(remote.offsets, local.offsets)
    opened = stream(addresses(server), 6)
    assert opened.exact
    assert same(take(opened, 0, 12), take(stream(folder, 6), 0, 12))
    assert all(wanted for _, wanted, _ in server.requests)


def test_workers_make_their_own_connections(folder: Path, server: ShardServer) -> None:
    reference = take(stream(folder, 6), 0, 10)
    opened = stream(addresses(server), 6, workers=1, start_method="fork")
    # Used here before the fork, which must not make two processes share a connection.
    opened._reader.sub_batch(0, 0, 6)
    assert same(take(opened, 0, 10), reference)


def test_a_walk_needs_few_requests(
    folder: Path, server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipkit.data.scan, "REMOTE_BLOCK", 4096)
    url = f"{server.url}/00000.tar"
    scan = scan_shard(url)
    assert scan.starts.tolist() == scan_shard(str(folder / "00000.tar")).starts.tolist()
    size = (folder / "00000.tar").stat().st_size
    assert len(server.requests) <= 1 + -(-size // 4096) + 1
    assert server.connections == 1


def test_a_closed_connection_is_opened_again_without_a_word(folder: Path, server: ShardServer) -> None:
    url = f"{server.url}/00000.tar"
    source = RemoteShards(STORAGE)
    facts = source.facts(url)

    def closes(request: Any) -> bool:
        request.serve()
        request.close_connection = True
        return True

    server.faults.append(closes)
    for begin in (0, 512, 1024):
        assert source.read(url, begin, begin + 512, facts)
    assert source.retried == 0
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(url, 0, 512, facts) == source.read(url, 0, 512, facts)


def test_servers_without_tags_are_read_by_size(folder: Path, server: ShardServer) -> None:
    server.always = served(tag=False)
    assert build_index(expand_shards(addresses(server))).stamps.tolist() == [0, 0, 0]
    assert len(take(stream(addresses(server), 6), 0, 2)) == 2


def test_compressed_remote_shards_are_streams(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz", [good(number) for number in range(12)], "w:gz")
    with serving(tmp_path) as server:
        assert needs_stream(f"{server.url}/a.tar.gz?x=1")
        opened = stream(f"{server.url}/a.tar.gz", 4)
        assert (opened.exact, opened.num_samples) == (False, 12)
        server.always = status(500)
        with pytest.raises(DataError, match="HTTP 500"):
            take(opened, 0, 1)


def test_the_proxy_of_the_environment_is_used(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", server.url.replace("//", "//me:CANARY@"))
    with pytest.raises(DataError, match="Tunnel connection failed: 407") as caught:
        RemoteShards(STORAGE).facts("https://shards.invalid/a.tar")
    assert server.requests[0] == ("shards.invalid:443", "CONNECT", "Basic bWU6Q0FOQVJZ")
    assert "CANARY" not in str(caught.value)
    assert clipkit.data.http_ranges._proxy("localhost") is None
    monkeypatch.setenv("no_proxy", "shards.invalid")
    assert clipkit.data.http_ranges._proxy("shards.invalid") is None


def test_ranks_walk_together(
    folder: Path, server: ShardServer, tmp_path: Path, run_ranks: Callable[..., list[Any]]
) -> None:
    shas = run_ranks(2, _rank_sha, addresses(server), str(tmp_path / "common"))
    assert shas == [build_index(expand_shards(str(folder))).sha] * 2
    assert walked(server) == [f"/0000{number}.tar" for number in range(3)]
    # Machines without a common folder: the index is sent, nothing is walked again.
    server.requests.clear()
    assert run_ranks(2, _rank_sha, addresses(server), str(tmp_path / "own-{rank}")) == shas
    assert walked(server) == [f"/0000{number}.tar" for number in range(3)]
    assert len(list((tmp_path / "own-1").glob(".clipkit-index*.npy"))) == 1
    server.always = served(ranges=False)
    assert run_ranks(2, _rank_error, addresses(server)) == [True, True]


def walked(server: ShardServer) -> list[str]:
    """The shards whose headers were read, as often as they were."""
    return sorted(
        path for path, wanted, _ in server.requests if wanted.startswith("bytes=0-") and wanted != "bytes=0-0"
    )


def _rank_sha(rank: int, world: int, spec: str, folder: str) -> str:
    from clipkit.dist import World

    opened = stream(spec, 6, World(rank, world), index_dir=folder.format(rank=rank))
    return str(opened.state(0)["index_sha"])


def _rank_error(rank: int, world: int, spec: str) -> bool:
    from clipkit.dist import World

    with pytest.raises(DataError, match="ignores ranges"):
        stream(spec, 6, World(rank, world))
    return True


# Object storage, with a file system of fsspec's own under the name of the plug-in.


class FakeStore:
    """What object storage plug-ins have in common, over a folder."""

    root = Path()
    failures: list[Exception] = []  # noqa: RUF012  (the plug-in is made by name: tests set the class)
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        FakeStore.options = options

    def _data(self, url: str) -> bytes:
        if FakeStore.failures:
            raise FakeStore.failures.pop(0)
        return (self.root / url.rpartition("/")[2]).read_bytes()

    def info(self, url: str) -> dict[str, Any]:
        data = self._data(url)
        return {"size": len(data), "type": "file", "ETag": str(hash(data))}

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        return self._data(url)[start:end]

    def open(self, url: str, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data(url))


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeStore]:
    import fsspec

    def filesystem(scheme: str, **options: Any) -> FakeStore:
        assert scheme in ("s3", "gs")
        return FakeStore(**options)

    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    monkeypatch.setattr(FakeStore, "root", folder)
    monkeypatch.setattr(FakeStore, "failures", [])
    return FakeStore


def test_object_storage_gives_the_same_samples(folder: Path, store: type[FakeStore]) -> None:
    storage = Storage("http://minio:9000", "eu-west-1", "work")
    store.failures[:] = [RuntimeError("slow down")]
    opened = stream("s3://bucket/{00000..00002}.tar", 6, storage=storage)
    assert same(take(opened, 0, 12), take(stream(folder, 6), 0, 12))
    assert store.options["endpoint_url"] == "http://minio:9000"
    assert store.options["client_kwargs"] == {"region_name": "eu-west-1"}
    assert store.options["profile"] == "work"
    with pytest.raises(ConfigError, match="mean nothing to gs:"):
        stream("gs://bucket/00000.tar", 6, storage=storage)
    with pytest.raises(DataError, match="no such file"):
        stream("gs://bucket/absent.tar", 6)
    store.failures[:] = [PermissionError("no key")]
    with pytest.raises(DataError, match=r"access denied \(no key\)"):
        stream("s3://bucket/00000.tar", 6)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_plug_in_is_named() -> None:
    with pytest.raises(ConfigError, match=r"need the package s3fs.*\nrun: pip install s3fs"):
        build_index(["s3://bucket/a.tar"])


def test_objects_that_change_are_refused(tmp_path: Path, folder: Path, store: type[FakeStore]) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    store.root = tmp_path / "copy"
    index = build_index(expand_shards("s3://bucket/{00000..00001}.tar"))
    write_tar(tmp_path / "copy" / "00001.tar", [good(number) for number in range(3)])
    with pytest.raises(DataError, match="changed after it was indexed"):
        ShardBytes(index).read(1, 0, 512)
