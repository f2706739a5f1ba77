"""The numbers of a set, put together from those of its shards, and as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clipkit.data.describing.shard import HASHED, Description
from clipkit.data.engine import Engine
from clipkit.data.hash_counts import MAX_HASHES, HashCounts, hashes_of, of_text
from clipkit.data.shard_records import OnShard, Record, ShardRecords, survey
from clipkit.types import DataError

MEASURES = {
    "words": "words per caption",
    "characters": "characters per caption",
    "tokens": "tokens per caption",
    "captions per sample": "captions per sample",
    "width": "width, pixels",
    "height": "height, pixels",
    "short side": "shorter side, pixels",
    "aspect": "width by height",
    "image bytes": "bytes per image",
}
NAMED = ("formats", "modes", "extensions")
QUANTILES = {"5 %": 0.05, "median": 0.5, "95 %": 0.95}
_FREQUENT_SHOWN = 10
_SHOWN = 8  # scripts, formats and so on that have a number of their own on the terminal
_CANDIDATES = 10_000

Histogram = Counter[float]


@dataclass
class Summary:
    """The numbers of a set. tokens: script -> histogram; frequent: captions and how often each occurs."""

    description: Description
    shards: int = 0
    samples: int = 0
    described: int = 0
    bytes: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    tokens: dict[str, Histogram] = field(default_factory=dict)
    hashes: dict[str, HashCounts] = field(default_factory=dict)
    frequent: list[tuple[str, int]] = field(default_factory=list)

    def histogram(self, measure: str) -> Histogram:
        """Returns value -> times of one of MEASURES."""
        if measure == "tokens":
            whole: Histogram = Counter()
            for histogram in self.tokens.values():
                whole += histogram
            return whole
        return Counter({float(value): times for value, times in self.counts.get(measure, {}).items()})

    def cut(self, script: str | None = None) -> tuple[int, int]:
        """Returns (captions longer than the context, captions), of one script or of all."""
        histogram = self.histogram("tokens") if script is None else self.tokens[script]
        context = self.description.tokens.context
        return sum(times for value, times in histogram.items() if value > context), histogram.total()

    def result(self) -> dict[str, Any]:
        """Returns everything as JSON-able values."""
        cut, captions = self.cut()
        return {
            "task": "data stats",
            "metrics": {
                **{name: spread(self.histogram(name)) for name in MEASURES},
                "truncated captions": share_of(cut, captions),
                "truncated captions by script": {
                    script: {"captions": self.cut(script)[1], "truncated": share_of(*self.cut(script))}
                    for script in self.scripts()
                },
                "duplicates": {
                    name: {"share": share_of(*counts.repeated()), "looked at": counts.repeated()[1]}
                    for name, counts in self.hashes.items()
                },
                "most frequent captions": [list(entry) for entry in self.frequent],
                **{name: dict(self.counts[name].most_common()) for name in NAMED},
                "turned by EXIF": self.counts["turned"].total(),
                "unusable": dict(self.counts["unusable"].most_common()),
            },
            "counts": {
                "shards": self.shards, "samples": self.samples, "described": self.described,
                "captions": captions, "bytes": self.bytes,
            },
            "protocol": {
                **asdict(self.description),
                "duplicates": "exact, by 64-bit hashes of caption text, image bytes, and both",
                "hashes of every": {name: 1 << counts.level for name, counts in self.hashes.items()},
                "script": "of most letters of a caption; no language model",
            },
        }  # fmt: skip

    def scripts(self) -> list[str]:
        """Returns the scripts, those of most captions first."""
        return sorted(self.tokens, key=lambda script: (-self.tokens[script].total(), script))


def summarize(
    parts: Sequence[tuple[str, Description]],
    describe: Any,
    engine: Engine,
    records: ShardRecords,
    on_shard: OnShard | None = None,
    max_hashes: int = MAX_HASHES,
) -> Summary:
    """Describes the shards and returns their numbers together. Raises DataError without a usable sample."""
    whole = Summary(parts[0][1], hashes={name: HashCounts(max_hashes) for name in HASHED})
    candidates: Counter[str] = Counter()
    for record in survey(describe, parts, engine, records, on_shard):
        _add(whole, record, candidates)
    if not whole.described:
        why = ", ".join(whole.counts.get("unusable", ())) or "no sample"
        raise DataError(
            f"none of {whole.samples:,} samples has an image and a caption ({why})",
            "give shards for training, or name the caption field by --caption",
        )
    whole.frequent = _most_frequent(whole.hashes["caption"], candidates)
    return whole


def _add(whole: Summary, record: Record, candidates: Counter[str]) -> None:
    whole.shards += 1
    whole.samples += record["samples"]
    whole.described += record["described"]
    whole.bytes += record["size"]
    for name, counts in record["counts"].items():
        whole.counts.setdefault(name, Counter()).update(counts)
    for script, counts in record["tokens"].items():
        into = whole.tokens.setdefault(script, Counter())
        into.update({float(value): times for value, times in counts.items()})
    for name, text in record["hashes"].items():
        whole.hashes[name].add(of_text(text))
    for text, times in record["frequent"]:
        candidates[text] += times
    if len(candidates) > 2 * _CANDIDATES:
        kept = dict(candidates.most_common(_CANDIDATES))
        candidates.clear()
        candidates.update(kept)


def _most_frequent(hashes: HashCounts, candidates: Counter[str]) -> list[tuple[str, int]]:
    """Of the captions that were frequent in a shard, those that the hashes count most often."""
    texts = [text for text, _ in candidates.most_common(_CANDIDATES)]
    times = hashes.times(hashes_of(text.encode() for text in texts)).tolist()
    # Beyond the limit of memory most hashes are not there: the shards' own counts are the least it can be.
    best = [(text, max(count, candidates[text])) for text, count in zip(texts, times, strict=True)]
    best.sort(key=lambda entry: (-entry[1], entry[0]))
    return [entry for entry in best if entry[1] > 1][:_FREQUENT_SHOWN]


def share_of(part: int, total: int) -> float | None:
    """Returns the share rounded to six digits, None of nothing."""
    return round(part / total, 6) if total else None


def quantile(histogram: Mapping[float, int], share: float) -> float:
    """Returns the smallest value that at least this share of all does not exceed."""
    total = sum(histogram.values())
    passed = 0
    for value in sorted(histogram):
        passed += histogram[value]
        if passed >= share * total:
            break
    return value


def spread(histogram: Mapping[float, int]) -> dict[str, float] | None:
    """Returns least, quantiles, most and mean; None of nothing."""
    total = sum(histogram.values())
    if not total:
        return None
    mean = sum(value * times for value, times in histogram.items()) / total
    quantiles = {name: quantile(histogram, share) for name, share in QUANTILES.items()}
    return {"least": min(histogram), **quantiles, "most": max(histogram), "mean": round(mean, 4)}


def rows_of(summary: Summary) -> list[list[str]]:
    """Returns the rows of the table of measures, its head first."""
    rows = [["", "least", *QUANTILES, "most", "mean"]]
    for name, words in MEASURES.items():
        found = spread(summary.histogram(name))
        if found is not None:
            rows.append(
                [words, *(f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in found.values())]
            )
    return rows


def lines_of(summary: Summary) -> Iterable[str]:
    """Yields what a table of measures cannot say."""
    context = summary.description.tokens.context
    cut, captions = summary.cut()
    yield f"longer than {context} tokens, cut in training: {_share(cut, captions)} of {captions:,} captions"
    if len(summary.tokens) > 1:
        totals = {script: summary.cut(script)[1] for script in summary.scripts()}
        cuts = {script: summary.cut(script)[0] for script in totals}
        for script, total in shown(totals, _SHOWN):
            part = cuts.pop(script, None)
            # What is summed up comes last: its cuts are those that are left.
            part, name = (sum(cuts.values()), f"{script} scripts") if part is None else (part, script)
            yield f"  {name}: {_share(part, total)} of {total:,}"
    for name, counts in summary.hashes.items():
        again, seen = counts.repeated()
        sampled = f" (every {1 << counts.level}th was looked at)" if counts.level else ""
        yield f"duplicate {name}s: {_share(again, seen)} of {counts.seen:,}{sampled}"
    for text, times in summary.frequent[:3]:
        yield f"  {times:,} x {text[:80]}"
    for name in NAMED:
        yield f"{name}: " + ", ".join(
            f"{what} {times:,}" for what, times in shown(summary.counts[name], _SHOWN)
        )
    if summary.counts["turned"]:
        yield f"turned by EXIF, which training does not apply: {summary.counts['turned'].total():,} images"
    for reason, times in shown(summary.counts["unusable"], _SHOWN):
        yield f"not usable: {times:,} x {reason}"


def shown(counts: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    """Returns the largest counts, and as a last entry how many others there are with their sum."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    rest = ordered[most:]
    return ordered[:most] + ([(f"{len(rest):,} more", sum(times for _, times in rest))] if rest else [])


def _share(part: int, total: int) -> str:
    return f"{part / total:.2%}" if total else "none"
