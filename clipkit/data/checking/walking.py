"""The walk over a damaged shard: what the strict walk would stop at is reported and passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from clipkit.data.scan import OpenShard
from clipkit.data.tar_format import (
    BLOCK,
    CLAIMS,
    EXTENDED,
    NOT_A_FILE,
    NOT_A_TAR,
    UNSAFE_NAME,
    Member,
    Read,
    ShardDamage,
    is_extended,
    is_header,
    next_header,
    walk,
)

# At these the header itself is whole: what stands before it is, too, and the search goes on behind it.
_WHOLE_HEADER = (CLAIMS, EXTENDED, NOT_A_FILE, UNSAFE_NAME)


def walk_damaged(
    path: str, opened: OpenShard, on_damage: Callable[[ShardDamage], None], on_header: Callable[[bytes], None]
) -> Iterator[Member]:
    """Yields the members that are whole; tells `on_damage` of everything between them.

    After damage it goes on at the next valid header, wherever that stands. A member whose payload holds the
    next header lost bytes, and is not yielded.
    """
    read, size, _ = opened
    begin, distrusted = 0, False
    while True:
        last: Member | None = None
        try:
            for member in walk(read, begin, size, path, whole=True, on_header=on_header):
                if last is not None:
                    yield last
                last = member
                if distrusted:
                    on_damage(_uncertain(path, member))
                    last, distrusted = None, False
            if last is not None:
                yield last
            return
        except ShardDamage as damage:
            following = _resume(read, size, damage, last)
            torn = last is not None and following is not None and following < _end(last)
            if last is not None and not torn:
                yield last
            on_damage(_placed(damage, following, size))
            if last is not None and torn:
                assert following is not None
                on_damage(_torn(path, last, following))
            if following is None:
                return
            block = read(damage.offset, BLOCK)
            begin, distrusted = following, is_extended(block) and damage.offset < following


def _resume(read: Read, size: int, damage: ShardDamage, last: Member | None) -> int | None:
    if damage.kind in _WHOLE_HEADER:
        return next_header(read, damage.offset + BLOCK, size)
    if last is None or is_header(read(damage.offset, BLOCK)):
        return next_header(read, damage.offset, size)
    # Bytes lost in a payload make the walk land too far: the next header stands inside what it passed over.
    return next_header(read, last.data, size)


def _end(member: Member) -> int:
    return member.data + -(-member.size // BLOCK) * BLOCK


def _placed(damage: ShardDamage, following: int | None, size: int) -> ShardDamage:
    kind, problem = damage.kind, damage.problem
    if following is not None:
        rest = f"the next valid header stands at byte {following}"
        if damage.kind == NOT_A_TAR:
            kind, problem = "bad header", "the first header cannot be read"
    else:
        lost = max(0, size - damage.offset)
        rest = f"no header follows in the {lost} bytes behind" if lost else "nothing follows"
    return ShardDamage(
        *(damage.cause, damage.cure, f"{problem}; {rest}"),
        *(kind, damage.offset, damage.member),
    )


def _torn(path: str, member: Member, following: int) -> ShardDamage:
    there = following - member.data
    problem = f"{member.size} bytes by its header, {there} before the next header"
    return ShardDamage(f"{path}: {problem}", "", problem, "torn member", member.start, member.name)


def _uncertain(path: str, member: Member) -> ShardDamage:
    problem = "the header before this member, which may hold its full name, is damaged"
    return ShardDamage(f"{path}: {problem}", "", problem, "uncertain name", member.start, member.name)
