"""`clipkit data make-shards`: images and captions, as they lie on a disk, to shards."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.data.options import (
    DryRunOption,
    EndOption,
    EngineName,
    EngineOption,
    OutOption,
    OverwriteOption,
    StartOption,
    WorkersOption,
    byte_count,
    engine_of,
    share,
)
from clipkit.cli.output import StageProgress, say, size
from clipkit.types import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from clipkit.data.engine import Engine
    from clipkit.data.making.collection import Collection, Reading
    from clipkit.data.making.made import Made
    from clipkit.data.making.writing import MakeJob, Making


class Target(StrEnum):
    """The layout that is written."""

    train = "train"
    evaluation = "evaluation"


class ResizeMode(StrEnum):
    """Which side --resize speaks of."""

    shorter = "shorter"
    longer = "longer"
    keep = "keep"


class ImageFormat(StrEnum):
    """What images are encoded as."""

    keep = "keep"
    jpg = "jpg"
    png = "png"
    webp = "webp"


DataArgument = Annotated[
    Path,
    typer.Argument(metavar="DATA", show_default=False, help="Table, caption file or folder (see above)."),
]
ToOption = Annotated[Target, typer.Option("--to", help="Training shards, or a CLIP_benchmark folder.")]
FromOption = Annotated[
    str | None, typer.Option("--from", metavar="LAYOUT", help="The layout of DATA, if it is not found out.")
]
ImagesOption = Annotated[
    Path | None, typer.Option("--images", help="Folder or zip of the images.  [default: found near DATA]")
]
ImageKeyOption = Annotated[
    str | None,
    typer.Option("--image-key", metavar="COLUMN", help="Column of images.  [default: filepath, image, ...]"),
]
CaptionKeyOption = Annotated[
    list[str] | None,
    typer.Option("--caption-key", metavar="COLUMN", help="Captions; repeatable, the first goes to .txt."),
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep", metavar="COLUMN", help="Stored in KEY.json; repeatable.  [default: all of a table]"
    ),
]
SplitOption = Annotated[
    list[str] | None, typer.Option("--split", help="Part of DATA that has several; repeatable.")
]
GroupOption = Annotated[
    bool | None,
    typer.Option("--group/--no-group", help="Rows of one image become one sample.", show_default=False),
]
ClassnamesOption = Annotated[Path | None, typer.Option("--classnames", help="Class names, one per line.")]
TemplatesOption = Annotated[
    Path | None, typer.Option("--templates", help="With {c}, one per line: captions of labelled images.")
]
ResizeOption = Annotated[
    int | None,
    typer.Option("--resize", min=1, metavar="PIXELS", help="Length of a side; smaller images stay."),
]
ResizeModeOption = Annotated[ResizeMode, typer.Option("--resize-mode", help="The side --resize is for.")]
EnlargeOption = Annotated[bool, typer.Option("--enlarge", help="Resize smaller images, too.")]
QualityOption = Annotated[
    int | None,
    typer.Option("--quality", min=1, max=100, help="Encode jpg and webp again.  [default: 95 if resized]"),
]
FormatOption = Annotated[ImageFormat, typer.Option("--format", help="Encode images as this.")]
SamplesOption = Annotated[
    int, typer.Option("--samples-per-shard", min=1, metavar="N", help="At most so many.")
]
BytesOption = Annotated[
    str | None,
    typer.Option("--shard-bytes", metavar="SIZE", help="At most so many (500MB); reads all images twice."),
]
RejectsOption = Annotated[
    float | None,
    typer.Option(
        "--max-reject-fraction",
        min=0,
        max=1,
        metavar="F",
        help="Unusable rows to bear with.  [default: 0.01; evaluation 0]",
    ),
]


def make_shards(
    data: DataArgument,
    out: OutOption,
    to: ToOption = Target.train,
    layout: FromOption = None,
    images: ImagesOption = None,
    image_key: ImageKeyOption = None,
    caption_key: CaptionKeyOption = None,
    keep: KeepOption = None,
    split: SplitOption = None,
    group: GroupOption = None,
    classnames: ClassnamesOption = None,
    templates: TemplatesOption = None,
    resize: ResizeOption = None,
    resize_mode: ResizeModeOption = ResizeMode.shorter,
    enlarge: EnlargeOption = False,
    quality: QualityOption = None,
    format: FormatOption = ImageFormat.keep,
    samples_per_shard: SamplesOption = 10_000,
    shard_bytes: BytesOption = None,
    max_reject_fraction: RejectsOption = None,
    workers: WorkersOption = 2,
    engine: EngineOption = EngineName.processes,
    start: StartOption = 0,
    end: EndOption = None,
    overwrite: OverwriteOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Make shards from images and captions, or an evaluation set from images and labels or captions.

    DATA is a CSV, TSV or Parquet table (a row per image or caption), a folder with one, a folder of NAME.jpg
    with NAME.txt (a caption per line), a folder of classes, COCO captions or Karpathy JSON, a caption file of
    Flickr8k or Flickr30k, idx files (MNIST), or a data set of Hugging Face. Layouts for --from: table, pairs,
    labels, imagefolder, coco, karpathy, flickr, idx, huggingface.

    The bytes of images are copied unless an option changes them. What cannot be used is counted and listed
    in rejects.jsonl. A killed run continues when it is started again; the same input and options give the
    same bytes. With --start and --end machines share the shards; a last run without them describes the set.

    python data_scripts/make_shards.py catalogue/pairs.csv --out shards/catalogue

    python data_scripts/make_shards.py food101/ --to evaluation --out eval/food101
    """
    from clipkit.data.making.collection import Reading
    from clipkit.data.making.images import ImageRules
    from clipkit.data.making.writing import Making

    train = to is Target.train
    # An evaluation set holds no fields.
    columns = tuple(caption_key or ()), None if train and not keep else tuple(keep or ()), tuple(split or ())
    group = True if group is None and not train else group
    usual = None if train else "test"
    prompts = None if templates is None else _templates(templates)
    reading = Reading(images, image_key, *columns, group, classnames, prompts, usual, not train)
    rules = ImageRules(resize, resize_mode.value, enlarge, format.value, quality)
    bearable = (0.01 if train else 0.0) if max_reject_fraction is None else max_reject_fraction
    making = Making(samples_per_shard, byte_count(shard_bytes), rules, bearable)
    job = _job(data, layout, reading, out, making, train, dry_run)
    runner = engine_of(workers, engine)
    _survey(job, runner) if dry_run else _make(job, runner, start, end, overwrite)


def _job(
    data: Path, kind: str | None, reading: Reading, out: Path, making: Making, train: bool, dry_run: bool
) -> MakeJob:
    from clipkit.data.making.opening import open_collection
    from clipkit.data.making.samples import Layout
    from clipkit.data.making.writing import MakeJob
    from clipkit.evaluation.collections import READERS

    if data.is_dir() and os.path.realpath(data) == os.path.realpath(out):
        raise ConfigError(f"--out {out} is the folder that is read", "choose another folder for the shards")
    folder = None if dry_run else _nearest(out)
    with StageProgress() as stage:
        collection = open_collection(data, reading, kind, folder, READERS, _counter(stage, "entries listed"))
    names = collection.classnames
    layout = Layout() if train else Layout(False, None if names is None else len(names))
    place = getattr(collection.images, "path", None)
    parts = (
        f"{collection.kind}: {len(collection):,} entries",
        collection.found.used,
        collection.found.describe_passed_over(),
        "" if place is None else f"images in {place}",
    )
    say(", ".join(part for part in parts if part))
    return MakeJob(collection, out, making, layout, reading.templates or collection.found.templates)


def _make(job: MakeJob, engine: Engine, start: int, end: int | None, overwrite: bool) -> None:
    began = time.perf_counter()
    whole = start == 0 and end is None
    with StageProgress() as stage:
        ended = job.begin(overwrite)
        if ended is not None:
            say(ended.line(job.out))
            return
        bounds = job.bounds(engine, _counter(stage, "entries measured", len(job.collection)))
        numbers = share(start, end, len(bounds) - 1, "shards")
        entries = bounds[numbers.stop] - bounds[numbers.start]
        made = job.run(engine, _counter(stage, "entries", entries), None if whole else numbers)
    _say_found(made, job.collection)
    volume, samples = (sum(getattr(record, name) for record in made.records) for name in ("bytes", "samples"))
    seconds = f"{time.perf_counter() - began:.1f} s"
    part = "" if whole else f"shards {numbers.start} to {numbers.stop - 1} of {len(bounds) - 1}: "
    say(f"{part}{samples:,} samples in {len(made.records):,} shards, {size(volume)}, {seconds}: {job.out}")


def _templates(path: Path) -> tuple[str, ...]:
    from clipkit.evaluation.prompts import read_templates

    templates = read_templates(path)
    if isinstance(templates, dict):
        raise ConfigError(
            f"{path}: prompts per class have no place in this layout", "give one template per line"
        )
    return templates


def _nearest(out: Path) -> Path | None:
    """The folder that exists of those that lead to `out`: where the shards fit, their listing does, too."""
    return next((path for path in (out.absolute(), *out.absolute().parents) if path.is_dir()), None)


def _counter(stage: StageProgress, what: str, total: int | None = None) -> Callable[[int], None]:
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        stage(what, done, done if total is None else total)

    return count


def _survey(job: MakeJob, engine: Engine) -> None:
    with StageProgress() as stage:
        found = job.survey(engine, _counter(stage, "entries read", len(job.collection)))
    _say_found(found, job.collection)
    say(f"{found.usable:,} usable of {found.rows:,}; nothing was written")
    for entry in job.collection.part(0, 3):
        say(f"  {entry.image}: {' / '.join(entry.captions)}")
    found.refuse_too_many(job.collection.source, found.rows, job.making.max_reject_fraction)


def _say_found(made: Made, collection: Collection) -> None:
    if made.resumed:
        say(f"continued: {made.resumed:,} shards were finished")
    if made.rejects:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in made.rejects.most_common())
        say(f"left out: {reasons} (see rejects.jsonl)")
    if made.records and made.empty:
        say(f"{made.empty:,} shards would be empty and are left out: their numbers are missing")
    if made.encoded:
        say(f"{made.encoded:,} images encoded again")
    if made.rotated:
        say(
            f"{made.rotated:,} images are stored with an EXIF rotation that training does not apply: "
            "pass --quality 95 to turn them"
        )
    if collection.listing.repeated and collection.reading.group is None:
        say(
            f"{collection.listing.repeated:,} rows repeat the image of the row before: --group makes one "
            "sample of each image with all its captions"
        )
