"""Servers that fail, lie or leak: the same samples as from a disk, or an error; no secret is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clipkit.data.http_ranges
import clipkit.data.remote
from clipkit.data.indexing import build_index
from clipkit.data.options import Storage
from clipkit.data.remote import RemoteShards
from clipkit.data.source import Unreadable, expand_shards
from clipkit.types import DataError
from tests.data.makers import stream, take, write_shards
from tests.data.servers import ShardServer, addresses, served, serving, stalled, status

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
@pytest.mark.fault(
    "F14",
    "500 and 503, 429, a stall, short answers, another range, none",
    "read again from where it stopped, with a line that says so; the bytes of the disk",
)
def test_f14_failing_reads_are_repeated_and_continued(
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
@pytest.mark.fault(
    "F14",
    "400, 403, 404, 500 for ever, no ranges, empty answers, stalls",
    "an error that names the address, the byte and the number of attempts",
)
def test_f14_a_read_that_cannot_succeed(
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


@pytest.mark.fault(
    "F14",
    "a server that ignores ranges; its answer cut",
    "refused, or with `data.on_no_range=stream` read and labelled not exact; a cut answer is an error",
)
def test_f14_a_server_without_ranges(folder: Path, server: ShardServer) -> None:
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


@pytest.mark.fault(
    "F14",
    "redirects, an expired one, a circle",
    "followed and remembered, asked for again, given up after five",
)
@pytest.mark.fault(
    "F27",
    "redirects to `file:`, `ftp:`, http and the metadata address 169.254.169.254",
    "refused; a login stays with the server it was written for",
)
def test_f14_f27_redirects_stay_on_the_list(folder: Path, server: ShardServer) -> None:
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


@pytest.mark.fault(
    "F30",
    "a login and a signature in the address of shards that are indexed",
    "in no file of the index, no log line, no error",
)
def test_f30_no_secret_of_an_address_is_written(
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
