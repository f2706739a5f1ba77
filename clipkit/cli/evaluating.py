"""`clipkit zeroshot`, `clipkit retrieval`, `clipkit probe` and `clipkit export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.output import StageProgress, check_out, join_launcher, rank, result, say

if TYPE_CHECKING:
    from clipkit.models import Model


class Precision(StrEnum):
    """Number format of the towers while encoding; metrics are always computed in at least fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Weights(StrEnum):
    """Which weights of a run: averaged ones when the run keeps them, or as the optimizer left them."""

    auto = "auto"
    ema = "ema"
    raw = "raw"


ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="An exported directory, a run directory, or an open_clip name:tag."),
]
DataName = Annotated[
    str,
    typer.Argument(
        metavar="DATA", help="A CLIP_benchmark WebDataset, an ImageFolder, or a CSV with its images."
    ),
]
Out = Annotated[Path | None, typer.Option(help="Write the result as JSON; - prints only the JSON.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per forward pass and process.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images, per process.")]
Split = Annotated[
    str, typer.Option(help="Split of a CLIP_benchmark folder or of an ImageFolder (DATA/test/CLASS/IMAGE).")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Number format of the towers.")]
WeightsOption = Annotated[Weights, typer.Option(help="Weights of a run directory.")]


def _load(model: str, device: str, precision: Precision, weights: Weights) -> Model:
    from clipkit.export import load

    return load(model, device=device, precision=precision.value, weights=weights.value)


def zeroshot(
    model: ModelName,
    data: DataName,
    classnames: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="One name per line in label order, or JSON, or imagenet."),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="One prompt per line with {} for the class, or openai, simple."),
    ] = None,
    out: Out = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    split: Split = "test",
    device: Device = "auto",
    precision: PrecisionOption = Precision.fp32,
    weights: WeightsOption = Weights.auto,
) -> None:
    """Classify images by the similarity to their class names: acc1, acc5, mean per-class recall.

    Example: clipkit zeroshot runs/mine data/imagenet_val --out zeroshot.json
    """
    check_out(out)
    world, device = join_launcher(device)
    from clipkit.evaluation.zero_shot import zero_shot as work

    loaded = _load(model, device, precision, weights)
    with StageProgress() as progress:
        values = work(
            loaded,
            data,
            classnames=classnames,
            templates=templates,
            batch_size=batch_size,
            workers=workers,
            split=split,
            world=world,
            progress=progress,
        )
    result(values, out)


def retrieval(
    model: ModelName,
    data: DataName,
    out: Out = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    split: Split = "test",
    device: Device = "auto",
    precision: PrecisionOption = Precision.fp32,
    weights: WeightsOption = Weights.auto,
) -> None:
    """Find images by their captions and captions by their images: R@1, R@5, R@10, median rank.

    Example: clipkit retrieval runs/mine data/captions.csv
    """
    check_out(out)
    world, device = join_launcher(device)
    from clipkit.evaluation.retrieval import retrieval as work

    loaded = _load(model, device, precision, weights)
    with StageProgress() as progress:
        values = work(
            loaded, data, batch_size=batch_size, workers=workers, split=split, world=world, progress=progress
        )
    result(values, out)


def probe(
    model: ModelName,
    data: DataName,
    out: Out = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "auto",
    precision: PrecisionOption = Precision.fp32,
    weights: WeightsOption = Weights.auto,
) -> None:
    """Fit a linear classifier and nearest neighbours on the features of the image tower.

    Example: clipkit probe runs/simclr data/imagenette
    """
    check_out(out)
    world, device = join_launcher(device)
    from clipkit.evaluation.probe import probe as work

    loaded = _load(model, device, precision, weights)
    with StageProgress() as progress:
        values = work(loaded, data, batch_size=batch_size, workers=workers, world=world, progress=progress)
    result(values, out)


def export(
    model: ModelName,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Reload it in a fresh process with open_clip and compare.")
    ] = False,
    weights: WeightsOption = Weights.auto,
    hf_name: Annotated[
        str | None,
        typer.Option(metavar="ID", help="What open_clip shall look up for a transformers text tower."),
    ] = None,
) -> None:
    """Write a model as an open_clip directory: open_clip.create_model_and_transforms('local-dir:OUT').

    Example: clipkit export runs/mine my_model --verify
    """
    from clipkit.export import export as work
    from clipkit.export import location_note

    if rank() == 0:
        written = work(model, out, verify=verify, weights=weights.value, hf_name=hf_name)
        say(f"written to {written}" + (", and open_clip computes identical embeddings" if verify else ""))
        if note := location_note(written):
            say(f"note: {note}")
