"""Trains one model per objective on the same pictures, seed and number of samples, and draws one picture.

    python examples/compare_objectives.py [OUT [STEPS [NAME,NAME,... [LABELLED_SET data.train=SHARDS ...]]]]

On drawn scenes, or on a labelled set and shards of yours, with names of configs/ or .yaml files. Two rows are
not trained: random weights, and raw pixels. Diamonds: zero-shot accuracy of image-text objectives.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torchvision.transforms.functional import pil_to_tensor

import clipkit
from clipkit.config import load_config
from clipkit.data.glyphs.corpus import make_scenes
from clipkit.data.views import image_view
from clipkit.evaluation.datasets import open_classification
from clipkit.evaluation.probe import FOLDS, folds_of, knn_probe, probe
from clipkit.losses import alignment, uniformity
from clipkit.types import View

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRED = {"clip", "siglip", "unicl", "cyclip", "triplet", "pair_margin", "distill"}
NAMES = "quickstart_scenes,siglip,unicl,cyclip,slip,triplet,pair_margin,simclr,dcl,supcon,moco_v2,pcl"
NAMES += ",barlow_twins,swav,byol,simsiam"


def measured(model: Any, labelled: str, paired: bool) -> dict[str, float]:
    """Returns probe accuracies, zero-shot accuracy for paired objectives, alignment and uniformity."""
    found: dict[str, float] = dict(probe(model, labelled)["metrics"])
    if paired:
        found["zero_shot"] = clipkit.zero_shot(model, labelled)["metrics"]["acc1"]
    pictures, views = open_classification(labelled).images, []
    view = image_view(View("view", "image", "simclr"), model.towers.preprocess_cfg)
    torch.manual_seed(0)
    for _ in range(2):
        batch = torch.stack([view(pictures.load(row)) for row in range(min(256, len(pictures)))])
        views.append(torch.nn.functional.normalize(model.encode_image_trunk(batch).float(), dim=-1))
    return found | {"uniformity": float(uniformity(views[0])), "alignment": float(alignment(*views))}


def raw_pixels(labelled: str, size: int = 16) -> dict[str, float]:
    """Returns the accuracy of nearest neighbours among raw pixels, size x size."""
    data = open_classification(labelled)
    pictures = [data.images.load(row).convert("RGB").resize((size, size)) for row in range(len(data.images))]
    features = torch.stack([pil_to_tensor(picture).flatten() for picture in pictures]).float()
    features -= features.mean(dim=1, keepdim=True)
    folds, right = folds_of(labels := torch.from_numpy(data.labels), FOLDS), 0
    for test in (folds == fold for fold in range(FOLDS)):
        answers = knn_probe(features[~test], labels[~test], features[test], int(labels.max()) + 1)
        right += int((answers == labels[test]).sum())
    return {"knn_acc1": right / len(labels)}


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the picture."""
    left, right = (figure := Figure(figsize=(12, 5), layout="tight")).subplots(1, 2)
    heights = {name: found.get("linear_acc1", found["knn_acc1"]) for name, found in results.items()}
    for row, name in enumerate(names := sorted(heights, key=heights.__getitem__)):
        colour = "tab:blue" if "linear_acc1" in (found := results[name]) else "grey"
        left.barh(row, heights[name], xerr=found.get("standard_error"), color=colour)
        left.plot(found.get("zero_shot", float("nan")), row, "D", color="tab:orange")
        if "uniformity" in found:
            right.plot(*(place := (found["uniformity"], found["alignment"])), "o")
            right.annotate(name, place, fontsize=8)
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="accuracy of a linear probe (pixels: k-NN)")
    right.set(xlabel="uniformity (lower is better)", ylabel="alignment (lower is better)")
    figure.savefig(path, dpi=120)


def compare(out: Path, steps: int, names: list[str], *settings: str, scenes: int = 20_000) -> dict[str, Any]:
    """Trains and measures every name; returns and writes what was found."""
    labelled, *data = settings or ("",)
    if not labelled:
        make_scenes(out / "data", train=scenes, evaluation=max(60, scenes // 20), size=32)
        labelled, data = f"{out}/data/zeroshot_pictogram", [f"data.train={out}/data/train"]
    results = {"pixels": raw_pixels(labelled)}
    for name in ("random", *names):
        changes = [f"run.steps={steps}", f"run.dir={out}/{Path(name).stem}", "optim.warmup=20%"]
        # Steps of no length, for the statistics of its BatchNorm.
        changes += ["run.steps=30", "optim.warmup=0", "optim.lr=1e-12"] * (name == "random")
        kind = names[0] if name == "random" else name
        config = load_config(kind if ".yaml" in kind else CONFIGS / f"{kind}.yaml", [*changes, *data])
        trained = {entry.name for entry in config.objectives if "tower" not in entry.options}
        model = clipkit.load(clipkit.pretrain(config)["export"])
        results[Path(name).stem] = found = measured(model, labelled, bool(trained & PAIRED))
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    (out / "compare.json").write_text(json.dumps(results, indent=1))
    draw(results, out / "compare.png")
    return results


if __name__ == "__main__":
    given = [*sys.argv[1:], *("runs/compare", "200", NAMES)[len(sys.argv) - 1 :]]
    compare(Path(given[0]), int(given[1]), given[2].split(","), *given[3:])
