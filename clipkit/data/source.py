"""Where shards come from: the list of shards a specification means, and reads of whole chunks.

Paths are read here, remote shards in `remote`, compressed ones and allowed pipes by the stream reader.
No part of a specification ever reaches a shell, an environment variable or webdataset's URL rewriting.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from clipkit.types import ConfigError, DataError

RETRIES = (0.1, 0.5, 2.0)  # seconds before each further attempt of a failing read
MAX_OPEN_FILES = 128
REMOTE_SCHEMES = ("https", "http", "s3", "gs", "hf")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(-?\d+)\.\.(-?\d+)$")
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_LIST_ENDINGS = (".txt", ".list")
_MAX_SHARDS = 10_000_000


def scheme_of(spec: str) -> str:
    """Returns the scheme of a shard specification, "" for a path."""
    match = _SCHEME.match(spec)
    return match.group(1).lower() if match else ""


class Unreadable(DataError):
    """Bytes that are out of reach after every attempt; whether they changed is not known."""


def changed(shard: str, found: str) -> DataError:
    """Returns the error about a shard that is not what was indexed."""
    return DataError(
        f"{shard}: {found}: the shard changed after it was indexed", f"run: clipkit index --verify {shard}"
    )


def is_remote(shard: str) -> bool:
    """Returns whether a shard lies on another machine."""
    return scheme_of(shard) in REMOTE_SCHEMES


def needs_stream(shard: str) -> bool:
    """Returns whether a shard cannot be read by random access (compressed, or a pipe)."""
    path = shard.partition("?")[0] if is_remote(shard) else shard
    return scheme_of(shard) == "pipe" or path.lower().endswith((".gz", ".tgz"))


def check_scheme(spec: str, allow_pipe: bool) -> None:
    """Raises ConfigError for a scheme that is not read or that must be allowed first."""
    scheme = scheme_of(spec)
    if scheme == "http" and _host(spec) not in LOCAL_HOSTS:
        raise ConfigError(
            f"{spec!r} is read over http; anyone on the way could read and change it",
            "write https:, or forward the port to localhost",
        )
    if scheme in REMOTE_SCHEMES:
        _check_remote(spec)
        return
    if scheme == "" or (scheme == "pipe" and allow_pipe):
        return
    if scheme == "pipe":
        raise ConfigError(
            f"{spec!r} runs a shell command", "set data.allow_pipe=true if you wrote this command"
        )
    if scheme == "file":
        raise ConfigError(f"{spec!r} is a file: address", "write the plain path instead")
    raise ConfigError(
        f"the scheme {scheme!r} of {spec!r} is not read; read are paths, {', '.join(REMOTE_SCHEMES)}",
        "copy or mount the shards and give their path",
    )


def _host(spec: str) -> str:
    try:
        return urlsplit(spec).hostname or ""
    except ValueError:
        return ""


def _check_remote(spec: str) -> None:
    path = spec.partition("?")[0]
    if "*" in path or path.endswith("/"):
        raise ConfigError(
            f"{spec!r} is a pattern or a folder; remote storage is not listed",
            "name every shard with a range: prefix/{00000..00099}.tar",
        )


def expand_shards(spec: str | Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Returns the shards a specification means: a path, a {000..009} range, a glob, a folder, or a list.

    A file NAME.txt or NAME.list holds one of these per line, relative to its own folder; lines that begin
    with # are comments. Folders and globs are sorted with numbers in numerical order. Raises ConfigError for
    a refused scheme and DataError when nothing matches, or when a range has holes. Existence of other
    explicitly named shards is checked by the index.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    shards: list[str] = []
    for entry in specs:
        shards += _read_list(entry, allow_pipe) if _is_list(entry) else _expand_one(entry, allow_pipe)
    if not shards:
        raise DataError("no shard is named", "give a path, a folder, a glob or a list of shards")
    repeated = sorted(shard for shard, times in Counter(shards).items() if times > 1)
    if repeated:
        raise DataError(f"a shard is named twice: {repeated[0]}", "name every shard once")
    return shards


def _is_list(spec: str) -> bool:
    return not scheme_of(spec) and spec.lower().endswith(_LIST_ENDINGS) and os.path.isfile(spec)


def _read_list(path: str, allow_pipe: bool) -> list[str]:
    cure = "write one path, pattern or address of shards per line"
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = [line.strip() for line in stream]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a list of shards (no UTF-8 text)", cure) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "check the path of the list") from error
    shards: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        entry = line if scheme_of(line) else os.path.join(os.path.dirname(path), line)
        if "\0" in line or _is_list(entry):
            raise DataError(f"{path}:{number}: not a shard: {line[:80]!r}", cure)
        # A list of a hundred thousand shards is not asked about each of them here.
        plain = entry.lower().endswith(_TAR_ENDINGS) and not (glob.has_magic(entry) or "{" in entry)
        try:
            shards += [entry] if plain and not scheme_of(entry) else _expand_one(entry, allow_pipe)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{path}:{number}: {error.cause}", error.cure) from error
    if not shards:
        raise DataError(f"{path}: names no shard", cure)
    return shards


def plain_shards(spec: str | Sequence[str]) -> list[str]:
    """Returns the shards of `expand_shards`; ConfigError for one without random access."""
    shards = expand_shards(spec, allow_pipe=True)
    streamed = next((shard for shard in shards if needs_stream(shard)), None)
    if streamed is not None:
        raise ConfigError(
            f"{streamed}: a compressed shard or a pipe cannot be read by random access",
            "gunzip it, and give plain .tar files",
        )
    return shards


def _expand_one(spec: str, allow_pipe: bool) -> list[str]:
    check_scheme(spec, allow_pipe)
    scheme = scheme_of(spec)
    if scheme == "pipe":
        return list(_expand_braces(spec))
    if not scheme and os.path.isdir(spec):
        return _folder(spec)
    if scheme or os.path.exists(spec):
        return list(_expand_braces(spec)) if scheme else [spec]
    shards: list[str] = []
    for name in _expand_braces(spec):
        if not glob.has_magic(name) or os.path.exists(name):
            shards.append(name)
            continue
        matches = sorted(glob.glob(name), key=_natural)
        if not matches:
            raise DataError(f"no shard matches {name!r}", "correct the pattern")
        shards += matches
    if _is_range(spec):
        _refuse_holes(spec, shards)
    return shards


def _is_range(spec: str) -> bool:
    return any(_RANGE.match(body) for body in _BRACES.findall(spec))


def _refuse_holes(spec: str, shards: list[str]) -> None:
    """Raises DataError when some of the shards of a range are missing; of all of them the index speaks."""
    present: dict[str, set[str]] = {}
    for folder in {os.path.dirname(shard) for shard in shards}:
        try:
            present[folder] = set(os.listdir(folder or os.curdir))
        except OSError:
            present[folder] = set()
    missing = [shard for shard in shards if os.path.basename(shard) not in present[os.path.dirname(shard)]]
    if not missing or len(missing) == len(shards):
        return
    named = ", ".join(os.path.basename(shard) for shard in missing[:5])
    more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
    raise DataError(
        f"{len(missing):,} of the {len(shards):,} shards in {spec!r} are missing: {named}{more}",
        f"if they were never made (img2dataset leaves such holes), give the folder "
        f"{os.path.dirname(spec) or os.curdir} or a list file, which take the shards that are there; "
        "otherwise bring them back",
    )


def _folder(path: str) -> list[str]:
    try:
        listed = os.listdir(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be listed ({error.strerror})", "check the permissions of the folder"
        ) from error
    names = [name for name in listed if not name.startswith(".") and name.lower().endswith(_TAR_ENDINGS)]
    if not names:
        raise DataError(
            f"no .tar file in the folder {path!r}", "give the folder that holds the shards themselves"
        )
    return [os.path.join(path, name) for name in sorted(names, key=_natural)]


def _natural(name: str) -> list[Any]:
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def _expand_braces(spec: str) -> Iterator[str]:
    match = _BRACES.search(spec)
    if not match:
        yield spec
        return
    head, tail = spec[: match.start()], spec[match.end() :]
    for choice in _choices(match.group(1), spec):
        yield from _expand_braces(head + choice + tail)


def _choices(body: str, spec: str) -> Iterator[str]:
    span = _RANGE.match(body)
    if span:
        first, last = span.groups()
        if abs(int(last) - int(first)) > _MAX_SHARDS:
            raise ConfigError(f"the range {{{body}}} in {spec!r} is too long", "correct the range")
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(last) >= int(first) else -1
        for number in range(int(first), int(last) + step, step):
            yield str(number).zfill(width)
    elif "," in body:
        yield from body.split(",")
    else:
        raise ConfigError(
            f"the braces {{{body}}} in {spec!r} are neither a range nor a list",
            "write {00000..00099} or {train,more}",
        )


class LocalShards:
    """Reads byte ranges of local shards; holds up to 128 files open. Picklable: files open on first use.

    retried   failed reads that were followed by another attempt, in this process
    """

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = tuple(shards)
        self.retried = 0
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "retried": 0, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the open files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, shard: int, begin: int, end: int) -> bytes:
        """Returns bytes begin..end of a shard; transient errors are tried again, then DataError."""
        for delay in (*RETRIES, None):
            try:
                data = self._read(shard, begin, end)
                break
            except OSError as error:
                self._forget(shard)
                if delay is None or isinstance(error, FileNotFoundError | PermissionError):
                    raise Unreadable(
                        f"{self.shards[shard]}: cannot be read at byte {begin} ({error.strerror or error})",
                        "check the storage, then start the same command again: it continues where it stopped",
                    ) from None
                self.retried += 1
                time.sleep(delay)
        if len(data) != end - begin:
            raise changed(self.shards[shard], f"{len(data)} of {end - begin} bytes at byte {begin}")
        return data

    def expect(self, shard: int, begin: int, end: int) -> None:
        """Asks the system to load bytes begin..end before they are read; what is wrong shows at the read."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._descriptor(shard), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _read(self, shard: int, begin: int, end: int) -> bytes:
        descriptor = self._descriptor(shard)
        data = os.pread(descriptor, end - begin, begin)
        while 0 < len(data) < end - begin:
            more = os.pread(descriptor, end - begin - len(data), begin + len(data))
            if not more:
                break
            data += more
        return data

    def _descriptor(self, shard: int) -> int:
        descriptor = self._files.get(shard)
        if descriptor is None:
            while len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            descriptor = os.open(self.shards[shard], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._files[shard] = descriptor
        else:
            self._files.move_to_end(shard)
        return descriptor

    def _forget(self, shard: int) -> None:
        descriptor = self._files.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)
