"""`clipkit data filter`: rules, scores and balance decide which samples stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipkit.cli.data.curating import (
    BatchOption,
    CaptionOption,
    DeviceOption,
    KeptOutOption,
    KeysOutOption,
    PrecisionOption,
    SeedOption,
    UidOption,
    model_identity,
    report,
    score_kind,
    scorer,
    show,
)
from clipkit.cli.data.options import (
    DryRunOption,
    EndOption,
    EngineName,
    EngineOption,
    OverwriteOption,
    ShardsArgument,
    StartOption,
    WorkersOption,
    engine_of,
    share,
)
from clipkit.cli.evaluating import Precision
from clipkit.cli.output import StageProgress, say

if TYPE_CHECKING:
    from clipkit.data.curation.filtering import Filtering
    from clipkit.data.curation.rules import Basic, Plan
    from clipkit.data.engine import Engine
    from clipkit.evaluation.scoring import Scorer


class Match(StrEnum):
    """How captions name metadata entries."""

    words = "words"
    published = "published"


BasicOption = Annotated[
    bool, typer.Option("--basic", help="DataComp's basic filter: 3 words, 6 characters, side 200, aspect 3.")
]
MinWords = Annotated[int | None, typer.Option(min=0, help="Words of a caption, at least.")]
MinChars = Annotated[int | None, typer.Option(min=0, help="Characters of a caption, at least.")]
MinSide = Annotated[int | None, typer.Option(min=0, help="Pixels of the shorter side, at least.")]
MaxAspect = Annotated[float | None, typer.Option(min=1, help="Longer by shorter side, at most.")]
Language = Annotated[str | None, typer.Option(metavar="CODE", help="Language to keep, for example en.")]
LanguageField = Annotated[str, typer.Option(metavar="FIELD", help="Field that names the language.")]
LanguageModel = Annotated[
    Path | None, typer.Option(metavar="FILE", help="fastText model that tells it, for example lid.176.bin.")
]
ClipScore = Annotated[
    str | None,
    typer.Option(metavar="SCORE", help="A MODEL, a field (json.similarity), or a table of --scores-out."),
]
Minimum = Annotated[float | None, typer.Option("--min", help="Keep scores >= this.")]
Top = Annotated[float | None, typer.Option("--top", help="Keep this fraction, DataComp's rule.")]
ScoresOut = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write all scores: .csv or .parquet (shard, key, score).")
]
Balance = Annotated[
    Path | None, typer.Option(metavar="METADATA", help="MetaCLIP balancing over entries, one per line.")
]
Captions = Annotated[float, typer.Option("--t", help="Captions per entry; 20000 is MetaCLIP's for 400 M.")]
MatchOption = Annotated[
    Match, typer.Option(help="How captions name entries; published: MetaCLIP's own rule.")
]
KeepUnmatched = Annotated[bool, typer.Option("--keep-unmatched", help="Keep captions that name no entry.")]


def filter_shards(
    shards: ShardsArgument,
    out: KeptOutOption = None,
    keys_out: KeysOutOption = None,
    caption: CaptionOption = "txt",
    basic: BasicOption = False,
    min_words: MinWords = None,
    min_chars: MinChars = None,
    min_side: MinSide = None,
    max_aspect: MaxAspect = None,
    language: Language = None,
    language_field: LanguageField = "json.language",
    language_model: LanguageModel = None,
    clip_score: ClipScore = None,
    minimum: Minimum = None,
    top: Top = None,
    scores_out: ScoresOut = None,
    balance: Balance = None,
    t: Captions = 20_000,
    match: MatchOption = Match.words,
    keep_unmatched: KeepUnmatched = False,
    seed: SeedOption = 0,
    uid_field: UidOption = "json.uid",
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.fp32,
    workers: WorkersOption = 1,
    engine: EngineOption = EngineName.processes,
    start: StartOption = 0,
    end: EndOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Keep the samples that every rule keeps; say what each rule removed; list the dropped ones.

    With --start and --end a machine looks at a part of the shards; the same command without them finishes.

    Example: clipkit data filter pool/ --out kept --basic --clip-score json.similarity --top 0.3
    """
    bounds = {"min_words": min_words, "min_chars": min_chars, "min_side": min_side, "max_aspect": max_aspect}
    rules = _rules(basic, bounds, language, language_field, language_model)
    by_model = score_kind(clip_score) == "model"
    job = _job(
        _plan(caption, rules, clip_score, balance, match, uid_field, keys_out),
        (minimum, top, None if balance is None else t, keep_unmatched, seed),
        (out, keys_out, scores_out),
        clip_score,
        precision.value,
    )
    parts = engine_of(workers, engine)

    @functools.cache
    def model() -> Scorer:
        return scorer(clip_score or "", caption, batch_size, device, precision, parts)

    score = (lambda shard: model().scores(shard)) if by_model else None
    _run(job, shards, parts, score, lambda total: share(start, end, total, "shards"), overwrite, dry_run)


def _rules(
    basic: bool, bounds: dict[str, Any], language: str | None, field: str, model: Path | None
) -> Basic:
    from clipkit.data.curation.rules import DATACOMP, Basic

    if basic and language is None:
        say("note: DataComp's basic filter also keeps English only: --language en with --language-model")
    if basic:
        bounds = {name: DATACOMP[name] if found is None else found for name, found in bounds.items()}
    return Basic(**bounds, language=language, language_field=field, language_model=model)


def _job(
    plan: Plan,
    choice: tuple[float | None, float | None, float | None, bool, int],
    outputs: tuple[Path | None, Path | None, Path | None],
    clip_score: str | None,
    precision: str,
) -> Filtering:
    from clipkit.data.curation.filtering import Choice, Filtering
    from clipkit.data.curation.selection import Target

    out, keys_out, scores_out = outputs
    kind = score_kind(clip_score)
    name = clip_score or ""
    return Filtering(
        plan,
        Choice(*choice),
        Target(out, keys_out),
        score_table=Path(name) if kind == "table" else None,
        scored_by=(*model_identity(name), precision) if kind == "model" else (),
        scores_out=scores_out,
    )


def _plan(
    caption: str,
    rules: Basic,
    clip_score: str | None,
    balance: Path | None,
    match: Match,
    uid_field: str,
    keys_out: Path | None,
) -> Plan:
    from clipkit.data.curation.balancing import Entries
    from clipkit.data.curation.rules import Plan

    return Plan(
        caption,
        rules,
        score_field=clip_score if score_kind(clip_score) == "field" else None,
        entries=None if balance is None else Entries.open(balance, match.value),
        uid_field=uid_field if keys_out is not None and keys_out.suffix == ".npy" else None,
    )


def _run(
    job: Filtering,
    shards: list[str],
    engine: Engine,
    score: Callable[[str], dict[str, Any]] | None,
    numbers_of: Callable[[int], range],
    overwrite: bool,
    dry_run: bool,
) -> None:
    from clipkit.data.curation.filtering import run_filter

    with StageProgress() as progress:
        done = run_filter(
            job, shards, engine, score, numbers_of, overwrite=overwrite, dry_run=dry_run, progress=progress
        )
    if done.ended is not None:
        say(done.ended.line(job.target.out or job.target.keys_out))
        return
    if done.summary is None:
        say(f"{done.examined:,} shards are examined; once all are, run it without --start and --end")
        return
    show(done.summary)
    if done.threshold is not None:
        say(f"score threshold: {done.threshold!r}")
    if not dry_run:
        report(done.records, job.target)
