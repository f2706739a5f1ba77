"""`clipkit data dedup`: duplicates within a set, and what it shares with evaluation sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.data.curating import (
    BatchOption,
    CaptionOption,
    DeviceOption,
    KeptOutOption,
    KeysOutOption,
    PrecisionOption,
    UidOption,
    model_identity,
    report,
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
    from clipkit.data.curation.deduplication import Deduplication
    from clipkit.data.curation.evaluation import Evaluation
    from clipkit.data.engine import Engine
    from clipkit.evaluation.images import Images
    from clipkit.evaluation.scoring import Scorer

LARGE_GROUP = 100  # samples: more re-encoded copies of one picture than sets hold


class Kind(StrEnum):
    """What makes two samples duplicates."""

    image = "image"
    pixels = "pixels"
    caption = "caption"
    pair = "pair"
    phash = "phash"
    embedding = "embedding"


ByOption = Annotated[
    list[Kind] | None,
    typer.Option(
        "--by",
        show_default=False,
        help="What makes duplicates; may be repeated. Default: image, or nothing with --against.",
    ),
]
DistanceOption = Annotated[
    int, typer.Option(help="Bits of 64 in which perceptual hashes of duplicates may differ.")
]
EmbeddingsOption = Annotated[
    str | None,
    typer.Option(metavar="MODEL|FILE.npy", help="Where embeddings of the images come from (clipkit[data])."),
]
CosineOption = Annotated[float, typer.Option(help="Cosine of the embeddings of duplicates, at least.")]
NeighboursOption = Annotated[
    int, typer.Option(min=1, help="Nearest neighbours that are looked at, by embedding.")
]
AgainstOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATA",
        show_default=False,
        help="Remove what is in these shards, or this evaluation set (as zeroshot takes); may be repeated.",
    ),
]
SplitOption = Annotated[str, typer.Option(help="Split of the evaluation sets that have splits.")]


def dedup(
    shards: ShardsArgument,
    out: KeptOutOption = None,
    keys_out: KeysOutOption = None,
    by: ByOption = None,
    caption: CaptionOption = "txt",
    distance: DistanceOption = 4,
    embeddings: EmbeddingsOption = None,
    cosine: CosineOption = 0.95,
    neighbours: NeighboursOption = 32,
    against: AgainstOption = None,
    split: SplitOption = "test",
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
    """Remove duplicates, keeping the first of each group, and what other shards or evaluation sets hold.

    image: equal bytes. pixels: equal pictures. caption, pair: equal text, or both. phash: pictures that look
    alike after re-encoding or resizing; it does not see crops of a tenth, mirrored or edited ones. embedding:
    pictures whose embeddings are close. --against compares by phash, and by embedding when they are given.

    Example: clipkit data dedup pool/ --out clean --by image --by phash --against coco_test
    """
    from clipkit.data.curation.evaluation import names_shards
    from clipkit.data.source import plain_shards

    others = [data for data in against or () if names_shards(data)]
    sets = [data for data in against or () if data not in others]
    kinds = tuple(kind.value for kind in by or ([] if against else [Kind.image]))
    job = _job(
        kinds,
        (distance, cosine, neighbours),
        (out, keys_out),
        (caption, uid_field),
        embeddings,
        (sets, plain_shards(others) if others else []),
        (split, precision.value),
    )
    parts = engine_of(workers, engine)

    @functools.cache
    def model() -> Scorer:
        return scorer(embeddings or "", caption, batch_size, device, precision, parts)

    def numbers_of(total: int) -> range:
        return share(start, end, total, "shards")

    _run(job, shards, parts, model, (sets, split), numbers_of, overwrite, dry_run)


def _job(
    kinds: tuple[str, ...],
    bounds: tuple[int, float, int],
    outputs: tuple[Path | None, Path | None],
    fields: tuple[str, str],
    embeddings: str | None,
    against: tuple[list[str], list[str]],
    settings: tuple[str, str],
) -> Deduplication:
    from clipkit.data.curation.deduplication import Deduplication
    from clipkit.data.curation.duplicates import EMBEDDING, Likeness
    from clipkit.data.curation.hashes import EXACT, PHASH
    from clipkit.data.curation.selection import Target

    distance, cosine, neighbours = bounds
    out, keys_out = outputs
    sets, others = against
    is_file = embeddings is not None and embeddings.endswith(".npy")
    by_embedding = EMBEDDING in kinds or (any(against) and embeddings is not None and not is_file)
    likeness = Likeness(
        tuple(kind for kind in EXACT if kind in kinds),
        phash=PHASH in kinds or any(against),
        distance=distance,
        cosine=cosine if by_embedding else None,
        neighbours=neighbours,
    )
    return Deduplication(
        likeness,
        Target(out, keys_out),
        within=kinds,
        caption=fields[0],
        embeddings=Path(embeddings) if embeddings is not None and is_file else None,
        embedded_by=(*model_identity(embeddings), settings[1]) if embeddings and not is_file else (),
        evaluation_sets=tuple([*sets, settings[0]] if sets else ()),
        against=tuple(others),
        uid_field=fields[1] if keys_out is not None and keys_out.suffix == ".npy" else None,
    )


def _opened(sets: list[str], split: str) -> list[Images]:
    if not sets:
        return []
    from clipkit.evaluation.datasets import open_images

    return [open_images(data, split) for data in sets]


def _run(
    job: Deduplication,
    shards: list[str],
    engine: Engine,
    model: functools._lru_cache_wrapper[Scorer],
    sets: tuple[list[str], str],
    numbers_of: Callable[[int], range],
    overwrite: bool,
    dry_run: bool,
) -> None:
    from clipkit.data.curation.deduplication import run_dedup

    by_model = bool(job.embedded_by) and job.likeness.cosine is not None

    images = _opened(*sets)  # before anything is begun: what is none is refused now

    def evaluation() -> Evaluation:
        from clipkit.data.curation.evaluation import evaluation_of

        vectors = [model().picture_vectors(found) for found in images] if by_model else None
        return evaluation_of(images, engine, vectors)

    with StageProgress() as progress:
        done = run_dedup(
            job,
            shards,
            engine,
            (lambda shard: model().vectors(shard)) if by_model else None,
            evaluation if sets[0] else None,
            numbers_of,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if done.ended is not None:
        say(done.ended.line(job.target.out or job.target.keys_out))
        return
    if done.summary is None:
        say(f"{done.examined:,} shards are examined; once all are, run it without --start and --end")
        return
    show(done.summary)
    for kind, count in done.largest.items():
        say(f"largest group by {kind}: {count:,} samples")
        if count > LARGE_GROUP:
            say("  look-alike pictures form chains: a smaller --distance or larger --cosine joins fewer")
    if done.unusable:
        say(f"{done.unusable:,} samples of --against cannot be decoded and were compared with nothing")
    if sets[0] or job.against:
        say(f"{done.matches:,} pairs of a sample and a picture of --against")
    if not dry_run:
        report(done.records, job.target)
