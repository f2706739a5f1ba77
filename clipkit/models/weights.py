"""Initial weights: read them from where they are, fit them to a model, and name what does not fit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from open_clip.convert import convert_state_dict
from open_clip.factory import _find_checkpoint_in_dir, get_model_config, load_state_dict
from open_clip.model import CustomTextCLIP, resize_pos_embed
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipkit.types import ConfigError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
# What a run directory holds; the names are those of clipkit.train and clipkit.export.load.
EXPORT, CHECKPOINTS = "export", "checkpoints"
# Names of the text tower's parts at the top level of open_clip's older class `CLIP`.
OLD_TEXT_PARTS = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
# A file from a clipkit checkpoint holds the whole learner; the average is what gets evaluated and shipped.
LEARNER_PREFIXES = ("ema.towers.clip.", "towers.clip.")
_NO_TENSORS = (pickle.UnpicklingError, EOFError, StopIteration, AttributeError, TypeError)
CURE = "use weights of the same architecture, or change model.vision_cfg / model.text_cfg to match"


@dataclass(frozen=True)
class Weights:
    """Tensors under CustomTextCLIP's names (or one tower's own), and what their source says about itself."""

    source: str
    tensors: dict[str, Tensor]
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)
    model_cfg: dict[str, Any] = field(default_factory=dict)


def read_document(folder: Path) -> dict[str, Any]:
    """Returns the parsed open_clip_config.json of `folder`, with the key model_cfg; raises ConfigError."""
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} holds no {CONFIG_FILE}", "name a directory written by clipkit export"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "export the model again") from error
    if not isinstance(document, dict) or not isinstance(document.get("model_cfg"), dict):
        raise ConfigError(f"{path} has no model_cfg", "name a directory written by clipkit export")
    return document


def pretrained_source(name: str) -> tuple[str, str] | None:
    """Returns (model name, tag) of an open_clip `name:tag`, or None when `name` is no such thing."""
    model, colon, tag = name.rpartition(":")
    return (model, tag) if colon and get_model_config(model) is not None else None


def pretrained_document(model: str, tag: str) -> dict[str, Any]:
    """Returns {"model_cfg", "preprocess_cfg"} of an open_clip tag; raises ConfigError for an unknown tag."""
    tag_cfg = get_pretrained_cfg(model, tag)
    if not tag_cfg:
        tags = ", ".join(list_pretrained_tags_by_model(model)) or "none"
        raise ConfigError(f"open_clip has no weights {model}:{tag}", f"tags of {model}: {tags}")
    model_cfg = get_model_config(model)
    assert model_cfg is not None
    model_cfg["quick_gelu"] = bool(tag_cfg.get("quick_gelu", False))
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {"model_cfg": model_cfg, "preprocess_cfg": {key: tag_cfg[key] for key in keys if tag_cfg.get(key)}}


def read_weights(source: str) -> Weights:
    """Returns the weights of an open_clip directory, a run's export, a .safetensors file or a `name:tag`.

    A run directory stands for the export/ inside it. Only `name:tag` may download. Names are converted to
    CustomTextCLIP's where they are an older CLIP's. Raises ConfigError naming the source.
    """
    path = Path(source)
    if path.is_dir():
        path = _exported(path)
        document = read_document(path)
        found = _find_checkpoint_in_dir(path)
        if found is None:
            raise ConfigError(f"{path} holds no weights", f"it needs {WEIGHTS_FILE}")
        return Weights(
            source, _read_file(Path(found)), document.get("preprocess_cfg") or {}, document["model_cfg"]
        )
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ConfigError(
                f"{path} is not a .safetensors file", "convert it: pickled files can run code when read"
            )
        return Weights(source, _read_file(path))
    named = pretrained_source(source)
    if named is None:
        raise ConfigError(
            f"init {source}: no such directory, file or open_clip name:tag",
            "name an open_clip directory, a run directory, a .safetensors file, or an open_clip name:tag",
        )
    document = pretrained_document(*named)
    try:
        file = download_pretrained(get_pretrained_cfg(*named))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"weights {source} cannot be fetched: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "check the network, or export the model elsewhere and name that directory",
        ) from error
    return Weights(source, _read_file(Path(file)), document["preprocess_cfg"], document["model_cfg"])


def _exported(folder: Path) -> Path:
    """The folder itself, or the export inside a run directory."""
    if (folder / CONFIG_FILE).is_file():
        return folder
    if (folder / EXPORT / CONFIG_FILE).is_file():
        return folder / EXPORT
    if (folder / CHECKPOINTS).is_dir():
        raise ConfigError(
            f"the run {folder} has no {EXPORT}/ yet: it has not ended",
            f"run `clipkit export {folder} OUT` for its newest checkpoint and name OUT, or wait for its end",
        )
    return folder


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else load_state_dict(str(path))
        if not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in tensors.items()):
            raise ValueError("it holds other things than tensors with names")
    except UnpicklingError as error:
        raise ConfigError(
            f"{path} is a pickle that holds more than tensors: it is not read, because reading would run it",
            "convert it to .safetensors where it was made, or take it from a source that you trust",
        ) from error
    # A file that is no plain dict of tensors makes torch, or open_clip after it, trip over whatever it is.
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError, *_NO_TENSORS) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ConfigError(f"{path} cannot be read: {reason}", "copy or export the file again") from error
    for prefix in LEARNER_PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
            break
    tensors = dict(convert_state_dict(None, tensors))
    if "token_embedding.weight" in tensors:
        tensors = {f"text.{n}" if n.startswith(OLD_TEXT_PARTS) else n: x for n, x in tensors.items()}
    return {name: x for name, x in tensors.items() if not name.endswith("position_ids")}


def check_activation(model_cfg: dict[str, Any], weights: Weights) -> None:
    """Raises ConfigError when the weights were trained with the other GELU: they load and are wrong."""
    if weights.model_cfg and bool(weights.model_cfg.get("quick_gelu")) != bool(model_cfg.get("quick_gelu")):
        value = bool(weights.model_cfg.get("quick_gelu"))
        raise ConfigError(
            f"init {weights.source} was trained with quick_gelu: {str(value).lower()}, unlike this model",
            f"set model.quick_gelu: {str(value).lower()} (named models: add or drop the suffix -quickgelu)",
        )


def load_model(clip: CustomTextCLIP, weights: Weights) -> list[str]:
    """Copies a whole model into `clip`; returns notes for the banner.

    A temperature is taken over only together with its bias: one without the other belongs to another loss.
    """
    tensors = dict(weights.tensors)
    notes: list[str] = []
    has_bias = "logit_bias" in tensors
    if "logit_scale" in tensors and has_bias == (clip.logit_bias is not None):
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        if clip.logit_bias is not None:
            tensors["logit_bias"] = tensors["logit_bias"].reshape(1)
    else:
        tensors["logit_scale"] = clip.logit_scale.detach()
        tensors.pop("logit_bias", None)
        if clip.logit_bias is not None:
            tensors["logit_bias"] = clip.logit_bias.detach()
        notes.append("temperature: starts anew, the weights come from another kind of loss")
    notes += _fit(clip, tensors, "", weights.source, lambda name: False)
    return notes


def load_tower(
    clip: CustomTextCLIP,
    part: str,
    weights: Weights,
    backbone: str,
    projection: Callable[[str], bool],
) -> tuple[bool, list[str]]:
    """Copies one tower (`part` is "visual" or "text") into `clip`; returns (projection loaded, notes).

    Understood: a whole model's tensors, one tower's own, or those of the bare `backbone` inside it (a timm
    or transformers file). A projection may be absent; then it keeps its random start.
    """
    own = {name for name in clip.state_dict() if name.startswith(f"{part}.")}
    tensors = {name: x for name, x in weights.tensors.items() if name in own or name.startswith(f"{part}.")}
    if not tensors:
        tower = clip.get_submodule(part)
        inner = clip.get_submodule(f"{part}.{backbone}") if backbone else tower
        prefixes = [f"{part}."] + ([f"{part}.{backbone}."] if backbone else [])
        bare = str(getattr(inner, "base_model_prefix", "") or "")
        stripped = {n.removeprefix(f"{bare}.") if bare else n: x for n, x in weights.tensors.items()}
        tensors = max(
            ({prefix + name: x for name, x in stripped.items()} for prefix in prefixes),
            key=lambda candidate: len(own & candidate.keys()),
        )
        classifier = _classifier_prefixes(inner)
        tensors = {
            n: x
            for n, x in tensors.items()
            if n in own or not n.removeprefix(prefixes[-1]).startswith(classifier)
        }
    absent = all(name not in tensors for name in own if projection(name.removeprefix(f"{part}.")))

    def optional(name: str) -> bool:
        return absent and projection(name.removeprefix(f"{part}."))

    notes = _fit(clip, tensors, f"{part}.", weights.source, optional)
    return not absent, notes


def _classifier_prefixes(backbone: Any) -> tuple[str, ...]:
    """Names of heads that classifiers and language models carry and a tower does not."""
    names = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or ()
    listed = (names,) if isinstance(names, str) else tuple(names)
    return (*(f"{name}." for name in listed), "pooler.", "lm_head.", "cls.", "classifier.")


def _fit(
    clip: CustomTextCLIP,
    tensors: dict[str, Tensor],
    prefix: str,
    source: str,
    optional: Callable[[str], bool],
) -> list[str]:
    own = {name: x for name, x in clip.state_dict().items() if name.startswith(prefix)}
    notes = _resize_positions(clip, tensors, own)
    missing = [name for name in own if name not in tensors and not optional(name)]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    problems = [
        f"{kind} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if names
    ]
    if problems:
        raise ConfigError(f"init {source} does not fit the model: {'; '.join(problems)}", CURE)
    clip.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)
    return notes


def _resize_positions(clip: CustomTextCLIP, tensors: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Interpolates the grid of a native ViT and cuts the text positions, for fine-tuning at other sizes."""
    notes: list[str] = []
    key = "visual.positional_embedding"
    if key in tensors and key in own and tensors[key].shape[0] != own[key].shape[0]:
        before = tensors[key].shape[0]
        resize_pos_embed(tensors, clip)
        notes.append(f"image: positions interpolated from {before} to {own[key].shape[0]} tokens")
    key = "text.positional_embedding"
    longer = key in tensors and key in own and tensors[key].shape[0] > own[key].shape[0]
    if longer and getattr(clip.text, "cls_emb", None) is None:
        notes.append(f"text: the first {own[key].shape[0]} of {tensors[key].shape[0]} positions are used")
        tensors[key] = tensors[key][: own[key].shape[0]]
    return notes
