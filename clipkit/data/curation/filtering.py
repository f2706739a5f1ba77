"""The filter: basic rules, score threshold, balance. Each rule looks at every sample; balance, which is about
the set that remains, looks at what the others keep.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.curation.balancing import entry_hashes, keep_probabilities, kept_rows
from clipkit.data.curation.rules import Plan, examine
from clipkit.data.curation.selection import (
    UNUSABLE,
    Summary,
    Target,
    summarize,
    unusable_rows,
    working,
    write_selection,
)
from clipkit.data.curation.survey import OnPart, Rows, Survey, key_of, rows_of
from clipkit.data.curation.tables import FORMATS, check_format, read_scores, shard_labels, written_table
from clipkit.data.curation.thresholds import top_threshold
from clipkit.data.engine import Engine
from clipkit.data.finished import Ended
from clipkit.data.preflight import fields_in, nearest_field
from clipkit.data.shards import ShardRecord
from clipkit.data.source import plain_shards
from clipkit.types import ConfigError, DataError

SAMPLES, SCORES = "samples", "scores"
SCORE, BALANCE = "score", "balance"


@dataclass(frozen=True)
class Choice:
    """What decides besides the basic rules.

    minimum         keep scores >= this; top: keep this fraction of the samples that have a score
    balance         t of MetaCLIP: captions per entry, None for no balancing
    keep_unmatched  whether captions that name no entry stay
    """

    minimum: float | None = None
    top: float | None = None
    balance: float | None = None
    keep_unmatched: bool = False
    seed: int = 0

    @property
    def scored(self) -> bool:
        """Whether scores decide."""
        return self.minimum is not None or self.top is not None

    def check(self, has_scores: bool) -> None:
        """Raises ConfigError for bounds that contradict each other."""
        if self.minimum is not None and self.top is not None:
            raise ConfigError("--min and --top exclude each other", "give a threshold or a fraction")
        if self.scored and not has_scores:
            raise ConfigError("--min and --top need scores", "name a model or a field with --clip-score")
        if self.top is not None and not 0 < self.top <= 1:
            raise ConfigError(
                f"--top {self.top} is not within 0..1", "give the fraction to keep, for example 0.3"
            )
        if self.minimum is not None and not math.isfinite(self.minimum):
            raise ConfigError(f"--min {self.minimum} is no score", "give a number, for example 0.28")
        if self.balance is not None and not self.balance > 0:
            raise ConfigError(
                f"--t {self.balance} is not positive", "give captions per entry, for example 20000"
            )


class FilterVerdicts:
    """What the filter decides about every sample of a complete survey."""

    def __init__(self, survey: Survey, plan: Plan, choice: Choice, scores: str | None) -> None:
        """scores: the kind of rows that holds the scores, None without any."""
        self._survey, self._plan, self._choice, self._scores = survey, plan, choice, scores
        self.rules = (
            *plan.basic.rules,
            *((SCORE,) if choice.scored else ()),
            *((BALANCE,) if plan.entries is not None else ()),
            UNUSABLE,
        )
        self.threshold: float | None = choice.minimum
        if choice.top is not None:
            self.threshold = top_threshold(self._all_scores, choice.top)
        if plan.entries is not None:
            names = plan.entries.names()
            self._hashes = entry_hashes(names)
            self.counts = self._count(len(names))
            assert choice.balance is not None
            self._p = keep_probabilities(self.counts, choice.balance)

    def _all_scores(self) -> Iterator[NDArray[np.float64]]:
        assert self._scores is not None
        for number in range(len(self._survey.shards)):
            yield np.asarray(self._survey.rows(self._scores, number)["score"], np.float64)

    def _before_balance(self, number: int) -> NDArray[np.uint16]:
        rows = self._survey.rows(SAMPLES, number)
        bits = np.asarray(rows["failed"]).astype(np.uint16)
        if self.threshold is not None:
            assert self._scores is not None
            score = self._survey.rows(self._scores, number)["score"]
            bits |= np.where(score >= self.threshold, 0, 1 << self.rules.index(SCORE)).astype(np.uint16)
        bits[unusable_rows(rows)] = 1 << (len(self.rules) - 1)
        return bits

    def bits(self, number: int) -> NDArray[np.uint16]:
        """Returns the broken rules of the samples of shard `number`, uint16 (n,)."""
        bits = self._before_balance(number)
        if self._plan.entries is None:
            return bits
        rows = self._survey.rows(SAMPLES, number)
        keep = kept_rows(
            self._choice.seed,
            rows["draw"],
            rows["entries"],
            self._survey.rows(SAMPLES, number, "entries"),
            self._hashes,
            self._p,
            self._choice.keep_unmatched,
        )
        bits[(bits == 0) & ~keep] = 1 << self.rules.index(BALANCE)
        return bits

    def details(self, number: int, dropped: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Returns the scores of these samples, where there are scores."""
        if self._scores is None:
            return [{} for _ in dropped]
        scores = self._survey.rows(self._scores, number)["score"][dropped].tolist()
        return [{} if math.isnan(score) else {"score": score} for score in scores]

    def _count(self, num_entries: int) -> NDArray[np.int64]:
        """Captions per entry, over the samples that every other rule keeps."""
        counts = np.zeros(num_entries, dtype=np.int64)
        for number in range(len(self._survey.shards)):
            rows = self._survey.rows(SAMPLES, number)
            kept = np.repeat(self._before_balance(number) == 0, rows["entries"])
            counts += np.bincount(self._survey.rows(SAMPLES, number, "entries")[kept], minlength=num_entries)
        return counts


@dataclass(frozen=True)
class Filtering:
    """A filter job: what is looked at, what decides, where the outputs go.

    score_table   scores written with scores_out, in place of a field or a model
    scored_by     identity of the model that scores; (): no model
    scores_out    where the scores are written
    """

    plan: Plan
    choice: Choice
    target: Target
    score_table: Path | None = None
    scored_by: tuple[str | int, ...] = ()
    scores_out: Path | None = None

    @property
    def score_kind(self) -> str | None:
        """The kind of rows that holds the scores, None without scores."""
        if self.plan.score_field is not None:
            return SAMPLES
        return SCORES if self.score_table is not None or self.scored_by else None

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other or need what is not there."""
        scored = self.score_kind is not None
        self.plan.basic.check()
        self.choice.check(scored)
        if self.scores_out is not None:
            check_format(self.scores_out, FORMATS[:2], "--scores-out")
            if not scored:
                raise ConfigError("--scores-out needs scores", "name a model or a field with --clip-score")
            if not os.access(self.scores_out.parent, os.W_OK) or self.scores_out.is_dir():
                raise ConfigError(
                    f"--scores-out {self.scores_out} cannot be written", "choose a file in a folder that can"
                )
        if self.score_table is not None and not self.score_table.is_file():
            raise ConfigError(f"{self.score_table}: no such file", "give a table written with --scores-out")
        decides = self.plan.basic.rules or self.choice.scored or self.plan.entries is not None
        if not decides and self.scores_out is None:
            raise ConfigError(
                "no rule is asked for", "pass --basic, --min-words ..., --clip-score with --min, or --balance"
            )

    def options(self) -> dict[str, Any]:
        """Returns what rows and outputs depend on besides files, by the options of the command."""
        plan, choice = self.plan, self.choice
        given = plan.score_field or self.score_table or (self.scored_by[0] if self.scored_by else None)
        return {
            "caption": plan.caption,
            **{name.replace("_", "-"): value for name, value in vars(plan.basic).items()},
            "clip-score": given,
            "precision": self.scored_by[-1] if self.scored_by else None,
            "min": choice.minimum,
            "top": choice.top,
            "balance": None if plan.entries is None else plan.entries.path,
            "match": None if plan.entries is None else plan.entries.rule,
            "t": choice.balance,
            "keep-unmatched": choice.keep_unmatched,
            "seed": choice.seed,
            "uid-field": plan.uid_field,
            "scores-out": None if self.scores_out is None else os.path.abspath(self.scores_out),
        }

    def inputs(self) -> list[Path]:
        """Returns the files that are read besides the shards."""
        entries = None if self.plan.entries is None else self.plan.entries.path
        files = (self.score_table, entries, self.plan.basic.language_model)
        return [path for path in files if path is not None]


@dataclass(frozen=True)
class Outcome:
    """What a filter did. summary: None when only a part of the shards was examined, or nothing was to do
    because it has `ended`.
    """

    examined: int
    summary: Summary | None = None
    threshold: float | None = None
    records: tuple[ShardRecord, ...] = ()
    ended: Ended | None = None


def run_filter(
    job: Filtering,
    specs: Sequence[str],
    engine: Engine,
    score: Callable[[str], dict[str, Rows]] | None,
    numbers_of: Callable[[int], range] = range,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: OnPart | None = None,
) -> Outcome:
    """Runs a filter over the shards that `specs` mean.

    score: returns the scores of a shard when a model gives them (`scored_by`); called in this process.
    numbers_of: number of shards -> those to examine; the outputs are written when it is all of them.
    Raises ConfigError, and DataError for damaged shards and when nothing is left.
    """
    job.check()
    shards = plain_shards(specs)
    numbers = numbers_of(len(shards))
    weights = [["the model's weights", *job.scored_by]] if job.scored_by else []
    with working(
        job.target,
        shards,
        "filter",
        job.options(),
        inputs=job.inputs(),
        facts=weights,
        scores_out=job.scores_out,
        overwrite=overwrite,
        dry_run=dry_run,
    ) as survey:
        if survey.ended is not None:
            return Outcome(0, ended=survey.ended)
        survey.make(SAMPLES, examine, numbers, engine, progress, (job.plan,))
        if score is not None:
            survey.make(SCORES, score, numbers, Engine(), progress)
        if len(numbers) < len(shards):
            return Outcome(len(numbers))
        _refuse_nowhere(survey, job.plan)
        if job.score_table is not None:
            survey_table(survey, job.score_table)
        kind = job.score_kind
        verdicts = FilterVerdicts(survey, job.plan, job.choice, kind)
        summary = summarize(survey, SAMPLES, verdicts)
        records: list[ShardRecord] = []
        if not dry_run:
            if job.scores_out is not None and kind is not None:
                write_scores(survey, kind, job.scores_out)
            more = {} if verdicts.threshold is None else {"threshold": verdicts.threshold}
            beside = [] if job.scores_out is None else [job.scores_out]
            records = write_selection(
                survey, SAMPLES, verdicts, summary, job.target, engine, progress, more, beside
            )
        return Outcome(len(shards), summary, verdicts.threshold, tuple(records))


def _refuse_nowhere(survey: Survey, plan: Plan) -> None:
    """Raises DataError for a field that decides and that no sample of any shard holds."""
    samples = int(survey.counts(SAMPLES).sum())
    for at, name in enumerate(plan.reads):
        if not samples or not all(survey.rows(SAMPLES, n, "absent")[at] for n in range(len(survey.shards))):
            continue
        survey.work.clear()  # of no use to the command with another field
        found = fields_in(survey.shards)
        near = nearest_field(name, found)
        raise DataError(
            f"none of {samples:,} samples holds anything at {name}",
            f"did you mean {near}?"
            if near
            else f"name a field that there is: {', '.join(sorted(found)[:12])}",
        )


def survey_table(survey: Survey, path: Path) -> None:
    """Takes the scores of all shards from a table written with --scores-out, of the same shards.

    DataError where it does not fit their samples.
    """
    table = read_scores(path)
    for number, label in enumerate(shard_labels(survey.shards)):
        keys = [key_of(key) for key in survey.rows(SAMPLES, number)["key"].tolist()]
        values = []
        for key in keys:
            row = next(table, None)
            if row is None or (row[0], row[1]) != (label, key):
                found = "ends there" if row is None else f"has {row[0]}, {row[1]}"
                raise DataError(
                    f"{path}: {label}, {key} was expected, the table {found}",
                    "use the table of these very shards, or compute the scores again",
                )
            values.append(math.nan if row[2] is None else row[2])
        survey.store(SCORES, number, {"samples": rows_of(keys, score=np.array(values, np.float64))})
    if next(table, None) is not None:
        raise DataError(
            f"{path}: has more rows than the shards have samples", "use the table of these shards"
        )


def write_scores(survey: Survey, kind: str, path: Path) -> None:
    """Writes the scores of all samples: columns shard, key, score."""
    labels = shard_labels(survey.shards)
    with written_table(path) as write:
        for number, label in enumerate(labels):
            rows = survey.rows(kind, number)
            keys = [key_of(key) for key in rows["key"].tolist()]
            write({"shard": [label] * len(keys), "key": keys, "score": rows["score"].tolist()})
