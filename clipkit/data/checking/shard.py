"""The check of one shard: the bytes, the tar, the samples, in one pass over its headers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipkit.data.checking.findings import ERROR, NOTE, Finding, of_record, writable
from clipkit.data.checking.samples import SampleRules
from clipkit.data.checking.walking import walk_damaged
from clipkit.data.hash_counts import Hashes, hashes_of, of_text, to_text
from clipkit.data.http_ranges import Transient
from clipkit.data.scan import DOTTED, KEY_TWICE, Grouper, OpenShard, SampleSpan, opened_shard
from clipkit.data.tar_format import IMAGE_EXTENSIONS, ShardDamage, split_name
from clipkit.redaction import redact
from clipkit.types import DataError

MAX_FINDINGS = 10_000  # of one shard; more are counted by kind
OUT_OF_REACH = (OSError, DataError, Transient)
_PIECE = 4 << 20
CHANGED = "bytes changed"
# Errors between a shard and files beside it: the shard itself may be whole.
AGAINST_LISTS = {CHANGED, "wrong count", "changed after indexing"}
_MISSING = ("missing image", "missing caption")


@dataclass(frozen=True)
class Stated:
    """What files beside a shard say about it. sha256 from the manifest; indexed: (size, stamp, digest)."""

    counts: Mapping[str, int] = field(default_factory=dict)
    sha256: str | None = None
    bytes: int | None = None
    indexed: tuple[int, int, str] | None = None


@dataclass
class ShardCheck:
    """What the check of one shard found.

    samples    runs of members with one key, damaged ones included
    more       findings beyond the limit, by "severity: kind"
    keys       hashes of the keys
    """

    shard: str
    size: int = 0
    stamp: int = 0
    samples: int = 0
    findings: list[Finding] = field(default_factory=list)
    more: Counter[str] = field(default_factory=Counter)
    keys: Hashes = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    @property
    def error_kinds(self) -> set[str]:
        """The kinds of its errors; none: training takes every sample."""
        more = {
            kind for severity, _, kind in (what.partition(": ") for what in self.more) if severity == ERROR
        }
        return more | {finding.kind for finding in self.findings if finding.severity == ERROR}

    def record(self) -> dict[str, Any]:
        """Returns it as JSON-able values."""
        found = [finding.record() for finding in self.findings]
        return {**vars(self), "findings": found, "more": dict(self.more), "keys": to_text(self.keys)}


def check_of_record(record: Mapping[str, Any]) -> ShardCheck:
    """Returns what a record holds."""
    found = [of_record(finding) for finding in record["findings"]]
    return ShardCheck(
        **{**record, "findings": found, "more": Counter(record["more"]), "keys": of_text(record["keys"])}
    )


def check_shard(path: str, rules: SampleRules, stated: Stated) -> ShardCheck:
    """Returns everything that is wrong with one shard; a shard out of reach is a finding, too."""
    check = ShardCheck(writable(redact(path)))
    try:
        with opened_shard(path) as opened:
            check.size, check.stamp = opened.size, opened.stamp
            digest = _Checking(check, rules, opened).run()
            _compare(check, opened, stated, digest, rules.decode)
    except OUT_OF_REACH as error:
        cause = (
            error.cause if isinstance(error, DataError) else str(getattr(error, "strerror", None) or error)
        )
        check.findings.append(Finding(check.shard, "unreadable", cause.removeprefix(f"{path}: ")))
    check.findings.sort(key=lambda finding: -1 if finding.byte is None else finding.byte)
    return check


def samples_of(
    opened: OpenShard,
    grouper: Grouper,
    on_damage: Callable[[ShardDamage], None],
    on_header: Callable[[bytes], None] = lambda block: None,
) -> Iterator[SampleSpan]:
    """Yields the samples of a damaged shard; runs of members that stand apart are samples of their own."""
    for member in walk_damaged(grouper.shard, opened, on_damage, on_header):
        done = grouper.add(member)
        if done is not None:
            yield done
    done = grouper.close()
    if done is not None:
        yield done


def is_dotted(span: SampleSpan) -> bool:
    """Returns whether a sample has no image because a dot in the names ended its key too early."""
    return not span.members.keys() & set(IMAGE_EXTENSIONS) and any(
        extension.rpartition(".")[2] in IMAGE_EXTENSIONS for extension in span.members
    )


class _Checking:
    """One shard while it is checked."""

    def __init__(self, check: ShardCheck, rules: SampleRules, opened: OpenShard) -> None:
        self._check, self._rules, self._opened = check, rules, opened
        self._digest = hashlib.blake2b(digest_size=8)
        self._mixed: set[str] = set()  # keys whose members stand apart

    def run(self) -> str:
        """Fills the check; returns the hash of the headers, as an index holds it."""
        check = self._check
        if check.size == 0:
            self.add(Finding(check.shard, "empty file", "0 bytes", byte=0))
            return ""
        keys: list[str] = []
        grouper = Grouper(check.shard, self.damage)
        for span in samples_of(self._opened, grouper, self.damage, self._digest.update):
            keys.append(span.key)
            self.sample(span)
        check.samples = len(keys)
        check.keys = hashes_of(key.encode("utf-8", "surrogateescape") for key in keys)
        if not keys and not check.findings:
            self.add(Finding(check.shard, "no sample", "the tar is whole, and holds no sample"))
        if grouper.ignored:
            text = f"{grouper.ignored:,} members belong to no sample: hidden, or without an extension"
            self.add(Finding(check.shard, "unread members", text, severity=NOTE))
        # Halves of one sample miss each other: that is said once, as what it is.
        check.findings = [found for found in check.findings if not self._is_half(found)]
        return self._digest.hexdigest()

    def _is_half(self, finding: Finding) -> bool:
        parts = split_name(finding.member)
        return finding.kind in _MISSING and parts is not None and parts[0] in self._mixed

    def damage(self, damage: ShardDamage) -> None:
        """Takes damage of the tar or of its names."""
        parts = split_name(damage.member)
        if damage.kind == KEY_TWICE and parts is not None:
            self._mixed.add(parts[0])
        self.add(Finding(self._check.shard, damage.kind, damage.problem, damage.member, damage.offset))

    def sample(self, span: SampleSpan) -> None:
        """Takes what is wrong with one sample."""
        dotted = is_dotted(span)
        for problem in self._rules.problems(span, self._opened.read):
            kind, detail = problem.kind, problem.detail
            if dotted and kind == "missing image":
                kind, detail = DOTTED, f"read as sample {span.key!r} with {detail}"
            severity = ERROR if problem.error else NOTE
            member = problem.member
            self.add(Finding(self._check.shard, kind, detail, member.name, member.start, severity))

    def add(self, finding: Finding) -> None:
        """Keeps a finding, or counts it."""
        if len(self._check.findings) < MAX_FINDINGS:
            self._check.findings.append(finding)
        else:
            self._check.more[f"{finding.severity}: {finding.kind}"] += 1


def _compare(check: ShardCheck, opened: OpenShard, stated: Stated, digest: str, hashed: bool) -> None:
    """Compares the shard with what files beside it say."""

    def add(kind: str, detail: str, severity: str = ERROR) -> None:
        check.findings.append(Finding(check.shard, kind, detail, severity=severity))

    for file, count in stated.counts.items():
        if count != check.samples:
            add("wrong count", f"{check.samples} samples were found, {file} states {count}")
    if stated.bytes is not None and stated.bytes != check.size:
        add(CHANGED, f"{check.size} bytes, manifest.json lists {stated.bytes}")
    elif stated.sha256 is not None and hashed:
        found = _sha256(opened)
        if found != stated.sha256:
            add(CHANGED, f"sha256 {found[:16]}..., manifest.json lists {stated.sha256[:16]}...")
    if stated.indexed is not None:
        size, stamp, known = stated.indexed
        if (size, known) != (check.size, digest):
            add("changed after indexing", f"{check.size} bytes now, {size} then; headers differ")
        elif stamp != check.stamp:
            add("changed after indexing", "written to since; size and headers are the same", NOTE)


def _sha256(opened: OpenShard) -> str:
    state = hashlib.sha256()
    for at in range(0, opened.size, _PIECE):
        state.update(opened.read(at, min(_PIECE, opened.size - at)))
    return state.hexdigest()
