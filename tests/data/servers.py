"""A server of byte ranges on this machine, with faults to order."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = Callable[["_Handler"], bool]
"""Called with the request; True: it has been answered."""


class ShardServer:
    """Serves a folder under `url`; `faults` are used up in order, `always` answers every request."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.requests: list[tuple[str, str, str]] = []
        self.connections = 0
        self._http = _Quiet(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Says nothing: clients that leave in the middle of an answer are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    owner: ShardServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.owner.connections += 1

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.owner.requests.append(
            (self.path, self.headers.get("Range", ""), self.headers.get("Authorization", ""))
        )
        fault = self.owner.faults.popleft() if self.owner.faults else self.owner.always
        if fault is None or not fault(self):
            self.serve()

    def do_CONNECT(self) -> None:
        self.owner.requests.append((self.path, "CONNECT", self.headers.get("Proxy-Authorization", "")))
        self.reply(407, b"")

    def content(self) -> bytes | None:
        path = self.owner.root / self.path.partition("?")[0].lstrip("/")
        return path.read_bytes() if path.is_file() else None

    def serve(self, shift: int = 0, keep: float = 1.0, ranges: bool = True, tag: bool = True) -> None:
        data = self.content()
        if data is None:
            self.reply(404, b"")
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'} if tag else {}
        wanted = self.headers.get("Range", "")
        if not wanted or not ranges:
            self.reply(200, data, headers, keep)
            return
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        first, last = first + shift, min(last + shift, len(data) - 1)
        if first >= len(data):
            self.reply(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.reply(206, data[first : last + 1], headers, keep)

    def reply(
        self, status: int, data: bytes, headers: dict[str, str] | None = None, keep: float = 1.0
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: int(len(data) * keep)])
        if keep < 1:
            self.close_connection = True


def status(code: int, **headers: str) -> Fault:
    """Answers with this status and nothing else."""

    def fault(request: _Handler) -> bool:
        request.reply(code, b"", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def served(**options: Any) -> Fault:
    """Serves with another range (shift), a part of the body (keep), no ranges, or no tag."""

    def fault(request: _Handler) -> bool:
        request.serve(**options)
        return True

    return fault


def stalled(seconds: float) -> Fault:
    """Answers after a while, to a connection that is gone by then."""

    def fault(request: _Handler) -> bool:
        time.sleep(seconds)
        request.close_connection = True
        return True

    return fault


@contextmanager
def serving(root: Path) -> Iterator[ShardServer]:
    """A server of `root` for a block."""
    server = ShardServer(root)
    try:
        yield server
    finally:
        server.close()


def addresses(server: ShardServer) -> str:
    """The pattern of the three shards of a served set."""
    return f"{server.url}/{{00000..00002}}.tar"
