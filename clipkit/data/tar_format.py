"""A strict walk over the headers of a tar file: whatever is wrong is said with shard, member and byte.

Readers that follow the tar specification stop silently at a damaged header; this walker raises instead.
Formats read: ustar, GNU (long names, base-256 sizes) and PAX (path, size).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from clipkit.types import DataError

BLOCK = 512
# tar writers pad to a record of 20 blocks after two zero blocks; more zeros than that are lost data.
MAX_TRAILER = 20 * BLOCK + 2 * BLOCK
# Extended headers hold a path and a few numbers; a larger claim would only serve to exhaust memory.
MAX_EXTENDED = 1 << 20
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
REPLACE_SHARD = "write or download the shard again, or take it out of the list of shards"

# Kinds of damage.
CLAIMS, EXTENDED, NOT_A_FILE = "size beyond the file", "bad extended header", "not a file"
NOT_A_TAR, UNSAFE_NAME, CUT = "not a tar", "unsafe name", "cut tar"

MAGIC = b"ustar"  # of ustar, GNU and PAX headers, at byte 257
_MAGIC_AT = 257
_FILES = "0\x007"  # kinds of headers of plain files
_EXTENDED = b"xXgLK"  # kinds of headers that speak of the member after them
# Bytes read at a time for the next header: it is near as a rule, and thousands may be sought in one shard.
_FIRST_SEARCH, _SEARCH = 16 << 10, 4 << 20

_NO_PADDING = "no end-of-archive marker: the file ends in the padding behind the last member, which is whole"

Read = Callable[[int, int], bytes]


class ShardDamage(DataError):
    """Damage at one place of a shard.

    kind      a few words to count by; `problem` says more, without shard and byte
    offset    byte of the header where it was met
    member    the member concerned, or the last one before it; "" for none
    """

    def __init__(
        self,
        cause: str,
        cure: str,
        problem: str = "",
        kind: str = "damage",
        offset: int = 0,
        member: str = "",
    ) -> None:
        super().__init__(cause, cure)
        self.problem, self.kind, self.offset, self.member = problem, kind, offset, member

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cause, self.cure, self.problem, self.kind, self.offset, self.member)


class Member(NamedTuple):
    """One regular file: `start` is the byte of its first (extended) header, `data` of its payload."""

    name: str
    start: int
    data: int
    size: int


class _Header(NamedTuple):
    name: str
    kind: str
    size: int


def split_name(name: str) -> tuple[str, str] | None:
    """Returns (sample key, lower-case extension), split at the first dot of the base name, or None.

    Hidden files, names without an extension and `__meta__` entries belong to no sample (webdataset's rule).
    """
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension or (stem.startswith("__") and stem.endswith("__")):
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def walk(
    read: Read, begin: int, end: int, shard: str, *, whole: bool, on_header: Callable[[bytes], None]
) -> Iterator[Member]:
    """Yields the regular files between bytes `begin` and `end`, checking every header.

    With `whole` the range is an entire shard: it must close with an end-of-archive marker and zeros only.
    Without it the range is a run of samples and must end exactly at a member border.
    Raises DataError naming the shard, the member and the byte.
    """
    offset = start = begin
    path: str | None = None
    size_override: int | None = None
    last = ""
    while True:
        if offset == end and not whole and start == offset:
            return
        block = read(offset, min(BLOCK, end - offset))
        if len(block) < BLOCK:
            raise _damage(shard, offset, last, _cut_reason(offset, end, block), CUT)
        if not any(block):
            if not whole or start != offset:
                raise _damage(shard, offset, last, "a zero block where a header should be", "zeros")
            _check_trailer(read, offset, end, shard, last)
            return
        header = _parse(block, shard, offset, last)
        on_header(block)
        data = offset + BLOCK
        size = header.size if size_override is None else size_override
        following = data + -(-size // BLOCK) * BLOCK
        unpadded = header.kind in _FILES and data + size <= end < following
        if following > end and not unpadded:
            problem = (
                f"{path or header.name!r} claims {size} bytes, {max(0, end - data)} are there (file cut)"
            )
            raise _damage(shard, offset, last, problem, CLAIMS, path or header.name)
        if header.kind in "xXgL":
            if size > MAX_EXTENDED:
                raise _damage(shard, offset, last, f"extended header of {size} bytes", EXTENDED)
            body = read(data, size)
            if header.kind == "L":
                path = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.kind in "xX":
                path, size_override = _pax(body, shard, offset, last, path, size_override)
        elif header.kind in _FILES:
            name = _safe_name(path or header.name, shard, offset)
            yield Member(name, start, data, size)
            last, path, size_override = name, None, None
            if unpadded:
                raise _damage(shard, end, last, _NO_PADDING, CUT)
            start = following
        elif header.kind == "5":
            path, size_override = None, None
            start = following
        elif header.kind != "K":
            problem = f"member of type {header.kind!r}; only files are allowed"
            raise _damage(shard, offset, path or header.name, problem, NOT_A_FILE)
        offset = following


def _parse(block: bytes, shard: str, offset: int, last: str) -> _Header:
    try:
        stored = _number(block[148:156])
        total = sum(block) - sum(block[148:156]) + 8 * 32
        if total != stored:
            # Old writers summed signed bytes.
            signed = sum(struct.unpack("512b", block)) - sum(struct.unpack("8b", block[148:156])) + 8 * 32
            if signed != stored:
                raise ValueError(f"header checksum {stored} instead of {total}")
        size = _number(block[124:136])
        if size < 0:
            raise ValueError(f"negative size {size}")
    except ValueError as error:
        if offset == 0:
            problem = _not_a_tar(block)
            raise ShardDamage(
                f"{shard}: {problem}", _cure_not_a_tar(block), problem, NOT_A_TAR, offset
            ) from None
        raise _damage(shard, offset, last, str(error), "bad header") from None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return _Header(name.decode("utf-8", "surrogateescape"), chr(block[156]), size)


def _number(field: bytes) -> int:
    """Octal text, or base-256 when the top bit is set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    text = field.replace(b"\0", b" ").strip()
    if text.startswith((b"-", b"+")) or b"_" in text:
        raise ValueError("header number is not octal")
    try:
        return int(text or b"0", 8)
    except ValueError:
        raise ValueError("header number is not octal") from None


def _pax(
    body: bytes, shard: str, offset: int, last: str, path: str | None, size: int | None
) -> tuple[str | None, int | None]:
    """Reads `path` and `size` from PAX records of the form b'LENGTH KEY=VALUE\\n'."""
    at = 0
    try:
        while at < len(body) and body[at]:
            space = body.index(b" ", at, at + 20)
            length = int(body[at:space])
            if length <= space - at or at + length > len(body) or body[at + length - 1] != 0x0A:
                raise ValueError(length)
            key, _, value = body[space + 1 : at + length - 1].partition(b"=")
            if key == b"path":
                path = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                size = int(value)
            elif key.startswith(b"GNU.sparse"):
                raise _damage(shard, offset, last, "sparse member; only plain files are allowed", NOT_A_FILE)
            at += length
    except ValueError:
        raise _damage(shard, offset, last, "extended (PAX) header cannot be read", EXTENDED) from None
    if size is not None and size < 0:
        raise _damage(shard, offset, last, f"negative size {size}", EXTENDED)
    return path, size


def _safe_name(name: str, shard: str, offset: int) -> str:
    while name.startswith("./"):
        name = name[2:]
    if name.startswith("/") or ".." in name.split("/"):
        cause = f"{shard}: member {name!r} at byte {offset} leaves its folder"
        raise ShardDamage(cause, REPLACE_SHARD, "the name leaves its folder", UNSAFE_NAME, offset, name)
    return name


def _cut_reason(offset: int, end: int, block: bytes) -> str:
    if offset == end:
        return "no end-of-archive marker: the file was cut at a member border"
    if not any(block):
        return f"no end-of-archive marker: {len(block)} zero bytes at the end, less than a block"
    return f"a header of {len(block)} instead of {BLOCK} bytes: the file was cut"


def _check_trailer(read: Read, offset: int, end: int, shard: str, last: str) -> None:
    """Everything after the end marker must be zero: a hole in the middle of a file looks like its end."""
    at = offset
    while at < end:
        piece = read(at, min(1 << 20, end - at))
        if not piece:
            raise _damage(shard, at, last, "the file became shorter while it was read", "changed")
        rest = piece.lstrip(b"\0")
        if rest:
            at += len(piece) - len(rest)
            problem = f"data after the end-of-archive marker at byte {offset}"
            raise _damage(shard, at, last, problem, "zeros")
        at += len(piece)
    if end - offset > MAX_TRAILER:
        problem = f"{end - offset} zero bytes at the end, more than one record of padding"
        raise _damage(shard, offset, last, problem, "zeros")


def _not_a_tar(block: bytes) -> str:
    if block[:2] == b"\x1f\x8b":
        return "gzip data under the name of a plain tar"
    if block.lstrip()[:1] == b"<":
        return "a web page, not a tar file"
    return "not a tar file (bad header checksum at byte 0)"


def _cure_not_a_tar(block: bytes) -> str:
    if block[:2] == b"\x1f\x8b":
        return "decompress it (gunzip), or rename it to .tar.gz to read it as a stream without an exact order"
    return REPLACE_SHARD


def _damage(
    shard: str, offset: int, last: str, problem: str, kind: str, member: str | None = None
) -> ShardDamage:
    """member: the one concerned, None: only the last one before is known."""
    after = f", after member {last!r}" if last else ""
    cause = f"{shard}: {problem}, at byte {offset}{after}"
    return ShardDamage(cause, REPLACE_SHARD, problem, kind, offset, last if member is None else member)


def next_header(read: Read, begin: int, end: int) -> int | None:
    """Returns the first byte from `begin` on where a whole, valid header stands, at any alignment, or None.

    Found by their magic: headers of the format before ustar are not.
    """
    at, length = max(0, begin), _FIRST_SEARCH
    while at < end:
        piece = read(at, min(length + BLOCK, end - at))
        length = min(4 * length, _SEARCH)
        found = piece.find(MAGIC)
        while found >= 0:
            header = at + found - _MAGIC_AT
            if header >= begin and is_header(read(header, min(BLOCK, end - header))):
                return header
            found = piece.find(MAGIC, found + 1)
        if len(piece) <= BLOCK:
            break
        at += len(piece) - BLOCK
    return None


def is_header(block: bytes) -> bool:
    """Returns whether a block is a header whose checksum and size can be read."""
    try:
        return len(block) == BLOCK and any(block) and bool(_parse(block, "", 1, "").kind)
    except DataError:
        return False


def is_extended(block: bytes) -> bool:
    """Returns whether a block, valid or not, looks like a header about the member after it."""
    marked = block[_MAGIC_AT : _MAGIC_AT + len(MAGIC)] == MAGIC
    return marked and len(block) == BLOCK and block[156] in _EXTENDED
