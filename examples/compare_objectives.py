"""Trains one model per objective on the same pictures, seed and number of samples, and draws one picture.

    python examples/compare_objectives.py [OUT] [STEPS] [NAME,NAME,...]

Drawn scenes, the configurations of configs/. Two rows are not trained: a random tower, and raw pixels. On the
left a linear probe of the trunk (which pictogram is it?), and zero-shot accuracy where image and text were
trained together; on the right alignment of two augmentations against uniformity.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.nn.functional import normalize

import clipkit
from clipkit.config import load_config
from clipkit.data.glyphs.corpus import make_scenes
from clipkit.data.views import image_view
from clipkit.evaluation.datasets import open_classification
from clipkit.evaluation.probe import probe, probe_features
from clipkit.losses import alignment, uniformity
from clipkit.types import View

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRED = ("quickstart_scenes", "siglip", "unicl", "slip")
NAMES = (*PAIRED, "simclr", "dcl", "supcon", "moco_v2", "barlow_twins", "swav", "byol", "simsiam")
Results = dict[str, dict[str, float]]


def measured(model: Any, labelled: Path, paired: bool) -> dict[str, float]:
    """Returns probe accuracies, zero-shot accuracy for paired objectives, alignment and uniformity."""
    found: dict[str, float] = dict(probe(model, labelled)["metrics"])
    if paired:
        found["zero_shot"] = clipkit.zero_shot(model, labelled)["metrics"]["acc1"]
    pictures, views = open_classification(labelled).images, []
    for seed, name in enumerate(("first", "second")):
        view = image_view(View(name, "image", "simclr"), model.towers.preprocess_cfg)
        torch.manual_seed(seed)
        batch = torch.stack([view(pictures.load(row)) for row in range(min(256, len(pictures)))])
        views.append(normalize(model.encode_image_trunk(batch).float(), dim=-1))
    return found | {"alignment": float(alignment(*views)), "uniformity": float(uniformity(views[0]))}


def raw_pixels(labelled: Path, size: int = 16) -> dict[str, float]:
    """Returns the accuracy of nearest neighbours among raw pixels, size x size."""
    data = open_classification(labelled)
    rows = [
        data.images.load(row).convert("RGB").resize((size, size)).tobytes() for row in range(len(data.images))
    ]
    features = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.uint8) for row in rows]).float()
    metrics, _ = probe_features(features - features.mean(dim=1, keepdim=True), torch.from_numpy(data.labels))
    return {"knn_acc1": metrics["knn_acc1"], "standard_error": metrics["standard_error"]}


def draw(results: Results, path: Path) -> None:
    """Writes the picture."""
    left, right = (figure := Figure(figsize=(12, 5), layout="tight")).subplots(1, 2)
    heights = {name: found.get("linear_acc1", found["knn_acc1"]) for name, found in results.items()}
    names = sorted(heights, key=lambda name: heights[name])
    for row, name in enumerate(names):
        found = results[name]
        colour = "tab:blue" if "linear_acc1" in found else "grey"
        left.barh(row, heights[name], xerr=found["standard_error"], color=colour)
        left.plot(found.get("zero_shot", float("nan")), row, "D", color="tab:orange")
        if "uniformity" in found:
            right.plot(found["uniformity"], found["alignment"], "o")
            right.annotate(name, (found["uniformity"], found["alignment"]), fontsize=8)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="accuracy: linear probe (bar; pixels: neighbours), zero-shot (diamond)")
    right.set(xlabel="uniformity (lower is better)", ylabel="alignment (lower is better)")
    figure.savefig(path, dpi=120)


def main(out: Path, steps: int = 200, names: tuple[str, ...] = NAMES, scenes: int = 20_000) -> Results:
    """Trains and measures every name; returns and writes what was found."""
    corpus = make_scenes(out / "data", train=scenes, evaluation=max(60, scenes // 20), size=32)
    labelled = out / "data" / corpus["sets"]["zeroshot_pictogram"]["path"]
    results = {"pixels": raw_pixels(labelled)}
    for name in ("random", *names):
        changes = [f"run.steps={steps}", f"data.train={out}/data/train", f"run.dir={out}/{name}"]
        untrained = ["run.steps=1", "optim.warmup=0", "optim.lr=1e-12"]
        changes += untrained if name == "random" else ["optim.warmup=20%"]
        config = load_config(CONFIGS / f"{name.replace('random', 'quickstart_scenes')}.yaml", changes)
        results[name] = measured(clipkit.load(clipkit.pretrain(config)["export"]), labelled, name in PAIRED)
        print(name, {key: round(value, 3) for key, value in results[name].items()}, flush=True)
    (out / "compare.json").write_text(json.dumps(results, indent=1))
    draw(results, out / "compare.png")
    return results


if __name__ == "__main__":
    given = sys.argv[1:]
    chosen = tuple(given[2].split(",")) if len(given) > 2 else NAMES
    main(Path(given[0] if given else "runs/compare"), int(given[1]) if len(given) > 1 else 200, chosen)
