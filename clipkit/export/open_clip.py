"""An open_clip directory: open_clip_config.json, open_clip_model.safetensors and, if any, tokenizer files."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from clipkit.checkpoint.manifest import sync_folder
from clipkit.data import ImageView
from clipkit.dist import whole
from clipkit.models import Towers, build
from clipkit.models.tokenizer import has_tokenizer
from clipkit.models.weights import CONFIG_FILE, WEIGHTS_FILE, read_document
from clipkit.types import ClipkitError, ConfigError

TEXT_FOLDER = "hf_text"
RELOAD = Path(__file__).with_name("reload.py")
RELOAD_TIMEOUT_S = 600
CAPTIONS = [
    "a photo of a cat",
    "Two dogs & a ball, on the beach!",
    "",
    "naïve café — 東京 №5 😀",
    "a very long caption that goes on and on about everything in the picture " * 8,
]


def exported_config(towers: Towers, out: Path, hf_name: str | None = None) -> dict[str, Any]:
    """Returns the content of open_clip_config.json for towers that will live in `out`."""
    model_cfg = copy.deepcopy(towers.model_cfg)
    text = model_cfg["text_cfg"]
    text["context_length"] = towers.context_length
    if text.pop("hf_config", None) is not None:
        # open_clip looks a relative name up on the hub; only an absolute path or a hub id reaches a config.
        text["hf_model_name"] = hf_name or str(out.resolve() / TEXT_FOLDER)
    if towers.tokenizer_spec["kind"] == "byte_pair":
        text.pop("hf_tokenizer_name", None)
    for section in ("vision_cfg", "text_cfg"):
        model_cfg[section] = {key: value for key, value in model_cfg[section].items() if value is not None}
    return {"model_cfg": model_cfg, "preprocess_cfg": towers.preprocess_cfg}


def exported_tensors(towers: Towers) -> dict[str, Tensor]:
    """Returns the tensors of the model under open_clip's names, on the CPU, temperature 0-d.

    All ranks must call it when the towers are sharded.
    """
    tensors = {name: whole(x.detach()).to("cpu").contiguous() for name, x in towers.clip.state_dict().items()}
    for name in ("logit_scale", "logit_bias"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(())
    return tensors


def save_open_clip(
    towers: Towers,
    out: Path | str,
    *,
    extra_files: Mapping[str, str] | None = None,
    hf_name: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes `towers` as an open_clip directory and returns its absolute path.

    The directory appears whole, under a temporary name first; an earlier export of that name is replaced.
    extra_files: file name -> text, written beside the model. hf_name: what open_clip shall look up for a
    transformers text tower (a hub id or an absolute path); by default the copy inside `out`. tensors: the
    `exported_tensors`, where the caller has them.
    Raises ConfigError when `out` is something else than an export.
    """
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", "name a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{out} is not empty and holds no exported model", "name a directory that does not exist"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        save_file(
            dict(exported_tensors(towers) if tensors is None else tensors),
            temporary / WEIGHTS_FILE,
            metadata={"format": "pt"},
        )
        _write(towers, temporary, exported_config(towers, out, hf_name), dict(extra_files or {}))
        _replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _write(towers: Towers, folder: Path, document: dict[str, Any], extra_files: dict[str, str]) -> None:
    towers.tokenizer.save(folder)
    texts = {CONFIG_FILE: json.dumps(document, indent=2), **extra_files}
    settings = towers.model_cfg["text_cfg"].get("hf_config")
    if settings is not None:
        (folder / TEXT_FOLDER).mkdir()
        texts[f"{TEXT_FOLDER}/config.json"] = json.dumps(settings, indent=2)
    for name, content in texts.items():
        (folder / name).write_text(content + "\n", encoding="utf-8")
    # safetensors writes 0600; the folder was made under the umask, so its mode says what files may have.
    mode = folder.stat().st_mode & 0o666
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _replace(temporary: Path, out: Path) -> None:
    sync_folder(temporary)
    if out.is_dir():
        old = out.parent / f".{out.name}.{os.getpid()}.old"
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old)
    else:
        temporary.rename(out)
    sync_folder(out.parent)


def load_open_clip(path: Path | str) -> Towers:
    """Returns the towers of an open_clip directory on the CPU, without touching the random generators."""
    folder = Path(path)
    document = read_document(folder)
    model_cfg = document["model_cfg"]
    text = model_cfg.get("text_cfg") or {}
    if (folder / TEXT_FOLDER / "config.json").is_file():
        text.pop("hf_config", None)
        text["hf_model_name"] = str(folder.resolve() / TEXT_FOLDER)
    tokenizer = str(folder) if text.get("hf_tokenizer_name") and has_tokenizer(folder) else None
    return rebuild(document, init=str(folder), tokenizer=tokenizer)


def rebuild(document: dict[str, Any], init: str | None = None, tokenizer: str | None = None) -> Towers:
    """Returns the towers of {"model_cfg", "preprocess_cfg"} in evaluation mode, on the CPU.

    Temperature and bias start as `model_cfg` says; the random generators are left as they were.
    """
    cfg = copy.deepcopy(document["model_cfg"])
    for section, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        # All weights are at hand: a directory from elsewhere must not make this machine fetch others.
        if (cfg.get(section) or {}).get(key):
            cfg[section][key] = False
    log_scale = cfg.get("init_logit_scale")
    with torch.random.fork_rng(devices=[]):
        towers = build(
            {**document, "model_cfg": cfg},
            init=init,
            log_scale=math.log(1 / 0.07) if log_scale is None else float(log_scale),
            bias=cfg.get("init_logit_bias"),
            tokenizer=tokenizer,
        )
    return towers.eval()


def location_note(path: Path | str) -> str:
    """Returns the sentence that limits where open_clip can load the directory `path`, or ""."""
    name = read_document(Path(path))["model_cfg"].get("text_cfg", {}).get("hf_model_name")
    if not name or not Path(name).is_absolute():
        return ""
    return (
        f"open_clip loads this transformers text tower only while {name} exists "
        "(clipkit loads it anywhere; for other machines export with a hub id as hf_name)"
    )


def verify(path: Path | str, towers: Towers | None = None) -> dict[str, Any]:
    """Reloads an export in a fresh process through open_clip and compares; returns what was found.

    path    the exported directory
    towers  what it was made from; by default the directory as clipkit loads it
    Compared are tokens, embeddings of fixed random images and captions, and the temperature, all of them for
    equality to the last bit. Raises ClipkitError on any difference, or when open_clip cannot load it.
    """
    folder = Path(path).resolve()
    source = load_open_clip(folder) if towers is None else copy.deepcopy(towers).to("cpu", torch.float32)
    # As open_clip leaves it: frozen parameters take other matrix kernels, which round differently.
    source.eval().requires_grad_(True)
    view = ImageView.from_preprocess(source.preprocess_cfg, train=False)
    generator = np.random.default_rng(0)
    height, width = source.image_size
    sizes = [(height, width), (height + 17, width + 40), (2 * height, width), (max(8, height // 2), width)]
    pictures = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]
    images = torch.stack([view(Image.fromarray(picture)) for picture in pictures])
    tokens = source.tokenizer(CAPTIONS)
    with torch.no_grad():
        # Captions at full length, as open_clip reads them.
        ours = {"image": source.image(images)[1].numpy(), "text": source.text(tokens)[1].numpy()}
    ours |= {"tokens": tokens.numpy(), "logit_scale": source.logit_scale.detach().reshape(()).numpy()}
    if source.logit_bias is not None:
        ours["logit_bias"] = source.logit_bias.detach().reshape(()).numpy()
    theirs = _reload(folder, pictures)
    differences = {name: _difference(ours[name], theirs.get(name)) for name in ours}
    unequal = {name: value for name, value in differences.items() if value != 0.0}
    if unequal:
        listed = ", ".join(f"{name} by {value:.3g}" for name, value in unequal.items())
        raise ClipkitError(
            f"{folder} reloaded by open_clip differs in {listed}",
            "please report this with the model_cfg in open_clip_config.json",
        )
    return {
        "max_difference": differences,
        "images": len(pictures),
        "captions": len(CAPTIONS),
        "open_clip": str(theirs["version"]),
        "note": location_note(folder),
    }


def _difference(ours: Any, theirs: Any) -> float:
    if theirs is None or ours.shape != theirs.shape:
        return float("inf")
    value = float(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max())
    return value if np.isfinite(value) else float("inf")


def _reload(folder: Path, pictures: list[Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "captions.json").write_text(json.dumps(CAPTIONS), encoding="utf-8")
        np.savez(work / "pictures.npz", *pictures)
        # -P: the folder of the script holds a file named open_clip.py, which must not be found first.
        command = [sys.executable, "-P", str(RELOAD), str(folder), name, str(torch.get_num_threads())]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=RELOAD_TIMEOUT_S
            )
        except subprocess.TimeoutExpired as error:
            raise ClipkitError(
                f"open_clip did not load {folder} within {RELOAD_TIMEOUT_S} s",
                "try again on a machine that is free",
            ) from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ClipkitError(
                f"open_clip cannot load {folder}: {last}",
                "open_clip must find text_cfg.hf_model_name offline: export without hf_name",
            )
        with np.load(work / "embeddings.npz", allow_pickle=False) as arrays:
            return dict(arrays)
