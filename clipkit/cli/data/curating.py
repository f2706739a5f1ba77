"""What `clipkit data filter`, `dedup` and `hard-captions` share: options, the model, the table of counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipkit.cli.evaluating import Precision
from clipkit.cli.output import say, size, table

if TYPE_CHECKING:
    from clipkit.data.curation.selection import Summary, Target
    from clipkit.data.engine import Engine
    from clipkit.data.shards import ShardRecord
    from clipkit.evaluation.scoring import Scorer

KeptOutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Write the kept samples as shards into this folder."),
]
KeysOutOption = Annotated[
    Path | None,
    typer.Option(
        "--keys-out", metavar="FILE", help="Write the kept keys: .csv, .parquet, or .npy (DataComp uids)."
    ),
]
CaptionOption = Annotated[
    str, typer.Option("--caption", metavar="FIELD", help="Field of the caption: txt, json.caption.")
]
UidOption = Annotated[
    str, typer.Option("--uid-field", metavar="FIELD", help="Field of the uid, for --keys-out FILE.npy.")
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="Number format of the towers.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of all draws.")]


def score_kind(value: str | None) -> str:
    """Returns what --clip-score names: "field", "table" or "model"; "" for nothing."""
    if value is None:
        return ""
    if value.startswith("json."):
        return "field"
    return "table" if Path(value).suffix in (".csv", ".parquet") else "model"


def model_identity(model: str) -> tuple[str, int]:
    """Returns the name of a MODEL and the time of its newest weights, 0 for one that is no folder."""
    times = [path.stat().st_mtime_ns for path in Path(model).rglob("*.safetensors")]
    return model, max(times, default=0)


def scorer(
    model: str, caption: str, batch_size: int, device: str, precision: Precision, engine: Engine
) -> Scorer:
    """Returns a MODEL that scores shards."""
    from clipkit.evaluation.scoring import Scorer
    from clipkit.export import load

    loaded = load(model, device=device, precision=precision.value)
    return Scorer(loaded, caption, batch_size, engine)


def show(summary: Summary) -> None:
    """Prints what each rule removed, and why samples could not be used."""
    rows = [["rule", "removed", "by it alone"]]
    rows += [[rule, f"{of:,}", f"{alone:,}"] for rule, (of, alone) in summary.rules.items()]
    say(*table(rows))
    for reason, count in summary.reasons.items():
        say(f"unusable: {count:,} {reason}")
    share = summary.kept / max(1, summary.samples)
    say(f"{summary.kept:,} of {summary.samples:,} samples stay ({share:.2%})")


def report(records: Sequence[ShardRecord], target: Target) -> None:
    """Prints what was written."""
    if target.out is not None:
        volume = size(float(sum(record.bytes for record in records)))
        say(f"{sum(r.samples for r in records):,} samples in {len(records):,} shards, {volume}: {target.out}")
    if target.keys_out is not None:
        say(f"kept keys: {target.keys_out}")
    say(f"dropped samples: {target.beside('dropped.jsonl')}")
