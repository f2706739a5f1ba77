"""The whole loop on a laptop: draw a corpus, pretrain, evaluate on held-out data, export, reload.

The data is made, from fonts. It shows that the machine works, not that the model is good.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from clipkit.config import Config, load_config
from clipkit.data.glyphs import compositional_pairs, make_characters, make_scenes, read_groups
from clipkit.redaction import visible
from clipkit.types import ClipkitError, GateError


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, the value and chance as fractions, and what it says."""

    name: str
    metric: str
    value: float
    chance: float


@dataclass(frozen=True)
class Corpus:
    """One member of the quickstart family: how its data is drawn, its configuration, and its floors.

    floors: "<set> <metric>" -> what the gate demands: of scenes the mean over five seeds less three standard
    deviations, rounded down (README, Numbers); of characters well below the one run that was measured.
    """

    draw: Callable[..., dict[str, Any]]
    config: str
    floors: Mapping[str, float]


CORPORA = {
    "scenes": Corpus(
        make_scenes,
        "quickstart_scenes.yaml",
        {
            "zeroshot_pictogram top-5": 0.42,
            "zeroshot_colour top-1": 0.99,
            "zeroshot_count top-1": 0.79,
            "retrieval_combinations text to image R@1": 0.43,
            "retrieval_combinations text to image R@5": 0.85,
            "retrieval_combinations image to text R@1": 0.53,
            "retrieval_combinations image to text R@5": 0.81,
            "retrieval_face text to image R@5": 0.82,
            "retrieval_face image to text R@5": 0.75,
        },
    ),
    "characters": Corpus(
        make_characters,
        "quickstart_characters.yaml",
        {"face top-1": 0.60, "face top-5": 0.93, "unseen top-5": 0.72},
    ),
}


def preset(name: str) -> Path:
    """Returns the path of a shipped configuration, in a checkout or in an installed package."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ClipkitError(
        f"the configuration {name} is not installed", "install clipkit again, or use a checkout"
    )


def vision_size(config: Config) -> int:
    """Returns the image size in pixels of an inline model."""
    assert config.model.vision_cfg is not None, "the quickstart's models are written inline"
    return int(config.model.vision_cfg["image_size"])


def run(
    directory: str | Path,
    gate: bool = False,
    corpus: str = "scenes",
    *,
    overrides: Sequence[str] = (),
    drawing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Runs the whole loop inside `directory`, prints its table and returns it.

    Returns {"rows", "seconds", "peak_memory_bytes", "export", "reload"}; also written to quickstart.json.
    With `gate`, raises GateError when a row is below its recorded floor. A second call continues where the
    first one stopped. overrides: `key=value` for the configuration; drawing: options of the corpus.
    """
    directory, plan = Path(directory), CORPORA[corpus]
    began = time.perf_counter()
    print(f"1/4 drawing {corpus} from the DejaVu fonts (made data), about a minute", flush=True)
    corpus_dir = directory / "data"
    # Drawn at the size of the model: shrinking later would blur what the fonts hint.
    size = vision_size(load_config(preset(plan.config), overrides))
    sets = plan.draw(corpus_dir, size=size, **(drawing or {}))
    print("2/4 pretraining", flush=True)
    # Here, not above: `clipkit quickstart --help` must not wait for torch.
    from clipkit.export import load, verify
    from clipkit.train import pretrain

    settings = [f"data.train={json.dumps(str(corpus_dir / sets['train_path']))}"]
    settings += [f"run.dir={json.dumps(str(directory / 'run'))}", *overrides]
    trained = pretrain(load_config(preset(plan.config), settings))
    print("3/4 evaluating on held-out data", flush=True)
    model = load(trained["export"])
    rows = [row for name, entry in sets["sets"].items() for row in measure(model, corpus_dir, name, entry)]
    print("4/4 reloading the export with open_clip in a fresh process", flush=True)
    differences = verify(trained["export"])
    report = {
        "rows": [vars(row) for row in rows],
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory(),
        "export": trained["export"],
        "reload": differences,
    }
    (directory / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(map(visible, format_report(corpus, corpus_dir, rows, report))))
    if gate:
        check_gate(rows, plan.floors)
    return report


def measure(model: Any, folder: Path, name: str, entry: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of one evaluation set of a drawn corpus."""
    from clipkit.evaluation.retrieval import retrieval
    from clipkit.evaluation.zero_shot import zero_shot

    path = folder / entry["path"]
    if entry["task"] == "compositional":
        return [Row(name, "right beats swapped", swapped_accuracy(model, path), 0.5)]
    if entry["task"] == "zeroshot":
        metrics = zero_shot(model, path)["metrics"]
        rows = [Row(name, "top-1", metrics["acc1"], entry["chance"])]
        if metrics["acc5"] is not None and entry["chance"] < 0.1:
            rows.append(Row(name, "top-5", metrics["acc5"], 5 * entry["chance"]))
        return rows + [
            Row(name, f"top-{k}, look-alikes merged", value, k * entry["chance"])
            for k, value in merged_accuracy(model, path).items()
        ]
    result = retrieval(model, path)
    metrics, images = result["metrics"], result["counts"]["images"]
    return [
        Row(name, f"{label} R@{k}", metrics[f"{way}_recall@{k}"], k / images)
        for way, label in (("t2i", "text to image"), ("i2t", "image to text"))
        for k in (1, 5)
    ]


def merged_accuracy(model: Any, path: Path) -> dict[int, float]:
    """Returns k -> share of images with a class of their own group among the k best, for k = 1 and 5.

    groups.json beside the set lists classes whose images are equal to the pixel (Latin A, Greek Alpha):
    no model can tell those apart. Empty for a set without groups.
    """
    import torch

    from clipkit.evaluation import embed_images, embed_texts
    from clipkit.evaluation.datasets import open_classification

    group_of = {index: number for number, group in enumerate(read_groups(path)) for index in group}
    if not group_of:
        return {}
    dataset = open_classification(path)
    classes = embed_texts(model, dataset.classnames(None))
    best = (embed_images(model, dataset.images) @ classes.T).topk(5, dim=1).indices.cpu()
    # A class without look-alikes is a group of its own.
    groups = torch.tensor([group_of.get(index, -1 - index) for index in range(len(classes))])
    hits = groups[best] == groups[torch.as_tensor(dataset.labels)].unsqueeze(1)
    return {k: float(hits[:, :k].any(dim=1).float().mean()) for k in (1, 5)}


def swapped_accuracy(model: Any, path: Path, batch_size: int = 64) -> float:
    """Returns the share of images whose caption scores strictly above the same words swapped; chance 0.5."""
    from PIL import Image

    pairs, right = compositional_pairs(path), 0
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        images = [Image.open(BytesIO(pair.image)).convert("RGB") for pair in part]
        image = model.encode_image(images)
        scores = [
            (image * model.encode_text(list(texts))).sum(dim=1) for texts in zip(*_texts(part), strict=True)
        ]
        right += int((scores[0] > scores[1]).sum())
    return right / len(pairs)


def _texts(pairs: list[Any]) -> list[tuple[str, str]]:
    return [(pair.right, pair.swapped) for pair in pairs]


def peak_memory() -> int:
    """Returns the peak resident bytes of this process plus those of its largest child."""
    unit = 1 if sys.platform == "darwin" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + child) * unit


def format_report(corpus: str, data: Path, rows: list[Row], report: Mapping[str, Any]) -> list[str]:
    """Returns the lines that the quickstart prints: the table against chance, costs, the next command."""
    width = max(len(f"{row.name}, {row.metric}") for row in rows)
    lines = ["", f"{'held-out ' + corpus + ' (made data)':<{width}}   model  chance"]
    lines += [
        f"{row.name + ', ' + row.metric:<{width}}  {100 * row.value:5.1f}%  {100 * row.chance:5.1f}%"
        for row in rows
    ]
    retrieval = next((row.name for row in rows if "R@" in row.metric), rows[0].name)
    command = "retrieval" if "R@" in next(row.metric for row in rows if row.name == retrieval) else "zeroshot"
    return [
        *lines,
        "",
        f"{report['seconds']:.0f} s, peak memory {report['peak_memory_bytes'] / 2**30:.1f} GiB; "
        f"open_clip reloads {report['export']} with equal embeddings",
        # `uv run` names itself to what it starts; without it the command may be on no path.
        f"next: {'uv run ' * ('UV' in os.environ)}clipkit {command} {report['export']} {data / retrieval}",
    ]


def check_gate(rows: list[Row], floors: Mapping[str, float]) -> None:
    """Raises GateError naming every row that is below its recorded floor."""
    values = {f"{row.name} {row.metric}": row.value for row in rows}
    below = [
        f"{name} {values[name]:.3f} < {floor:.3f}" for name, floor in floors.items() if values[name] < floor
    ]
    if below:
        raise GateError(
            f"below the recorded floor: {'; '.join(below)}",
            "compare `clipkit doctor` and the numbers in the README; a changed default is the usual cause",
        )
