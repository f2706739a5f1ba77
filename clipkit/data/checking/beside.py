"""What lies beside shards and speaks of them: counts and hashes, indices, the CLIP_benchmark layout."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipkit.data.checking.findings import NOTE, Finding
from clipkit.data.checking.samples import SampleRules
from clipkit.data.checking.shard import Stated
from clipkit.data.options import DEFAULT_STORAGE
from clipkit.data.source import is_remote, plain_shards
from clipkit.data.stated_counts import stated_counts
from clipkit.data.tar_index import Index, saved_indices

COUNTER = "nshards.txt"
_NUMBERED = re.compile(r"(.*?)(\d+)(\.tar)", flags=re.IGNORECASE)
_MANY = 10  # numbers or names in one line


def find_shards(specs: Sequence[str]) -> list[str]:
    """Returns the shards that are meant: as everywhere, and of a CLIP_benchmark folder those of its splits.

    Raises ConfigError for shards that cannot be read by random access.
    """
    wanted: list[str] = []
    for spec in specs:
        splits = (
            sorted(found.parent for found in Path(spec).glob(f"*/{COUNTER}")) if os.path.isdir(spec) else []
        )
        whole = splits and not any(name.lower().endswith(".tar") for name in os.listdir(spec))
        wanted += map(str, splits) if whole else [spec]
    return plain_shards(wanted)


def rules_beside(shards: Sequence[str], rules: SampleRules) -> list[SampleRules]:
    """Returns the rules of every shard: those of the CLIP_benchmark layout beside an nshards.txt."""
    found: dict[str, SampleRules] = {}
    for shard in shards:
        folder = os.path.dirname(shard)
        if folder not in found:
            inside = not is_remote(shard) and (Path(folder) / COUNTER).is_file()
            found[folder] = (
                replace(rules, evaluation=True, classes=_num_classes(Path(folder))) if inside else rules
            )
    return [found[os.path.dirname(shard)] for shard in shards]


def _num_classes(split: Path) -> int | None:
    try:
        text = (split.absolute().parent / "classnames.txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    return len([line for line in text.split("\n") if line.strip()])


def stated_beside(shards: Sequence[str]) -> list[Stated]:
    """Returns what files beside each shard say about it; files that cannot be read say nothing."""
    manifests: dict[str, dict[str, Any]] = {}
    indexed: dict[str, dict[str, tuple[int, int, str]]] = {}
    found = []
    for shard, counts in stated_counts(shards, DEFAULT_STORAGE):
        if is_remote(shard):
            found.append(Stated(counts))
            continue
        folder, name = os.path.split(os.path.abspath(shard))
        if folder not in manifests:
            manifests[folder], indexed[folder] = _manifest(Path(folder)), _indexed(Path(folder))
        entry = manifests[folder].get(name, {})
        if isinstance(entry.get("samples"), int):
            counts["manifest.json"] = entry["samples"]
        sha, size = entry.get("sha256"), entry.get("bytes")
        found.append(
            Stated(
                counts,
                sha if isinstance(sha, str) else None,
                size if isinstance(size, int) else None,
                indexed[folder].get(os.path.join(folder, name)),
            )
        )
    return found


def _manifest(folder: Path) -> dict[str, Any]:
    entries = _json(folder / "manifest.json").get("shards")
    if not isinstance(entries, list):
        return {}
    return {str(entry.get("name")): entry for entry in entries if isinstance(entry, dict)}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _indexed(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Size, stamp and hash of the headers of every shard, as the newest index that holds it has them."""

    def age(index: Index) -> int:
        try:
            return os.stat(index.file or "").st_mtime_ns
        except OSError:
            return 0

    found: dict[str, tuple[int, int, str]] = {}
    for index in sorted(saved_indices(folder), key=age):
        facts = zip(index.shards, index.sizes.tolist(), index.stamps.tolist(), index.digests, strict=True)
        found |= {shard: (size, stamp, digest) for shard, size, stamp, digest in facts}
    return found


def set_findings(shards: Sequence[str]) -> Iterator[Finding]:
    """Yields what is wrong with a set as a whole: shards that are listed and not there, numbers left out."""
    folders: dict[str, list[str]] = {}
    for shard in shards:
        if not is_remote(shard):
            folders.setdefault(os.path.dirname(shard), []).append(os.path.basename(shard))
    for folder, names in folders.items():
        at = Path(folder)
        for file, listed in (
            ("sizes.json", list(_json(at / "sizes.json"))),
            ("manifest.json", list(_manifest(at))),
        ):
            gone = [name for name in listed if name not in names and not (at / name).exists()]
            for name in gone:
                yield Finding(str(at / name), "missing shard", f"{file} lists it, and it is not there")
        counter = at / COUNTER
        if counter.is_file():
            yield from _counted(counter, names)
        else:
            yield from _left_out(at, names)


def _counted(counter: Path, names: Sequence[str]) -> Iterator[Finding]:
    """CLIP_benchmark reads 0.tar to N-1.tar, N from this file."""
    try:
        number = int(counter.read_text(encoding="utf-8-sig").strip())
    except (OSError, ValueError):
        yield Finding(str(counter), "wrong count", "holds no number of shards")
        return
    there = {name for name in os.listdir(counter.parent) if _NUMBERED.fullmatch(name)} | set(names)
    gone = [f"{n}.tar" for n in range(min(number, len(there) + _MANY)) if f"{n}.tar" not in there]
    for name in gone[:_MANY]:
        yield Finding(str(counter.parent / name), "missing shard", f"{COUNTER} says {number} shards")
    if number < len(there):
        yield Finding(str(counter), "wrong count", f"says {number} shards, {len(there)} are there")


def _left_out(folder: Path, names: Sequence[str]) -> Iterator[Finding]:
    series: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            series.setdefault((match[1], match[3]), []).append(int(match[2]))
    for (before, _), numbers in series.items():
        there = sorted(set(numbers))
        gaps = [(a + 1, b - 1) for a, b in itertools.pairwise(there) if b > a + 1]
        if gaps:
            shown = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in gaps[:_MANY])
            more = f" and {len(gaps) - _MANY} more gaps" if len(gaps) > _MANY else ""
            text = f"no {before}N.tar for N = {shown}{more}"
            yield Finding(str(folder), "number left out", text, severity=NOTE)
