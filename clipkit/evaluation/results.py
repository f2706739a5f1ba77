"""Results of an evaluation: one dictionary that is valid JSON, a file of it, and lines for a terminal."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkit.evaluation.embed import Encoder
from clipkit.redaction import redact_all, visible
from clipkit.types import ConfigError

PACKAGES = {
    "clipkit": "clipkit",
    "torch": "torch",
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "numpy": "numpy",
    "pillow": "pillow",
}


def versions() -> dict[str, str]:
    """Returns the versions of what computes the numbers."""
    found = {"python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def build_result(
    task: str,
    model: Encoder,
    dataset: str,
    metrics: Mapping[str, float | None],
    counts: Mapping[str, int],
    protocol: Mapping[str, Any],
    **details: Any,
) -> dict[str, Any]:
    """Returns the result dictionary; `protocol` is completed by what the model fixes.

    A metric without a value is None, never NaN: the dictionary is valid JSON.
    """
    bad = [name for name, value in metrics.items() if value is not None and not math.isfinite(value)]
    assert not bad, f"metrics without a value must be None: {bad}"
    return {
        "task": task,
        "dataset": dataset,
        "model": model.name,
        "metrics": dict(metrics),
        "counts": dict(counts),
        "protocol": {
            "precision": model.precision,
            "image_size": list(model.image_size),
            "scores": "dot product of L2-normalised embeddings rounded to 2^-25, exact in float64",
            **protocol,
        },
        **details,
        "versions": versions(),
    }


def result_text(result: Mapping[str, Any]) -> str:
    """Returns the result as JSON over several lines, without secrets, fit for a file and for a terminal."""
    text = json.dumps(redact_all(result), indent=2, ensure_ascii=False, allow_nan=False)
    return visible(text, lines=True)


def write_result(result: Mapping[str, Any], path: str | Path) -> Path:
    """Writes the result as JSON, complete or not at all; returns the path. Parent folders are made."""
    path = Path(path)
    text = result_text(result) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(file.name, 0o666 & ~mask)  # temporary files are readable by their owner only
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(
            f"{path}: the result cannot be written ({error.strerror})", "choose another --out"
        ) from error
    return path


def _percent(value: float | None) -> str:
    return "--" if value is None else f"{100 * value:.2f}%"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _zero_shot_lines(result: Mapping[str, Any]) -> list[str]:
    counts = result["counts"]
    absent = f", {counts['absent_classes']:,} of them absent" if counts["absent_classes"] else ""
    return [
        *(f"  {name:<22}{_percent(value):>8}" for name, value in result["metrics"].items()),
        f"  on {_number(counts['samples'], 'image')}, {counts['classes']:,} classes{absent}",
    ]


def _probe_lines(result: Mapping[str, Any]) -> list[str]:
    metrics, counts = result["metrics"], result["counts"]
    error = _percent(metrics["standard_error"])
    return [
        f"  linear probe, top-1   {_percent(metrics['linear_acc1']):>8}   (standard error {error})",
        f"  nearest neighbours    {_percent(metrics['knn_acc1']):>8}",
        f"  on {_number(counts['samples'], 'image')}, {counts['classes']:,} classes, "
        f"{_number(counts['features'], 'feature')}",
    ]


def _retrieval_lines(result: Mapping[str, Any]) -> list[str]:
    metrics, counts = result["metrics"], result["counts"]
    ks = [name.rpartition("@")[2] for name in metrics if name.startswith("t2i_recall@")]
    lines = ["  " + " " * 26 + "".join(f"{'R@' + k:>9}" for k in ks) + "  median rank  mean rank"]
    for label, short in (("text -> image (t2i)", "t2i"), ("image -> text (i2t)", "i2t")):
        recalls = "".join(f"{_percent(metrics[f'{short}_recall@{k}']):>9}" for k in ks)
        median, mean = metrics[f"{short}_median_rank"], metrics[f"{short}_mean_rank"]
        lines.append(f"  {label:<26}{recalls}{median:>13,.1f}{mean:>11,.1f}")
        tied = result["ties"][short]
        if tied["queries_with_ties"]:
            recalls = "".join(f"{_percent(tied['optimistic'][f'{short}_recall@{k}']):>9}" for k in ks)
            lines.append(
                f"    {'if ties were won':<24}{recalls}  ({tied['queries_with_ties']:,} queries tied)"
            )
    least, most = counts["captions_per_image_min"], counts["captions_per_image_max"]
    spread = str(least) if least == most else f"{least} to {most}"
    shared = counts["captions_of_several_images"]
    captions = f"{_number(counts['captions'], 'caption')} ({spread} per image)"
    several = f", {shared:,} of them for several images" if shared else ""
    lines.append(f"  on {_number(counts['images'], 'image')}, {captions}{several}")
    seen = result.get("diagnostics", {})
    if seen:
        lines.append(
            f"  alignment {seen['alignment']:.2f}, uniformity {seen['uniformity_image']:.2f} (image) "
            f"{seen['uniformity_text']:.2f} (text), modality gap {seen['modality_gap']:.2f}"
        )
    left_out = counts["empty_captions_left_out"]
    return lines + ([f"  left out: {_number(left_out, 'empty caption')}"] if left_out else [])


def format_table(result: Mapping[str, Any]) -> list[str]:
    """Returns the result as plain lines: what was measured, metrics, counts, the protocol in short."""
    protocol = result["protocol"]
    height, width = protocol["image_size"]
    kinds = {"probe": _probe_lines, "zeroshot_retrieval": _retrieval_lines}
    lines = kinds.get(result["task"], _zero_shot_lines)(result)
    return [
        f"{result['task']} of {result['model']} on {result['dataset']}",
        *lines,
        f"  {protocol['precision']}, {height} x {width} pixels, {protocol['summary']}",
    ]
