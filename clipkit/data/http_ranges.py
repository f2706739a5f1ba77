"""Byte ranges over http(s): one request, one answer that is checked. Repeating is left to the caller."""

from __future__ import annotations

import base64
import hashlib
import http.client
import re
import ssl
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from clipkit.data.source import LOCAL_HOSTS
from clipkit.types import ConfigError, DataError

TIMEOUT_S = 60.0  # without a byte
MAX_CONNECTIONS = 8
MAX_REDIRECTS = 5
_KEPT_REDIRECTS = 4096
_PIECE = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
_DENIED = (401, 403)
_GONE = (404, 410)
_LATER = (408, 425, 429)
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)$")
# Servers close idle connections whenever they like; only the next request finds out.
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)


class Transient(Exception):
    """A failure that another attempt may not meet. wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


class NoRanges(DataError):
    """The server sends whole files only."""


class Answer(NamedTuple):
    """Bytes from the asked position on (possibly fewer), the size of the whole object, and its stamp."""

    data: bytes
    size: int
    stamp: int


def stamp_of(tag: str) -> int:
    """Returns 63 bits that change with a tag of the contents (ETag, time); 0 for none."""
    if not tag:
        return 0
    return int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest(), "little") >> 1


class HttpRanges:
    """GET requests with ranges over at most 8 kept connections. Not for several threads or processes."""

    def __init__(self) -> None:
        self._connections: OrderedDict[tuple[str, str, int | None], http.client.HTTPConnection] = (
            OrderedDict()
        )
        self._moved: OrderedDict[str, str] = OrderedDict()
        self._context: ssl.SSLContext | None = None

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def ranged(self, url: str, begin: int, end: int) -> Answer:
        """Returns bytes begin..end of a URL, fewer if the connection ends early.

        Raises Transient, NoRanges, or DataError for what another attempt would not change.
        """
        response, at = self._get(url, {"Range": f"bytes={begin}-{end - 1}"})
        try:
            return self._checked(response, url, begin, end)
        finally:
            if not response.isclosed():
                self._forget(at)

    def _checked(self, response: http.client.HTTPResponse, url: str, begin: int, end: int) -> Answer:
        if response.status == 200:
            raise NoRanges(
                f"{url}: the server ignores ranges and sends whole files",
                "set data.on_no_range=stream to read it as a stream (exact: false), or copy the shards",
            )
        found = _CONTENT_RANGE.match(response.getheader("Content-Range") or "")
        if found is None:
            raise Transient("an answer without a usable Content-Range")
        encoding = response.getheader("Content-Encoding") or "identity"
        if encoding != "identity":
            raise Transient(f"an answer in the encoding {encoding}")
        size, stamp = int(found[3]), stamp_of(_tag(response))
        if response.status == 416 or found[1] is None:
            return Answer(b"", size, stamp)
        first, stop = int(found[1]), int(found[2]) + 1
        if (first, stop) != (begin, min(end, size)):
            raise Transient(f"bytes {first}-{stop - 1} instead of {begin}-{end - 1}")
        return Answer(_received(response, stop - first), size, stamp)

    @contextmanager
    def whole(self, url: str) -> Iterator[Body]:
        """The body of a URL from front to back."""
        response, at = self._get(url, {})
        try:
            if response.status not in (200, 206):
                raise DataError(f"{url}: HTTP {response.status}", "check the address")
            yield Body(response)
        finally:
            self._forget(at)

    def _get(self, url: str, headers: Mapping[str, str]) -> tuple[http.client.HTTPResponse, str]:
        """Returns the answer and the URL it came from, redirects followed; remembered for the next time."""
        at = self._moved.get(url, url)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = self._send(at, url, headers)
                if response.status in (200, 206, 416):
                    self._remember(url, at)
                    return response, at
                self._forget(at)
                if response.status in _REDIRECTS:
                    at = _redirected(url, at, response.getheader("Location") or "")
                elif url in self._moved:  # addresses that redirects lead to expire
                    del self._moved[url]
                    at = url
                else:
                    raise _failure(url, response)
        except Transient:
            self._moved.pop(url, None)
            raise
        raise DataError(f"{url}: more than {MAX_REDIRECTS} redirects", "correct the address")

    def _send(self, at: str, origin: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(at)
        path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*")
        if parts.query:
            path += "?" + quote(parts.query, safe="/%:=&?~+!$,;'@()*[]")
        sent = {"Accept-Encoding": "identity", "User-Agent": "clipkit", **headers, **_login(at, origin)}
        connection, kept = self._connection(at)
        while True:
            try:
                connection.request("GET", path, headers=sent)
                return connection.getresponse()
            except ssl.SSLCertVerificationError as error:
                self._forget(at)
                raise DataError(
                    f"{origin}: the certificate is not valid ({error.verify_message})",
                    "correct the address, or install the certificate authority it needs",
                ) from None
            except http.client.InvalidURL:
                raise ConfigError(f"{origin}: not an address", "correct data.train") from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept and isinstance(error, _STALE):
                    kept = False
                    continue
                self._forget(at)
                raise Transient(_words(error)) from None

    def _connection(self, at: str) -> tuple[http.client.HTTPConnection, bool]:
        key = _server(at)
        connection = self._connections.get(key)
        if connection is not None:
            self._connections.move_to_end(key)
            return connection, True
        while len(self._connections) >= MAX_CONNECTIONS:
            self._connections.popitem(last=False)[1].close()
        scheme, host, port = key
        if scheme == "http":
            connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        else:
            self._context = self._context or ssl.create_default_context()
            proxy = _proxy(host)
            through, its_port = (proxy.hostname or "", proxy.port) if proxy else (host, port)
            connection = http.client.HTTPSConnection(
                through, its_port, timeout=TIMEOUT_S, context=self._context
            )
            if proxy:
                connection.set_tunnel(host, port, headers=_basic("Proxy-Authorization", proxy))
        self._connections[key] = connection
        return connection, False

    def _forget(self, at: str) -> None:
        connection = self._connections.pop(_server(at), None)
        if connection is not None:
            connection.close()

    def _remember(self, url: str, at: str) -> None:
        if at == url:
            return
        while len(self._moved) >= _KEPT_REDIRECTS:
            self._moved.popitem(last=False)
        self._moved[url] = at


class Body:
    """A file to be read once, from front to back; its early end is an OSError and not the end of the file."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        try:
            data = self._response.read(size) if size >= 0 else self._response.read()
        except http.client.HTTPException as error:
            raise OSError(_words(error)) from None
        # http.client takes a connection that ends early for the end of the file.
        if size and not data and self._response.length:
            raise OSError(f"the connection ended {self._response.length} bytes too early")
        return data


def _server(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    try:
        return parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        raise ConfigError(f"{url}: not an address", "correct data.train") from None


def _login(at: str, origin: str) -> dict[str, str]:
    """The user and password of an address, for its own server only and not for where it redirects to."""
    parts = urlsplit(at if urlsplit(at).username else origin)
    return _basic("Authorization", parts) if _server(at) == _server(parts.geturl()) else {}


def _basic(header: str, parts: SplitResult) -> dict[str, str]:
    if not parts.username:
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return {header: f"Basic {base64.b64encode(login).decode()}"}


def _proxy(host: str) -> SplitResult | None:
    """The proxy that the environment names for https (https_proxy, no_proxy)."""
    address = getproxies().get("https")
    if not address or host in LOCAL_HOSTS or proxy_bypass(host):
        return None
    return urlsplit(address if "://" in address else f"http://{address}")


def _redirected(url: str, at: str, location: str) -> str:
    target = urljoin(at, location)
    scheme, host, _ = _server(target)
    if scheme == "https" or (scheme == "http" and host in LOCAL_HOSTS and urlsplit(url).scheme == "http"):
        return target
    raise DataError(
        f"{url}: redirected to {target!r}, which is not https:",
        "give the address of the shards themselves",
    )


def _failure(url: str, response: http.client.HTTPResponse) -> Exception:
    status = response.status
    if status in _DENIED:
        return DataError(f"{url}: access denied (HTTP {status})", "check the login or token of the address")
    if status in _GONE:
        return DataError(f"{url}: there is no such file (HTTP {status})", "correct data.train")
    if status >= 500 or status in _LATER:
        wait = response.getheader("Retry-After") or ""
        return Transient(f"HTTP {status}", float(wait) if wait.isdecimal() else 0.0)
    return DataError(f"{url}: HTTP {status}", "check the address")


def _tag(response: http.client.HTTPResponse) -> str:
    tag = response.getheader("ETag") or ""
    # A weak tag may differ between servers that hold the same bytes.
    return tag if tag and not tag.startswith("W/") else response.getheader("Last-Modified") or ""


def _received(response: http.client.HTTPResponse, length: int) -> bytes:
    """Returns what arrives of `length` bytes: the caller asks for the rest."""
    pieces: list[bytes] = []
    missing = length
    while missing:
        try:
            piece = response.read(min(_PIECE, missing))
        except http.client.IncompleteRead as error:
            pieces.append(error.partial[:missing])
            break
        except (OSError, http.client.HTTPException):
            break
        if not piece:
            break
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _words(error: Any) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer in {TIMEOUT_S:g} s"
    return " ".join(str(error).split()) or type(error).__name__
