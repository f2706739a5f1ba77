"""Clean copies of damaged shards: what is whole is written again, what is not is listed. Originals stay."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipkit.data.checking.beside import COUNTER, rules_beside
from clipkit.data.checking.findings import writable
from clipkit.data.checking.job import SetCheck
from clipkit.data.checking.samples import SampleRules
from clipkit.data.checking.shard import is_dotted, samples_of
from clipkit.data.engine import Engine
from clipkit.data.fingerprints import shard_inputs
from clipkit.data.finished import ELSEWHERE, Ended, Finished, is_whole, storing
from clipkit.data.http_ranges import Transient
from clipkit.data.scan import DOTTED, KEY_TWICE, Grouper, OpenShard, SampleSpan, opened_shard
from clipkit.data.shard_folder import SUMMARIES, refuse_source, shards_in
from clipkit.data.shard_records import OnShard
from clipkit.data.shards import (
    ShardRecord,
    finish_train_shards,
    remove_left,
    write_copied_shard,
    write_text,
)
from clipkit.data.source import Unreadable, is_remote
from clipkit.data.tar_format import Member, ShardDamage
from clipkit.data.tar_index import replacing
from clipkit.redaction import redact
from clipkit.types import ConfigError, DataError

DROPPED = "dropped.jsonl"


@dataclass(frozen=True)
class Repaired:
    """What a repair wrote: shards written again, shards taken over as they were, and so on."""

    rewritten: int
    taken_over: int
    samples: int
    dropped: int
    lost: tuple[str, ...]


def check_destination(shards: Sequence[str], out: Path) -> None:
    """Raises ConfigError when a repair into `out` could touch an original or mix up shards."""
    refuse_source({out, *(_folder(shard, out) for shard in shards)}, shards, "--repair")
    names: dict[str, str] = {}
    for shard in shards:
        name = str(_target(shard, out))
        if writable(name) != name:
            raise ConfigError(f"{shard}: a manifest cannot hold this name", "give the file a name in UTF-8")
        if name in names:
            raise ConfigError(
                f"{names[name]} and {shard} have the same name", "repair one folder of shards at a time"
            )
        names[name] = shard
    _texts(shards, out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--repair {out} is not a folder", "choose a folder")


def repair_set(
    shards: Sequence[str],
    check: SetCheck,
    rules: SampleRules,
    out: Path,
    engine: Engine,
    on_shard: OnShard | None = None,
) -> Repaired:
    """Writes clean copies of the damaged shards into `out`, beside hard links to (or copies of) the others.

    check: that of the whole set. Repeated after an interruption it continues, and after its end it does
    nothing. Raises ConfigError for a folder that holds other shards, Unreadable for a shard that is out of
    reach now, DataError when nothing is kept.
    """
    check_destination(shards, out)
    ended = _begin(shards, rules, out)
    if ended is not None:
        return Repaired(**{**ended.result, "lost": tuple(ended.result["lost"])})
    with storing(out):
        return _repair_set(shards, check, rules, out, engine, on_shard)


def repaired(shards: Sequence[str], rules: SampleRules, out: Path) -> Ended | None:
    """Returns what a repair of these shards left in `out`, None when there is something to do.

    Nothing is written. Raises ConfigError for a folder that holds other shards.
    """
    return _begin(shards, rules, out, take=False)


def _begin(shards: Sequence[str], rules: SampleRules, out: Path, take: bool = True) -> Ended | None:
    folders = sorted({_folder(shard, out) for shard in shards})
    return _records(shards, rules, out).begin(shards_in(folders), take=take, cure=ELSEWHERE)


def _records(shards: Sequence[str], rules: SampleRules, out: Path) -> Finished:
    rules_of = rules_beside(shards, rules)
    # The classes that a label may name are told by a file beside the shards.
    inputs = [
        [*facts, rule.evaluation, rule.classes]
        for facts, rule in zip(_identities(shards), rules_of, strict=True)
    ]
    options = {"caption": list(rules.captions), "max-pixels": rules.max_pixels}
    return Finished(out, {"job": "check-shards --repair", "options": options, "inputs": inputs})


def _repair_set(
    shards: Sequence[str],
    check: SetCheck,
    rules: SampleRules,
    out: Path,
    engine: Engine,
    on_shard: OnShard | None,
) -> Repaired:
    rules_of, finished = rules_beside(shards, rules), _records(shards, rules, out)
    broken = set(check.torn)
    pending = [n for n, shard in enumerate(shards) if not _is_done(finished.get(str(n)), _folder(shard, out))]
    jobs = (
        (shards[n], rules_of[n], str(_target(shards[n], out)), n in broken, check.counts[n]) for n in pending
    )
    for done, (number, record) in enumerate(
        zip(pending, engine.map(_repair_shard, jobs), strict=True), 1 + len(shards) - len(pending)
    ):
        finished.put(str(number), record)
        if on_shard is not None:
            on_shard(done, len(shards))
    records = [finished.get(str(number)) or {} for number in range(len(shards))]
    for number in check.changed:
        text = "kept as it is: which of its samples changed since the manifest was written cannot be told"
        line = {"shard": redact(shards[number]), "member": "", "byte": None, "kind": "bytes changed"}
        records[number]["dropped"].append({**line, "detail": text})
    repaired, outputs = _assemble(shards, records, out, broken)
    if len(repaired.lost) == len(shards):
        finished.clear()
        raise DataError(
            f"nothing in {len(shards):,} shard(s) could be kept; what was found is in {out / DROPPED}",
            "download or write them again",
        )
    finished.end(outputs, repaired.samples, asdict(repaired))
    return repaired


def _is_done(record: dict[str, Any] | None, folder: Path) -> bool:
    if record is None:
        return False
    written = record["shard"]
    return written is None or is_whole(folder / written["name"], written["bytes"])


def _assemble(
    shards: Sequence[str], records: list[dict[str, Any]], out: Path, broken: set[int]
) -> tuple[Repaired, list[Path]]:
    """Writes what stands beside the shards; returns what was done, and all files that were written."""
    count = 0
    with replacing(out / DROPPED) as file:
        for record in records:
            for line in record["dropped"]:
                count += 1
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    folders: dict[Path, list[ShardRecord]] = {}
    for shard, record in zip(shards, records, strict=True):
        kept = folders.setdefault(_folder(shard, out), [])
        if record["shard"] is not None:
            kept.append(ShardRecord(**record["shard"]))
    outputs = [out / DROPPED]
    for folder, kept in folders.items():
        outputs += [folder / record.name for record in kept]
        if kept:
            outputs += _finish(folder, kept, shards, out)
    lost = tuple(shard for shard, record in zip(shards, records, strict=True) if record["shard"] is None)
    taken = len(shards) - len(broken)
    total = sum(record.samples for kept in folders.values() for record in kept)
    return Repaired(len(broken) - len(lost), taken, total, count, lost), outputs


def _finish(folder: Path, kept: list[ShardRecord], shards: Sequence[str], out: Path) -> list[Path]:
    """Writes the lists beside the shards of one folder, and returns them."""
    if folder == out:
        finish_train_shards(folder, kept)
        return [folder / name for name in SUMMARIES]
    # An evaluation set: its texts stand beside its splits, and shards are counted from 0.
    remove_left(folder)
    write_text(folder / COUNTER, f"{len(kept)}\n")
    texts = _texts(shards, out)
    for name, text in texts.items():
        shutil.copyfile(text, out / name)
    return [folder / COUNTER, *(out / name for name in texts)]


def _texts(shards: Sequence[str], out: Path) -> dict[str, Path]:
    """The text files of the evaluation sets by name. ConfigError where two sets differ in one."""
    found: dict[str, Path] = {}
    folders = (Path(shard).absolute().parent.parent for shard in shards if _folder(shard, out) != out)
    for folder in dict.fromkeys(folders):
        for text in sorted(folder.glob("*.txt")):
            first = found.setdefault(text.name, text)
            if first.read_bytes() != text.read_bytes():
                raise ConfigError(f"{first} and {text} differ", "repair one evaluation set at a time")
    return found


def _folder(shard: str, out: Path) -> Path:
    """Where the copy of a shard lies: in `out`, or in its split of a CLIP_benchmark set."""
    if is_remote(shard):
        return out
    folder = Path(shard).absolute().parent
    return out / folder.name if (folder / COUNTER).is_file() else out


def _target(shard: str, out: Path) -> Path:
    return _folder(shard, out) / os.path.basename(shard.partition("?")[0] if is_remote(shard) else shard)


def _identities(shards: Sequence[str]) -> list[list[Any]]:
    try:
        return shard_inputs(shards)
    except (DataError, Transient):
        if len(shards) == 1:
            return [[redact(shards[0])]]  # what is out of reach is for the check to say
    return [facts for shard in shards for facts in _identities([shard])]


def _repair_shard(shard: str, rules: SampleRules, target: str, damaged: bool, samples: int) -> dict[str, Any]:
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not damaged:
        return {"shard": vars(_take_over(shard, path, samples)), "dropped": []}
    salvage = _Salvage(shard, rules)
    try:
        with opened_shard(shard) as opened:
            kept = list(salvage.samples(opened))
    except Unreadable:
        raise
    except OSError as error:
        # A storage that fails now may answer later: a copy without this shard would look clean.
        raise Unreadable(
            f"{shard}: cannot be read ({error.strerror or error})",
            "bring it back and start the same command again: it continues; or leave this shard out",
        ) from error
    except DataError as error:
        salvage.drop("", "unreadable", error.cause, None)
        kept = []
    written = None
    if kept:
        # Not in the block above: a full disk ends the repair, and is no reason to leave a shard out.
        with opened_shard(shard) as opened:
            written = write_copied_shard(path, salvage.contents(kept, opened))
    if written is None and rules.evaluation:
        raise DataError(
            f"{shard}: no sample in it is whole, and the shards of an evaluation set are numbered",
            "fetch this shard again",
        )
    return {"shard": None if written is None else vars(written), "dropped": salvage.dropped}


def _take_over(shard: str, path: Path, samples: int) -> ShardRecord:
    """A hard link costs no storage; other file systems and remote storage get a copy."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    linked = False
    if not is_remote(shard):
        with contextlib.suppress(OSError):
            os.link(os.path.realpath(shard), temporary)
            linked = True
    state = hashlib.sha256()
    with opened_shard(shard) as opened, contextlib.ExitStack() as stack:
        copy = None if linked else stack.enter_context(temporary.open("wb"))
        for at in range(0, opened.size, 4 << 20):
            piece = opened.read(at, min(4 << 20, opened.size - at))
            state.update(piece)
            if copy is not None:
                copy.write(piece)
        size = opened.size
    os.replace(temporary, path)
    # Replacing a file by a link to itself leaves both names.
    temporary.unlink(missing_ok=True)
    return ShardRecord(path.name, samples, size, state.hexdigest())


class _Salvage:
    """The samples of one damaged shard that can be kept, and what cannot."""

    def __init__(self, shard: str, rules: SampleRules) -> None:
        self.dropped: list[dict[str, Any]] = []
        self._shard, self._rules = shard, rules

    def drop(self, member: str, kind: str, detail: str, byte: int | None) -> None:
        """Lists what is not kept."""
        line = {"shard": redact(self._shard), "member": member, "byte": byte, "kind": kind, "detail": detail}
        self.dropped.append(
            {name: writable(value) if isinstance(value, str) else value for name, value in line.items()}
        )

    def samples(self, opened: OpenShard) -> Iterator[SampleSpan]:
        """Yields the samples that training takes, members that stood apart put together."""

        def damage(found: ShardDamage) -> None:
            # What concerns names is settled below, sample by sample.
            if found.kind not in (KEY_TWICE, DOTTED):
                self.drop(found.member, found.kind, found.problem, found.offset)

        if opened.size == 0:
            self.drop("", "empty file", "0 bytes", 0)
            return
        grouper = Grouper(self._shard, damage)
        found = self._joined(samples_of(opened, grouper, damage))
        if not found and not self.dropped:
            self.drop("", "no sample", "the tar is whole, and holds no sample", None)
        if grouper.ignored:
            text = f"{grouper.ignored} members that belong to no sample"
            self.drop("", "unread members", text, None)
        taken = {span.key for span in found}
        for span in found:
            for candidate in _without_dots(span, taken) if is_dotted(span) else [span]:
                if self._is_good(candidate, opened):
                    yield candidate

    def _is_good(self, span: SampleSpan, opened: OpenShard) -> bool:
        problems = [problem for problem in self._rules.problems(span, opened.read) if problem.error]
        for problem in problems:
            member = problem.member
            self.drop(member.name, problem.kind, f"sample left out: {problem.detail}", member.start)
        if problems:
            return False
        # webdataset's writer passes over these without a word.
        for extension in [name for name in span.members if name.startswith("_")]:
            member = span.members.pop(extension)
            self.drop(member.name, "unread members", "extensions cannot begin with _", member.start)
        return True

    def _joined(self, spans: Iterator[SampleSpan]) -> list[SampleSpan]:
        """One sample per key: runs with different members are one, else the first run is kept."""
        first: dict[str, SampleSpan] = {}
        for span in spans:
            earlier = first.setdefault(span.key, span)
            if earlier is span:
                continue
            if earlier.members.keys() & span.members.keys():
                name = next(iter(span.members.values())).name
                self.drop(name, KEY_TWICE, "sample left out: the first of this key is kept", span.start)
            else:
                earlier.members.update(span.members)
        return list(first.values())

    def contents(
        self, spans: Sequence[SampleSpan], opened: OpenShard
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yields key and members of each sample, read when they are asked for."""
        for span in spans:
            yield span.key, {name: opened.read(at.data, at.size) for name, at in span.members.items()}


def _without_dots(span: SampleSpan, taken: set[str]) -> list[SampleSpan]:
    """The samples that fell into one: the key ends at the last dot, and `_` stands for the others."""
    keys = {"": span.key}
    parts: dict[str, dict[str, Member]] = {}
    for extension, member in span.members.items():
        stem, _, last = extension.rpartition(".")
        if stem not in keys:
            key = f"{span.key}_{stem.replace('.', '_')}"
            while key in taken:
                key += "_"
            keys[stem] = key
            taken.add(key)
        parts.setdefault(keys[stem], {})[last] = member
    return [SampleSpan(key, span.start, span.end, members) for key, members in parts.items()]
