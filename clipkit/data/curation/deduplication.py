"""The job that removes duplicates, and what a set shares with evaluation sets or with other shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.data.curation.duplicates import (
    EMBEDDING,
    HASHES,
    VECTORS,
    DuplicateVerdicts,
    Likeness,
)
from clipkit.data.curation.evaluation import Evaluation, samples_of
from clipkit.data.curation.hashes import PHASH, fingerprint_shard
from clipkit.data.curation.selection import (
    Summary,
    Target,
    summarize,
    working,
    write_selection,
)
from clipkit.data.curation.similar import (
    usearch_index,
)
from clipkit.data.curation.survey import OnPart, Rows, Survey
from clipkit.data.engine import Engine
from clipkit.data.fingerprints import shard_inputs
from clipkit.data.finished import Ended
from clipkit.data.shards import ShardRecord
from clipkit.data.source import is_remote, plain_shards
from clipkit.redaction import redact
from clipkit.types import ConfigError

MAX_DISTANCE = 16  # of 64 bits: unrelated pictures are near 32, and the search grows with it
OTHER_HASHES, OTHER_VECTORS = "other-hashes", "other-vectors"


@dataclass(frozen=True)
class Deduplication:
    """A job that removes duplicates.

    within          the kinds by which the set is compared with itself
    caption         field of the caption of the kinds caption and pair
    embeddings      a .npy file with one row per sample; embedded_by: identity of the model that computes them
    evaluation_sets what the evaluation sets are, for the description of the job
    against         shards whose samples are removed as well
    """

    likeness: Likeness
    target: Target
    within: tuple[str, ...]
    caption: str = "txt"
    embeddings: Path | None = None
    embedded_by: tuple[str | int, ...] = ()
    evaluation_sets: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    uid_field: str | None = None

    def check(self) -> None:
        """Raises ConfigError for bounds that mean nothing and kinds that nothing is known about."""
        likeness = self.likeness
        if not 0 <= likeness.distance <= MAX_DISTANCE:
            raise ConfigError(
                f"--distance {likeness.distance} is not within 0..{MAX_DISTANCE}",
                "4 finds re-encoded and resized pictures; unrelated ones begin near 12",
            )
        if likeness.cosine is not None:
            if not 0 < likeness.cosine <= 1:
                raise ConfigError(f"--cosine {likeness.cosine} is not within 0..1", "give for example 0.95")
            if self.embeddings is None and not self.embedded_by:
                raise ConfigError(
                    "--by embedding needs embeddings",
                    "pass --embeddings MODEL, or FILE.npy with a row per sample",
                )
            if EMBEDDING in self.within:
                usearch_index()
        against = bool(self.evaluation_sets or self.against)
        if against and not (likeness.phash or self.embedded_by):
            raise ConfigError(
                "evaluation pictures cannot be compared with embeddings from a file",
                "add --by phash, or give --embeddings a MODEL",
            )
        if not against and not self.within:
            raise ConfigError("nothing to compare with", "pass --by KIND, --against DATA, or both")

    def check_others(self, shards: Sequence[str]) -> None:
        """Raises ConfigError when one of the shards is among those that they are compared with."""
        both = sorted(set(map(_place, shards)) & set(map(_place, self.against)))
        if both:
            raise ConfigError(f"{both[0]} is among the shards and in --against", "give shards of another set")

    def inputs(self) -> list[Path]:
        """Returns the files and folders that are read besides shards."""
        sets = map(Path, self.evaluation_sets[:-1])
        return [*sets] if self.embeddings is None else [self.embeddings, *sets]

    def options(self) -> dict[str, Any]:
        """Returns what rows and outputs depend on besides files, by the options of the command."""
        likeness = self.likeness
        return {
            "by": sorted({*self.within, *likeness.exact}),
            "caption": self.caption,
            "distance": likeness.distance,
            "embeddings": self.embeddings or (self.embedded_by[0] if self.embedded_by else None),
            "precision": self.embedded_by[-1] if self.embedded_by else None,
            "cosine": likeness.cosine,
            "neighbours": likeness.neighbours,
            "against": [*self.evaluation_sets[:-1], *map(redact, self.against)],
            "split": self.evaluation_sets[-1:],
            "uid-field": self.uid_field,
        }


@dataclass(frozen=True)
class Outcome:
    """What a deduplication did. summary: None when only a part of the shards was examined, or nothing was to
    do because it has `ended`.

    matches: pairs of a sample and an evaluation picture; unusable: samples of `against` that were not
    compared; largest: samples of the largest group of near duplicates, by kind.
    """

    examined: int
    summary: Summary | None = None
    matches: int = 0
    unusable: int = 0
    largest: Mapping[str, int] = field(default_factory=dict)
    records: tuple[ShardRecord, ...] = ()
    ended: Ended | None = None


def run_dedup(
    job: Deduplication,
    specs: Sequence[str],
    engine: Engine,
    embed: Callable[[str], dict[str, Rows]] | None = None,
    evaluation: Callable[[], Evaluation] | None = None,
    numbers_of: Callable[[int], range] = range,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: OnPart | None = None,
) -> Outcome:
    """Removes the duplicates from the shards that `specs` mean.

    embed: returns the vectors of a shard when a model gives them; called in this process.
    numbers_of: number of shards -> those to examine; the outputs are written when it is all of them.
    Raises ConfigError, and DataError for damaged shards.
    """
    job.check()
    shards = plain_shards(specs)
    numbers = numbers_of(len(shards))
    job.check_others(shards)
    weights = [["the model's weights", *job.embedded_by]] if job.embedded_by else []
    with working(
        job.target,
        shards,
        "dedup",
        job.options(),
        inputs=job.inputs(),
        facts=[*weights, *shard_inputs(job.against)],
        overwrite=overwrite,
        dry_run=dry_run,
    ) as survey:
        if survey.ended is not None:
            return Outcome(0, ended=survey.ended)
        whole = len(numbers) == len(shards)
        # First: what cannot be read is refused before hours of work.
        held_out = _held_out(job, survey, engine, embed, evaluation, progress) if whole else None
        kinds = (job.likeness.hashes, job.caption, job.uid_field)
        survey.make(HASHES, fingerprint_shard, numbers, engine, progress, kinds)
        if embed is not None:
            survey.make(VECTORS, embed, numbers, Engine(), progress)
        if not whole:
            return Outcome(len(numbers))
        verdicts = DuplicateVerdicts(
            survey, job.likeness, within=job.within, evaluation=held_out, embeddings=job.embeddings
        )
        summary = summarize(survey, HASHES, verdicts)
        records: list[ShardRecord] = []
        if not dry_run:
            matches = [] if held_out is None else [job.target.beside("evaluation_matches.jsonl")]
            for path in matches:
                verdicts.copy_matches(path)
            records = write_selection(
                survey, HASHES, verdicts, summary, job.target, engine, progress, beside=matches
            )
        unusable = 0 if held_out is None else held_out.unusable
        return Outcome(len(shards), summary, verdicts.matches, unusable, verdicts.largest, tuple(records))


def _place(shard: str) -> str:
    return shard if is_remote(shard) else os.path.realpath(shard)


def _held_out(
    job: Deduplication,
    survey: Survey,
    engine: Engine,
    embed: Callable[[str], dict[str, Rows]] | None,
    evaluation: Callable[[], Evaluation] | None,
    progress: OnPart | None,
) -> Evaluation | None:
    """What must not be trained on; what is known of shards lies with the rest, so that the job continues."""
    pictures = None if evaluation is None else evaluation()
    if not job.against:
        return pictures
    others = Survey(job.against, survey.work)
    numbers = range(len(job.against))
    others.make(OTHER_HASHES, fingerprint_shard, numbers, engine, progress, ((PHASH,), job.caption))
    if embed is not None:
        others.make(OTHER_VECTORS, embed, numbers, Engine(), progress)
    samples = samples_of(others, OTHER_HASHES, None if embed is None else OTHER_VECTORS)
    return samples if pictures is None else pictures.joined(samples)
