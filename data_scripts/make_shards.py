"""Turns images and captions that lie on this disk into shards.

training shards (--to train, the default): one sample per row of a CSV or TSV
    python data_scripts/make_shards.py catalogue/pairs.csv --out shards/catalogue
    python data_scripts/make_shards.py pairs.tsv --images photos.zip --image-key file --caption-key title
    --out shards/t

evaluation set in CLIP_benchmark layout (--to evaluation): labels.csv + classnames.txt, captions.csv (a row
per caption), one image folder per class, or images with same-stem .txt files
    python data_scripts/make_shards.py food101/ --to evaluation --out eval/food101
    python data_scripts/make_shards.py flickr/captions.csv --to evaluation --out eval/flickr

The bytes of the images are copied as they are. Exit codes: 0 done, 2 usage, 3 data.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from clipkit.cli.output import StageProgress, size
from clipkit.data.glyphs.faces import encode_png
from clipkit.data.shards import (
    EvaluationItem,
    Progress,
    ShardRecord,
    image_extension,
    refuse_shards,
    write_evaluation_set,
    write_train_parts,
)
from clipkit.data.tables import (
    TAB_SUFFIXES,
    UNREADABLE,
    ImageRoot,
    check_pairs,
    count_reasons,
    find_root,
    pair_part,
    read_columns,
    read_pairs,
    refuse_too_many,
    write_rejects,
)
from clipkit.redaction import visible
from clipkit.types import ClipkitError, ConfigError, DataError

if TYPE_CHECKING:
    from clipkit.evaluation.images import Images
    from clipkit.evaluation.sets import ClassificationSet, RetrievalSet


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line; a usage error leaves with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data",
        type=Path,
        help="CSV, TSV, or a folder that holds one; for an evaluation set also a folder of images",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--to", choices=("train", "evaluation"), default="train", help="layout (default: train)"
    )
    parser.add_argument("--dry-run", action="store_true", help="read and check everything, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace shards that --out already holds")
    parser.add_argument(
        "--samples-per-shard", type=_positive, default=10_000, metavar="N", help="default: 10000"
    )
    train = parser.add_argument_group("training shards")
    train.add_argument(
        "--images", type=Path, help="folder or zip (default: beside the table, or images.zip there)"
    )
    train.add_argument("--image-key", default="filepath", help="column of image paths (default: filepath)")
    train.add_argument("--caption-key", default="caption", help="column of captions (default: caption)")
    train.add_argument(
        "--keep", action="append", default=[], metavar="COLUMN", help="store in KEY.json; repeatable"
    )
    train.add_argument("--max-reject-fraction", type=float, default=0.01, metavar="F", help="default: 0.01")
    train.add_argument("--workers", type=_positive, default=2, help="processes (default: 2)")
    evaluation = parser.add_argument_group("evaluation sets")
    evaluation.add_argument("--classnames", type=Path, help="one name per line (default: the data's own)")
    evaluation.add_argument(
        "--templates", type=Path, help="one template with {c} per line (default: the data's own)"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _table(given: Path) -> Path:
    """Returns the table itself, or the only one in a folder. Raises ConfigError."""
    if given.is_file():
        return given
    if not given.is_dir():
        raise ConfigError(f"{given}: no such table", "give a CSV or TSV file, or pass --to evaluation")
    tables = [path for path in sorted(given.iterdir()) if path.suffix.lower() in (".csv", *TAB_SUFFIXES)]
    if len(tables) == 1:
        return tables[0]
    found = f"{len(tables)} tables ({', '.join(path.name for path in tables[:3])})" if tables else "no table"
    raise ConfigError(
        f"{given}: a folder of images needs a table of their captions, it holds {found}",
        "give the CSV or TSV file, or pass --to evaluation",
    )


def make_train(options: argparse.Namespace) -> list[ShardRecord]:
    """Writes training shards from a table and returns their records (none in a dry run)."""
    table = _table(options.data)
    rows = read_pairs(table, options.image_key, options.caption_key, options.keep)
    root: ImageRoot = find_root(table, options.images, rows[0].image)
    pairs, rejects = check_pairs(rows, root)
    print(visible(f"{len(rows):,} rows, images in {root.path}, {len(pairs):,} usable"), flush=True)
    if rejects:
        print(f"left out: {count_reasons(rejects)} (see rejects.jsonl)", flush=True)
    refuse_too_many(table, rejects, len(rows), options.max_reject_fraction)
    if options.dry_run:
        for pair in pairs[:3]:
            print(visible(f"  {pair.image}: {pair.caption}"))
        return []
    parts = [
        functools.partial(pair_part, root, pairs[start : start + options.samples_per_shard])
        for start in range(0, len(pairs), options.samples_per_shard)
    ]
    with StageProgress() as stage:
        progress = _counter(stage, len(pairs))
        records = write_train_parts(parts, options.out, workers=options.workers, progress=progress)
    write_rejects(options.out, rejects)
    return records


def make_evaluation(options: argparse.Namespace) -> list[ShardRecord]:
    """Writes a CLIP_benchmark evaluation set and returns its shards' records (none in a dry run)."""
    from clipkit.evaluation.datasets import open_classification, open_retrieval

    names = templates = None
    if _holds_captions(options.data):
        retrieval = open_retrieval(options.data)
        images, items = retrieval.images, retrieval_items(retrieval)
        what = f"{len(retrieval.captions):,} captions"
    else:
        labelled = open_classification(options.data)
        images, items = labelled.images, classification_items(labelled)
        names, templates = labelled.classnames(options.classnames), _templates(options.templates, labelled)
        what = f"{len(names):,} classes"
    print(f"{len(images):,} images, {what}", flush=True)
    if options.dry_run:
        formats = Counter(item.extension for item in items)
        print(", ".join(f"{count:,} {extension}" for extension, count in formats.most_common()))
        return []
    with StageProgress() as stage:
        return write_evaluation_set(
            items,
            options.out,
            classnames=names,
            templates=templates,
            max_samples=options.samples_per_shard,
            progress=_counter(stage, len(images)),
        )


def _templates(given: Path | None, data: ClassificationSet) -> tuple[str, ...] | None:
    from clipkit.evaluation.prompts import read_templates

    templates = data.templates if given is None else read_templates(given)
    if isinstance(templates, dict):
        raise ConfigError(
            f"{given}: prompts per class have no place in this layout", "give one template per line"
        )
    return templates


def _holds_captions(path: Path) -> bool:
    from clipkit.evaluation.folders import has_captions

    if path.is_file():
        return "label" not in read_columns(path)
    if (path / "captions.csv").is_file() or (path / "labels.csv").is_file():
        return (path / "captions.csv").is_file()
    return path.is_dir() and has_captions(path)


def classification_items(data: ClassificationSet) -> Iterator[EvaluationItem]:
    """Yields the labelled images as they lie on the disk."""
    for index, label in enumerate(data.labels):
        content, extension = _content(data.images, index)
        yield EvaluationItem(content, extension, label=int(label))


def retrieval_items(data: RetrievalSet) -> Iterator[EvaluationItem]:
    """Yields the captioned images as they lie on the disk."""
    captions: list[list[str]] = [[] for _ in range(len(data.images))]
    for text, owner in zip(data.captions, data.owners, strict=True):
        captions[int(owner)].append(text)
    for index, texts in enumerate(captions):
        content, extension = _content(data.images, index)
        yield EvaluationItem(content, extension, captions=tuple(texts))


def _content(images: Images, index: int) -> tuple[bytes, str]:
    from clipkit.evaluation.images import ArrayImages, FileImages, ZipImages

    if isinstance(images, ArrayImages):
        return encode_png(Image.fromarray(images.pixels[index])), "png"
    if not isinstance(images, (ZipImages, FileImages)):
        raise ConfigError(
            f"{images.name(index)}: in CLIP_benchmark layout already", "use the folder as it is"
        )
    try:
        if isinstance(images, ZipImages):
            content = _zip_root(images.path).read(images.entries[index])
        else:
            content = images.paths[index].read_bytes()
    except UNREADABLE as error:
        raise DataError(f"{images.name(index)}: {error}", "repair, replace or remove it") from error
    extension = image_extension(content)
    if extension is None:
        raise DataError(f"{images.name(index)}: not an image", "repair, replace or remove it")
    return content, extension


@functools.cache
def _zip_root(path: Path) -> ImageRoot:
    return ImageRoot(path)


def _counter(stage: StageProgress, total: int) -> Progress:
    done = 0

    def count(samples: int) -> None:
        nonlocal done
        done += samples
        stage("samples", done, total)

    return count


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code."""
    options = parse(arguments)
    began = time.perf_counter()
    try:
        if not options.overwrite and not options.dry_run:
            refuse_shards(options.out if options.to == "train" else options.out / "test")
        records = make_train(options) if options.to == "train" else make_evaluation(options)
    except ClipkitError as error:
        print(f"error: {error.cause}\n  cure: {error.cure}", file=sys.stderr)
        return error.exit_code
    if not options.dry_run:
        samples, volume = sum(r.samples for r in records), sum(r.bytes for r in records)
        seconds = time.perf_counter() - began
        done = f"{samples:,} samples in {len(records)} shards, {size(volume)}, {seconds:.1f} s: {options.out}"
        print(visible(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
