"""From a model name or an inline dict to a checked open_clip model_cfg, without any download."""

from __future__ import annotations

import copy
import difflib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.factory import get_model_config, list_models
from open_clip.hf_configs import arch_dict
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

from clipkit.models.tokenizer import SIMPLE_END, SIMPLE_START, SIMPLE_VOCABULARY, TOKENIZER_FILES
from clipkit.types import ConfigError

MODEL_KEYS = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
)
PREPROCESS_KEYS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


@dataclass(frozen=True)
class Architecture:
    """A resolved model: open_clip's `model_cfg`, plus `text_cfg.hf_config` for transformers towers.

    preprocess_cfg   what the caller said about pixels (possibly {}), not yet complete
    notes            lines for the banner
    """

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    notes: tuple[str, ...] = ()


def _check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    allowed = list(known)
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(allowed)}"
            raise ConfigError(f"unknown key `{key}` in {where}", hint)


def _named(name: str) -> dict[str, Any]:
    found = (
        get_model_config(name.replace("/", "-")) if not name.startswith(("hf-hub:", "local-dir:")) else None
    )
    if found is None:
        near = difflib.get_close_matches(name, list_models(), n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ConfigError(
            f"unknown model `{name}`",
            f"{hint}use an open_clip name, or give embed_dim, vision_cfg and text_cfg inline",
        )
    return found


def resolve(model: str | dict[str, Any], tokenizer: str | None = None, fetch: bool = False) -> Architecture:
    """Returns the architecture of an open_clip name, an inline model_cfg, or {"model_cfg", "preprocess_cfg"}.

    A transformers text tower (`text_cfg.hf_model_name` or `text_cfg.hf_config`) gets its configuration from
    the inline dict, a local directory, or the local hub cache, in this order; it is kept inline as
    `text_cfg.hf_config`, so that a checkpoint does not depend on a folder. `fetch` allows a download of it.
    Raises ConfigError.
    """
    named = isinstance(model, str)
    document = _named(model) if isinstance(model, str) else copy.deepcopy(dict(model))
    preprocess = document.pop("preprocess_cfg", None) or {}
    cfg = document.pop("model_cfg", None) or document
    if "multimodal_cfg" in cfg:
        raise ConfigError("CoCa models (multimodal_cfg) are not supported", "choose a model with two towers")
    _check_keys(cfg, MODEL_KEYS, "model")
    _check_keys(preprocess, PREPROCESS_KEYS, "model.preprocess_cfg")
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if cfg.get(key) is None:
            raise ConfigError(
                f"model.{key} is missing", "give embed_dim, vision_cfg and text_cfg, or a model name"
            )
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    _check_keys(vision, [f.name for f in fields(CLIPVisionCfg)], "model.vision_cfg")
    _check_keys(text, [*(f.name for f in fields(CLIPTextCfg)), "hf_config"], "model.text_cfg")
    for name, part in (("vision_cfg", vision), ("text_cfg", text)):
        if part.get("output_tokens"):
            raise ConfigError(
                f"model.{name}.output_tokens is for CoCa", "remove it: the towers return one vector"
            )
    # open_clip's configs name weights that its trainer fetches unasked; here only an inline `true` asks.
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = bool(vision.get("timm_model_pretrained")) and not named
    notes: list[str] = []
    if text.get("hf_model_name") or text.get("hf_config"):
        text["hf_model_pretrained"] = bool(text.get("hf_model_pretrained")) and not named
        _resolve_transformers(text, tokenizer, fetch, notes)
    cfg["custom_text"] = True
    cfg.pop("nonscalar_logit_scale", None)
    try:
        cfg = json.loads(json.dumps(cfg))
    except TypeError as error:
        raise ConfigError(
            f"the model configuration is not plain data: {error}", "use numbers, text and lists"
        ) from error
    return Architecture(cfg, preprocess, tuple(notes))


def _resolve_transformers(text: dict[str, Any], tokenizer: str | None, fetch: bool, notes: list[str]) -> None:
    """Fills `text["hf_config"]`; without a tokenizer, an inline config is completed for CLIP's own."""
    from transformers import AutoConfig

    inline, name = text.get("hf_config"), str(text.get("hf_model_name"))
    if inline:
        values = dict(inline)
        model_type = values.pop("model_type", None)
        if model_type not in arch_dict:
            raise ConfigError(
                f"text_cfg.hf_config.model_type is {model_type!r}, which open_clip cannot wrap",
                f"set it to one of {', '.join(arch_dict)}",
            )
        if not (tokenizer or text.get("hf_tokenizer_name")):
            added = {"vocab_size": SIMPLE_VOCABULARY, "pad_token_id": 0}
            added |= {"bos_token_id": SIMPLE_START, "eos_token_id": SIMPLE_END}
            added = {key: value for key, value in added.items() if key not in values}
            if added:
                values |= added
                notes.append(f"text: hf_config completed for CLIP's byte-pair tokenizer: {added}")
        _check_keys(values, AutoConfig.for_model(model_type).to_dict(), "model.text_cfg.hf_config")
        config = AutoConfig.for_model(model_type, **values)
        text.setdefault("hf_model_name", model_type)
    else:
        fetch = fetch or text["hf_model_pretrained"]
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=not fetch)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"text_cfg.hf_model_name {name}: no configuration found on this machine",
                "name a local directory with config.json, or give text_cfg.hf_config inline",
            ) from error
        if config.model_type not in arch_dict:
            raise ConfigError(
                f"open_clip cannot wrap the text model type {config.model_type!r} of {name}",
                f"choose one of {', '.join(arch_dict)}",
            )
        folder = Path(name)
        if not text.get("hf_tokenizer_name") and any((folder / file).is_file() for file in TOKENIZER_FILES):
            text["hf_tokenizer_name"] = str(folder)
    settings = json.loads(config.to_json_string(use_diff=True))
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        settings.pop(key, None)
    # open_clip reads these from the loaded config; the diff drops them where they equal the class default.
    for key in ("vocab_size", "pad_token_id"):
        settings[key] = getattr(config, key)
    text["hf_config"] = settings


def complete_preprocess(cfg: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns the whole preprocess_cfg of an image tower: open_clip's defaults, overlaid by `given`."""
    defaults: dict[str, Any] = {
        "size": cfg["vision_cfg"].get("image_size", 224),
        "mode": "RGB",
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    known = {key: value for key, value in given.items() if key in PREPROCESS_KEYS and key != "size"}
    known = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
    return defaults | {key: value for key, value in known.items() if value is not None}


def construct(model_cfg: dict[str, Any], log_scale: float, bias: float | None) -> CustomTextCLIP:
    """Returns the randomly initialised model in fp32, drawing from torch's global generator.

    Scale and bias have shape (1,). Raises ConfigError where open_clip, timm or transformers refuse.
    """
    cfg = copy.deepcopy(model_cfg)
    cfg.pop("custom_text", None)
    cfg |= {"init_logit_scale": log_scale, "init_logit_bias": bias, "nonscalar_logit_scale": True}
    settings = cfg["text_cfg"].pop("hf_config", None)
    with tempfile.TemporaryDirectory() as folder:
        if settings is not None and not cfg["text_cfg"]["hf_model_pretrained"]:
            # open_clip's wrapper adds or omits the model's own pooler correctly only when it reads the
            # configuration from a folder.
            (Path(folder) / "config.json").write_text(json.dumps(settings))
            cfg["text_cfg"]["hf_model_name"] = folder
        try:
            clip = CustomTextCLIP(**cfg)
        except (
            TypeError,
            ValueError,
            KeyError,
            AssertionError,
            ArithmeticError,
            RuntimeError,
            OSError,
        ) as error:
            reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            raise ConfigError(
                f"the model cannot be built: {reason}",
                "check model.embed_dim, model.vision_cfg and model.text_cfg",
            ) from error
    return clip.float()
