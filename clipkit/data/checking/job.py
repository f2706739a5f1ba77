"""The check of a set of shards: every shard on its own, then what only the set as a whole can show."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clipkit.data.checking.beside import rules_beside, set_findings, stated_beside
from clipkit.data.checking.findings import ERROR, NOTE, Finding
from clipkit.data.checking.samples import SampleRules
from clipkit.data.checking.shard import (
    AGAINST_LISTS,
    CHANGED,
    OUT_OF_REACH,
    Stated,
    check_of_record,
    check_shard,
    samples_of,
)
from clipkit.data.curation.tables import shard_labels
from clipkit.data.engine import Engine
from clipkit.data.hash_counts import HashCounts, hashes_of
from clipkit.data.scan import Grouper, opened_shard
from clipkit.data.shard_records import OnShard, Record, ShardRecords, survey
from clipkit.data.tar_format import ShardDamage
from clipkit.redaction import redact

MAX_SHARED_KEYS = 100  # keys of several shards that are named


@dataclass
class SetCheck:
    """What the check of a set found: counts, and the first findings.

    counts   samples of every shard that was checked
    damaged  numbers of the shards with errors, among those that were checked
    torn     those of them with errors in themselves, and not only against files beside them
    changed  those whose bytes are not what the manifest lists
    kinds    (severity, kind) -> findings
    """

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    counts: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    torn: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """Findings that training would stop at or reject."""
        return sum(count for (severity, _), count in self.kinds.items() if severity == ERROR)

    @property
    def notes(self) -> int:
        """Findings that are only worth knowing."""
        return sum(count for (severity, _), count in self.kinds.items() if severity == NOTE)


def records_beside(report: Path | None, rules: SampleRules) -> ShardRecords:
    """Returns the records of a check, kept beside its report until that is whole."""
    folder = None if report is None else report.with_name(f"{report.name}.parts")
    return ShardRecords(folder, {"job": "check-shards 1", **asdict(rules)})


def check_parts(shards: Sequence[str], rules: SampleRules) -> list[tuple[str, SampleRules, Stated]]:
    """Returns every shard with the rules that hold there and what files beside it state."""
    return list(zip(shards, rules_beside(shards, rules), stated_beside(shards), strict=True))


def check_set(
    shards: Sequence[str],
    numbers: range,
    rules: SampleRules,
    engine: Engine,
    *,
    report: Path | None = None,
    show: int = 50,
    on_shard: OnShard | None = None,
) -> SetCheck:
    """Checks the shards `numbers` of a set; returns the counts and the first `show` findings.

    `report` gets one JSON line per finding once the whole set was checked; a part of the set leaves its
    records beside it, for the call that is given the whole.
    """
    records = records_beside(report, rules)
    chosen = [shards[number] for number in numbers]
    parts = check_parts(chosen, rules)
    found = SetCheck()
    lines = _checked(found, parts, engine, records, on_shard, show)
    whole = len(numbers) == len(shards)
    if report is None or not whole:
        for _ in lines(chosen, whole):
            pass
        return found
    # A fixed name among the records: what a killed check leaves is used or removed by the next.
    assert records.folder is not None
    records.folder.mkdir(parents=True, exist_ok=True)
    temporary = records.folder / "report"
    with temporary.open("wb") as file:
        for finding in lines(chosen, whole):
            file.write(json.dumps(finding.record(), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, report)
    records.clear()
    return found


def _checked(
    found: SetCheck,
    parts: Sequence[tuple[str, SampleRules, Stated]],
    engine: Engine,
    records: ShardRecords,
    on_shard: OnShard | None,
    show: int,
) -> Callable[[Sequence[str], bool], Iterator[Finding]]:
    """Returns what yields the findings of all parts, then of the set, and counts them into `found`."""

    def count(finding: Finding) -> Finding:
        found.kinds[finding.severity, finding.kind] += 1
        if len(found.first) < show:
            found.first.append(finding)
        return finding

    def lines(shards: Sequence[str], whole: bool) -> Iterator[Finding]:
        keys = HashCounts(groups=True)
        for number, record in enumerate(survey(_check_record, parts, engine, records, on_shard)):
            check = check_of_record(record)
            found.shards += 1
            found.samples += check.samples
            found.bytes += check.size
            keys.add(check.keys, number)
            found.counts.append(check.samples)
            kinds = check.error_kinds
            for numbers, wanted in (
                (found.damaged, kinds),
                (found.torn, kinds - AGAINST_LISTS),
                (found.changed, kinds & {CHANGED}),
            ):
                if wanted:
                    numbers.append(number)
            for finding in check.findings:
                yield count(finding)
            for what, more in check.more.items():
                severity, _, kind = what.partition(": ")
                found.kinds[severity, kind] += more
                text = f"{more:,} more of the kind {kind!r} in this shard are counted, not listed"
                yield Finding(check.shard, "more findings", text, severity=severity)
        for finding in _shared_keys(shards, keys):
            yield count(finding)
        for finding in set_findings(shards) if whole else ():
            yield count(finding)

    return lines


def _check_record(path: str, rules: SampleRules, stated: Stated) -> Record:
    return check_shard(path, rules, stated).record()


def _shared_keys(shards: Sequence[str], keys: HashCounts) -> Iterator[Finding]:
    """Keys in several shards: two samples in training, told apart by their shards."""
    total, shared = keys.in_several_groups(MAX_SHARED_KEYS)
    named = dict(shared)
    labels = shard_labels(shards) if shared else []
    names: dict[int, tuple[str, int]] = {}
    # The hashes were kept, not the keys: the last shard of each is walked again for its name.
    for number in sorted({groups[-1] for groups in named.values()}):
        names |= _keys_of(shards[number], {key for key, groups in named.items() if groups[-1] == number})
    for key, groups in sorted(
        named.items(), key=lambda entry: (entry[1][-1], names.get(entry[0], ("", 0))[1])
    ):
        member, byte = names.get(key, ("", 0))
        others = ", ".join(labels[number] for number in groups[:-1][:5])
        yield Finding(
            redact(shards[groups[-1]]),
            "key in several shards",
            f"also in {others}",
            member,
            byte,
            severity=NOTE,
        )
    if total > len(named):
        sampled = f" (of every {1 << keys.level}th key)" if keys.level else ""
        text = f"{total - len(named):,} more keys stand in several shards{sampled}"
        yield Finding(redact(shards[0]), "key in several shards", text, severity=NOTE)


def _keys_of(shard: str, wanted: set[int]) -> dict[int, tuple[str, int]]:
    """Returns hash -> (key, byte) of the wanted keys of a shard."""
    found: dict[int, tuple[str, int]] = {}

    def passed_over(_: ShardDamage) -> None:
        """Listed before."""

    try:
        with opened_shard(shard) as opened:
            for span in samples_of(opened, Grouper(shard, passed_over), passed_over):
                key = int(hashes_of([span.key.encode("utf-8", "surrogateescape")])[0])
                if key in wanted:
                    found[key] = span.key, span.start
    except OUT_OF_REACH:
        return found  # it was there a moment ago; the finding goes without the name
    return found


def describe_rules(rules: SampleRules) -> str:
    """Returns what is looked at, in words."""
    captions = ", ".join(rules.captions)
    if not rules.decode:
        return "headers only: names and sizes, no hashes; nothing is decoded"
    return f"every image decoded (up to {rules.max_pixels:,} pixels), captions in {captions}"
