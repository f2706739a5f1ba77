"""The description of a set of shards, and the files it is written to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from clipkit.data.checking.beside import rules_beside
from clipkit.data.checking.samples import SampleRules
from clipkit.data.describing.page import page_of
from clipkit.data.describing.shard import Description, describe_shard
from clipkit.data.describing.summary import Summary, summarize
from clipkit.data.engine import Engine
from clipkit.data.hash_counts import MAX_HASHES
from clipkit.data.shard_records import OnShard, ShardRecords
from clipkit.data.shards import write_text

RESULT, PAGE = "stats.json", "stats.html"


def records_in(out: Path | None, description: Description) -> ShardRecords:
    """Returns the records of a description, kept in `out` until it is whole."""
    return ShardRecords(out, {"job": "stats 1", **asdict(description)})


def parts_of(shards: Sequence[str], description: Description) -> list[tuple[str, Description]]:
    """Returns every shard with what is described there: lines are captions in the CLIP_benchmark layout."""
    rules = rules_beside(shards, SampleRules())
    return [
        (shard, replace(description, lines=rule.evaluation))
        for shard, rule in zip(shards, rules, strict=True)
    ]


def describe_set(
    shards: Sequence[str],
    numbers: range,
    description: Description,
    engine: Engine,
    *,
    out: Path | None = None,
    title: str = "shards",
    on_shard: OnShard | None = None,
    max_hashes: int = MAX_HASHES,
) -> Summary:
    """Returns the numbers of the shards `numbers` of a set.

    `out` gets stats.json and stats.html once the whole set was described; a part of the set leaves its
    records there, for the call that is given the whole. Raises DataError for damaged shards.
    """
    records = records_in(out, description)
    parts = parts_of([shards[number] for number in numbers], description)
    summary = summarize(parts, describe_shard, engine, records, on_shard, max_hashes)
    if out is not None and len(numbers) == len(shards):
        out.mkdir(parents=True, exist_ok=True)
        result = {**summary.result(), "dataset": title}
        write_text(out / RESULT, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        write_text(out / PAGE, page_of(summary, title))
        records.clear()
    return summary
