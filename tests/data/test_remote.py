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
from clipkit.data.source import Unreadable, expand_shards, needs_stream
from clipkit.types import ConfigError, DataError
from tests.data.makers import good, same, stream, take, write_shards, write_tar
from tests.data.servers import ShardServer, served, serving, stalled, status

STORAGE = Storage()


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


def addresses(server: ShardServer) -> str:
    return f"{server.url}/{{00000..00002}}.tar"


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


def damaged_reads() -> dict[str, Any]:
    return {
        "500 twice": [status(500), status(503)],
        "asked to wait": [status(429, Retry_After="0")],
        "stalled": [stalled(0.5)],
        "short": [served(keep=0.4), served(keep=0.5)],
        "another range": [served(shift=7)],
        "no range in the answer": [status(206)],
    }


@pytest.mark.parametrize("name", damaged_reads())
def test_failing_reads_are_repeated_and_continued(
    name: str, folder: Path, server: ShardServer, capsys: pytest.CaptureFixture[str]
) -> None:
    url, data = f"{server.url}/00000.tar", (folder / "00000.tar").read_bytes()
    source = RemoteShards(STORAGE)
    facts = source.facts(url)
    assert facts[0] == len(data)
    server.faults.extend(damaged_reads()[name])
    assert source.read(url, 1000, 9000, facts) == data[1000:9000]
    assert source.retried == len(damaged_reads()[name])
    assert f"reading again (1 so far): {url}, byte " in capsys.readouterr().err
    if name == "short":
        # What had come is not asked for again.
        begins = [int(asked[6:].split("-")[0]) for _, asked, _ in server.requests[1:]]
        assert begins == [1000, 4200, 6600]
    source.close()


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


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (status(500), Unreadable, r"byte 0 \(HTTP 500; 4 attempts\)"),
        (status(404), DataError, r"no such file \(HTTP 404\)"),
        (status(403), DataError, r"access denied \(HTTP 403\)"),
        (status(400), DataError, "HTTP 400"),
        (served(ranges=False), DataError, "ignores ranges.*\n.*data.on_no_range=stream"),
        (served(shift=3), Unreadable, "bytes 3-514 instead of 0-511"),
        (served(keep=0.0), Unreadable, "0 of 512 bytes"),
        (stalled(0.4), Unreadable, "no answer in 0.3 s"),
    ],
)
def test_a_read_that_cannot_succeed(
    server: ShardServer, fault: Any, kind: type[Exception], words: str
) -> None:
    url = f"{server.url}/00001.tar"
    source = RemoteShards(STORAGE)
    facts = source.facts(url)
    server.always = fault
    with pytest.raises(kind, match=words) as caught:
        source.read(url, 0, 512, facts)
    assert type(caught.value) is kind or words.startswith("ignores")
    with pytest.raises(DataError, match=r"1 of 1 shards cannot be read|ignores ranges"):
        build_index([url])


def test_a_changed_object_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "set", [20, 20])
    with serving(shards) as server:
        spec = expand_shards(f"{server.url}/{{00000..00001}}.tar")
        index = build_index(spec)
        data = bytearray((shards / "00001.tar").read_bytes())
        data[600] ^= 1  # in a payload: the size and every header stay
        (shards / "00001.tar").write_bytes(data)
        source = ShardBytes(index)
        assert source.read(0, 0, 512)
        with pytest.raises(DataError, match=r"changed after it was indexed\nrun: clipkit index --verify"):
            source.read(1, 0, 512)
        # The next start sees it before the first step, and walks the changed shard only.
        server.requests.clear()
        again = build_index(spec)
        assert again.stamps[0] == index.stamps[0]
        assert again.stamps[1] != index.stamps[1]
        asked = [path for path, wanted, _ in server.requests if wanted != "bytes=0-0"]
        assert asked == ["/00001.tar"]
        write_tar(shards / "00001.tar", [good(number) for number in range(9)])
        with pytest.raises(DataError, match="changed after it was indexed"):
            ShardBytes(again).read(1, 20_000, 30_000)


def test_servers_without_tags_are_read_by_size(folder: Path, server: ShardServer) -> None:
    server.always = served(tag=False)
    assert build_index(expand_shards(addresses(server))).stamps.tolist() == [0, 0, 0]
    assert len(take(stream(addresses(server), 6), 0, 2)) == 2


def test_a_server_without_ranges(folder: Path, server: ShardServer) -> None:
    server.always = served(ranges=False)
    with pytest.raises(DataError, match="ignores ranges"):
        stream(addresses(server), 6)
    opened = stream(addresses(server), 6, on_no_range="stream")
    assert (opened.exact, opened.num_samples) == (False, 60)
    keys = [int(key) for batch in take(opened, 0, 10) for key in batch.keys]
    assert sorted(keys) == list(range(60))
    server.always = served(ranges=False, keep=0.7)
    with pytest.raises(DataError, match=r"00000\.tar: cannot be read .*too early"):
        take(opened, 0, 10)


def test_compressed_remote_shards_are_streams(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar.gz", [good(number) for number in range(12)], "w:gz")
    with serving(tmp_path) as server:
        assert needs_stream(f"{server.url}/a.tar.gz?x=1")
        opened = stream(f"{server.url}/a.tar.gz", 4)
        assert (opened.exact, opened.num_samples) == (False, 12)
        server.always = status(500)
        with pytest.raises(DataError, match="HTTP 500"):
            take(opened, 0, 1)


def test_redirects_stay_on_the_list(folder: Path, server: ShardServer) -> None:
    url, data = f"{server.url}/00000.tar", (folder / "00000.tar").read_bytes()
    source = RemoteShards(STORAGE)
    with serving(folder) as other:
        server.always = status(302, Location=f"{other.url}/00000.tar?sig=1")
        facts = source.facts(url.replace("//", "//me:secret@"))
        assert source.read(url, 0, 600, facts) == data[:600]
        assert source.read(url, 600, 900, facts) == data[600:900]
        # The way is remembered, and the login stays with the server it was written for.
        assert len(server.requests) == 2
        assert [request[2][:5] for request in server.requests] == ["Basic", ""]
        assert {request[2] for request in other.requests} == {""}
        # What it leads to has expired: the way is asked for again.
        other.faults.append(status(403))
        assert source.read(url, 0, 600, facts) == data[:600]
        assert len(server.requests) == 3
    for target in ("http://169.254.169.254/a", "file:///etc/passwd", "ftp://host/a", "http://host/a.tar"):
        server.always = status(302, Location=target)
        with pytest.raises(DataError, match="not https:"):
            RemoteShards(STORAGE).facts(url)
    server.always = status(302, Location=url)
    with pytest.raises(DataError, match="more than 5 redirects"):
        RemoteShards(STORAGE).facts(url)


def test_the_proxy_of_the_environment_is_used(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", server.url.replace("//", "//me:CANARY@"))
    with pytest.raises(DataError, match="Tunnel connection failed: 407") as caught:
        RemoteShards(STORAGE).facts("https://shards.invalid/a.tar")
    assert server.requests[0] == ("shards.invalid:443", "CONNECT", "Basic bWU6Q0FOQVJZ")
    assert "CANARY" not in str(caught.value)
    assert clipkit.data.http_ranges._proxy("localhost") is None
    monkeypatch.setenv("no_proxy", "shards.invalid")
    assert clipkit.data.http_ranges._proxy("shards.invalid") is None


def test_no_secret_is_written(
    folder: Path, server: ShardServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = addresses(server).replace("//", "//user:CANARY@") + "?sig=CANARY&part=1"
    server.faults.append(status(500))
    index = build_index(expand_shards(spec), cache_dir=tmp_path / "index")
    assert server.requests[-1][2].startswith("Basic")
    assert server.requests[-1][0].endswith("?sig=CANARY&part=1")
    # A new signature is the same set; another part is not.
    server.requests.clear()
    again = build_index(expand_shards(spec.replace("CANARY", "OTHER")), cache_dir=tmp_path / "index")
    assert again.file == index.file
    assert {wanted for _, wanted, _ in server.requests} == {"bytes=0-0"}
    other = build_index(expand_shards(spec.replace("part=1", "part=2")), cache_dir=tmp_path / "index")
    assert other.file != index.file
    shown = capsys.readouterr()
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"***@127.0.0.1" in held
    assert b"CANARY" not in held + (shown.out + shown.err).encode()


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
