"""Which model for how many pairs, of what size, on what device; or the one that is fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkit.proposal.machine import Machine
from clipkit.proposal.survey import DataFacts, at
from clipkit.types import ConfigError

CONTEXT = 77  # tokens that CLIP's text towers read
_SIZES = (32, 48, 64, 96, 128, 160, 224)
_LARGEST_ON_CPU = 64
_PATCHES = {32: 4, 48: 6, 64: 8, 96: 8, 128: 8, 160: 16}
# Below so many pairs the image trunk stays as it is: few pairs teach captions, hardly pictures.
_FEW_PAIRS = 10_000
_SMALL, _LARGE = 1_000_000, 50_000_000
_CLIP = ({"name": "clip"}, "the softmax over the batch: the reference to beat")
_EQUAL = (
    {"name": "unicl", "label": "caption"},
    "captions repeat: equal ones are positives of each other (arXiv:2204.03610)",
)


@dataclass
class Chosen:
    """The model section: key -> (value, reason). learns: whether it starts from random weights.

    tokens: captions longer than that are cut. objective: (entry, reason).
    """

    tokens: int
    learns: bool = True
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    objective: tuple[dict[str, Any], str] = _CLIP


def choose_model(data: DataFacts, machine: Machine) -> Chosen:
    """Returns a model to train from scratch."""
    side = at(data.sides, 0.5)
    seen = next((size for size in _SIZES if size >= side), _SIZES[-1])
    slow = machine.device != "cuda"
    size = min(seen, _LARGEST_ON_CPU) if slow else seen
    longest = max(at(data.fields[name].tokens, 0.99) for name in data.captions if name in data.fields)
    context = min(CONTEXT, max(16, -(-longest // 8) * 8))
    pixels = f"the median image has a shorter side of {side} pixels"
    if size == _SIZES[-1]:
        return _named(data, pixels)
    if size < seen:
        pixels += f"; more than {size} would be slow without a GPU (assumed)"
    width, layers, text_layers = (192, 6, 4) if slow else (384, 12, 12)
    why = "on a CPU small" if slow else "a ViT-S"
    known = "configs/products_64px.yaml was measured with it" if slow else "below 1 M pairs enough (assumed)"
    chosen = Chosen(tokens=context, objective=_objective(data))
    chosen.values = {
        "embed_dim": (width, f"as wide as the towers: {why}, {known}"),
        "vision_cfg": (
            {
                "image_size": size,
                "patch_size": _PATCHES[size],
                "width": width,
                "layers": layers,
                "head_width": 64,
            },
            pixels,
        ),
        "text_cfg": (
            {
                "context_length": context,
                "vocab_size": 49408,
                "width": width,
                "heads": width // 64,
                "layers": text_layers,
            },
            f"99 % of the captions have at most {longest} tokens",
        ),
    }
    return chosen


def _objective(data: DataFacts) -> tuple[dict[str, Any], str]:
    distinct, compared = data.distinct
    return _EQUAL if distinct * 2 < compared else _CLIP


def _named(data: DataFacts, pixels: str) -> Chosen:
    if data.pairs < _SMALL:
        name, why = "ViT-S-16", "below 1 M pairs a larger one overfits (assumed)"
    elif data.pairs < _LARGE:
        name, why = "ViT-B-32", "what DataComp trains on 13 and 128 M pairs (arXiv:2304.14108)"
    else:
        name, why = "ViT-B-16", "what DataComp trains on 1.3 billion pairs (arXiv:2304.14108)"
    return Chosen(CONTEXT, values={"name": (name, f"{why}; {pixels}")}, objective=_objective(data))


def continue_model(source: str, data: DataFacts) -> Chosen:
    """Returns the model of weights that exist: an open_clip name:tag, an exported directory or a run.

    Raises ConfigError when `source` is none of these.
    """
    from clipkit.models.tokenizer import has_tokenizer
    from clipkit.models.weights import pretrained_document, pretrained_source

    named = pretrained_source(source)
    if named is not None:
        cfg = pretrained_document(*named)["model_cfg"]
        suffix = "-quickgelu" if cfg["quick_gelu"] and not named[0].endswith("-quickgelu") else ""
        values: dict[str, tuple[Any, str]] = {"name": (f"{named[0]}{suffix}", "the architecture of --from")}
    else:
        place, cfg = _document(source)
        keys = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
        values = {key: (cfg[key], "of the model that --from names") for key in keys if key in cfg}
        if has_tokenizer(place):
            values["tokenizer"] = (str(place), "the vocabulary that its text tower knows")
    values["init"] = (source, "fine-tuning: all weights start from there")
    if data.pairs < _FEW_PAIRS:
        frozen = (
            f"{data.pairs:,} pairs are few (below {_FEW_PAIRS:,}, assumed): only projection and texts learn"
        )
        values["image"] = ({"freeze": "trunk"}, frozen)
    objective = _objective(data)
    if cfg.get("init_logit_bias") is not None:
        objective = {"name": "siglip"}, "the loss that its temperature and bias were trained with"
    context = int(cfg["text_cfg"].get("context_length", CONTEXT))
    return Chosen(context, learns=False, values=values, objective=objective)


def _document(source: str) -> tuple[Path, dict[str, Any]]:
    from clipkit.models.weights import CONFIG_FILE, EXPORT, read_document

    folder = Path(source)
    for place in (folder, folder / EXPORT):
        if (place / CONFIG_FILE).is_file():
            cfg: dict[str, Any] = read_document(place)["model_cfg"]
            return place, cfg
    raise ConfigError(
        f"--from {source}: neither an open_clip name:tag nor an exported model or a run that has ended",
        "name for example ViT-B-32:laion2b_s34b_b79k, an export, or a run directory with export/",
    )
