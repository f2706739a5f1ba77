"""The two towers: built from an open_clip configuration, cut into trunk and joint, frozen, clamped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from clipkit.dist import own_rows
from clipkit.models.architecture import complete_preprocess, construct, resolve
from clipkit.models.batchnorm import batchnorm_layers, convert_batchnorm
from clipkit.models.checks import (
    CHECK_CAPTIONS,
    check_cut,
    check_tokenizer,
    draws_random_numbers,
    settle_trim,
    takes_any_size,
)
from clipkit.models.tokenizer import Tokenizer, build_tokenizer
from clipkit.models.trunk import Cut, cut_image, cut_text, normalised
from clipkit.models.weights import (
    Weights,
    check_activation,
    load_model,
    load_tower,
    pretrained_source,
    read_weights,
)
from clipkit.types import ConfigError

MAX_LOG_SCALE = math.log(100.0)


@dataclass(frozen=True)
class TowerOptions:
    """What happens to one tower before training.

    init    weights of this tower: an open_clip directory, a .safetensors file or an open_clip `name:tag`
    freeze  False; "trunk" (or True): everything before the joint projection; "all": the projection as well
    """

    init: str | None = None
    freeze: bool | str = False

    @property
    def frozen(self) -> str:
        """ "", "trunk" or "all"; raises ConfigError for any other value of `freeze`."""
        values = {False: "", True: "trunk", "trunk": "trunk", "all": "all"}
        if self.freeze not in values:
            raise ConfigError(
                f"freeze: {self.freeze!r} is unknown", "use false, trunk (the same as true) or all"
            )
        return values[self.freeze]


class Towers(nn.Module):
    """An open_clip CustomTextCLIP with its pixels, tokens and frozen parts.

    clip            the model; what is exported
    model_cfg, preprocess_cfg   what the export writes; JSON-able
    embed_dim, image_size (height, width), context_length, image_trunk_dim, text_trunk_dim
    tokenizer       picklable, offline; tokenizer_spec says where it came from, JSON-able
    fixed_size      whether images of another size are resized before the image tower
    frozen          {"image", "text"} -> "", "trunk" or "all"
    text_trim       "argmax", a padding id, or None when texts must keep their full length
    notes           lines for the banner
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        clip: CustomTextCLIP,
        model_cfg: dict[str, Any],
        preprocess_cfg: dict[str, Any],
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.model_cfg, self.preprocess_cfg, self.tokenizer = model_cfg, preprocess_cfg, tokenizer
        self.embed_dim = int(model_cfg["embed_dim"])
        size = preprocess_cfg["size"]
        self.image_size = (
            (int(size), int(size)) if isinstance(size, int | float) else (int(size[0]), int(size[1]))
        )
        self.tokenizer_spec = tokenizer.describe()
        self.context_length = tokenizer.context_length
        self._image_cut = cut_image(clip.visual, self.embed_dim)
        self._text_cut = cut_text(clip.text, self.embed_dim)
        self.image_trunk_dim, self.text_trunk_dim = self._image_cut.dim, self._text_cut.dim
        self.text_trim: str | int | None = None
        self.notes: list[str] = [cut.note for cut in (self._image_cut, self._text_cut) if cut.note]
        self.fixed_size = True
        self.frozen = {"image": "", "text": ""}
        for name in ("mean", "std"):
            values = torch.tensor(preprocess_cfg[name], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(f"image_{name}", values, persistent=False)

    @property
    def stochastic(self) -> frozenset[str]:
        """The towers ("image", "text") that train and draw random numbers while they do."""
        return frozenset(
            part
            for part in ("image", "text")
            if self.frozen[part] != "all" and draws_random_numbers(self.part(part)[1])
        )

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the inverse temperature, shape (1,)."""
        return self.clip.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """The bias of sigmoid losses, shape (1,), or None."""
        return self.clip.logit_bias

    def image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns trunk (B, F) and joint (B, D), L2-normalised and at least fp32, of uint8 (B, 3, H, V)."""
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels must be uint8 (normalisation happens here), got {pixels.dtype}")
        # The order of operations of torchvision's ToTensor and Normalize, for equality to the last bit.
        x = pixels.to(self.image_mean.dtype).div(255).sub(self.image_mean).div(self.image_std)
        if self.fixed_size and tuple(x.shape[-2:]) != self.image_size:
            # Small crops of multi-crop: a tower with absolute positions reads one size only.
            x = nn.functional.interpolate(x, self.image_size, mode="bilinear", align_corners=False)
        return self._embed(self.clip.visual, self._image_cut, self.frozen["image"], x)

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Returns trunk (B, F) and joint (B, D), L2-normalised and at least fp32, of int64 (B, T)."""
        length = tokens.shape[1]
        if length > self.context_length or (length < self.context_length and self.text_trim is None):
            raise ValueError(f"texts of {length} tokens: this tower needs exactly {self.context_length}")
        return self._embed(self.clip.text, self._text_cut, self.frozen["text"], tokens)

    def embed(self, images: dict[str, Tensor], texts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns {"trunk.<view>": (B, F), "joint.<view>": (B, D)} of all views.

        Views of one shape go through a tower together: one kernel launch, and one set of BatchNorm
        statistics over all views, as SimCLR has it.
        """
        found: dict[str, Tensor] = {}
        for views, encode in ((images, self.image), (texts, self.text)):
            groups: dict[torch.Size, list[str]] = {}
            for name, x in views.items():
                groups.setdefault(x.shape[1:], []).append(name)
            for names in groups.values():
                rows = [views[name] for name in names]
                trunk, joint = encode(rows[0] if len(rows) == 1 else torch.cat(rows))
                for number, name in enumerate(names):
                    first = number * len(rows[0])
                    part = slice(first, first + len(rows[0]))
                    found[f"trunk.{name}"], found[f"joint.{name}"] = trunk[part], joint[part]
        return found

    def _embed(self, tower: nn.Module, cut: Cut, frozen: str, x: Tensor) -> tuple[Tensor, Tensor]:
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and not frozen):
            trunk = cut.trunk(tower, x)
        with torch.set_grad_enabled(grad and frozen != "all"):
            return trunk, normalised(cut.project(tower, trunk))

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the log-scale inside [0, log 100], in place."""
        own_rows(self.logit_scale).clamp_(0.0, MAX_LOG_SCALE)

    def train(self, mode: bool = True) -> Towers:
        """Sets the mode of everything except frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for part, how in self.frozen.items():
            _, tower, cut = self.part(part)
            if how:
                (tower if how == "all" else tower.get_submodule(cut.frozen)).eval()
        return self

    def part(self, part: str) -> tuple[str, nn.Module, Cut]:
        """Returns (name inside `clip`, module, cut) of "image" or "text"."""
        if part == "image":
            return "visual", self.clip.visual, self._image_cut
        return "text", self.clip.text, self._text_cut

    def freeze(self, part: str, how: str) -> None:
        """Freezes `part` ("image" or "text"): `how` is "trunk" (all before the projection) or "all".

        Sets requires_grad (so call it before wrapping and before building an optimizer) and the mode.
        """
        _, tower, cut = self.part(part)
        self.frozen[part] = how
        for name, parameter in tower.named_parameters():
            if how == "all" or (how and not cut.in_projection(name)):
                parameter.requires_grad_(False)
        self.train(self.training)


def build(
    model: str | dict[str, Any],
    *,
    image: TowerOptions | None = None,
    text: TowerOptions | None = None,
    init: str | None = None,
    log_scale: float = math.log(1 / 0.07),
    bias: float | None = None,
    micro_batch: bool = False,
    tokenizer: str | None = None,
) -> Towers:
    """Returns two towers, initialised, frozen and checked, in training mode.

    model        an open_clip name, an inline model_cfg, or {"model_cfg": .., "preprocess_cfg": ..}
    image, text  weights and freezing of one tower; they win over `init`
    init         weights of the whole model: an open_clip directory, a .safetensors file, or `name:tag`
    log_scale, bias   start of the temperature; `bias` None means the model has none
    micro_batch  True when embeddings are computed in several forwards, which BatchNorm cannot bear
    tokenizer    directory with files of a transformers tokenizer; None follows the model

    Nothing is downloaded unless an init names an open_clip tag or an inline configuration asks for
    pretrained timm or transformers weights. Raises ConfigError.
    """
    options = {"image": image or TowerOptions(), "text": text or TowerOptions()}
    names = [name for name in (init, *(o.init for o in options.values())) if name]
    fetch = any(not Path(name).exists() and pretrained_source(name) for name in names)
    architecture = resolve(model, tokenizer, fetch)
    cfg = architecture.model_cfg
    words = build_tokenizer(cfg["text_cfg"], tokenizer, fetch)
    if tokenizer:
        cfg["text_cfg"]["hf_tokenizer_name"] = cfg["text_cfg"].get("hf_tokenizer_name") or "tokenizer"
    cfg["init_logit_scale"] = log_scale
    cfg.pop("init_logit_bias", None)
    if bias is not None:
        cfg["init_logit_bias"] = bias
    clip = construct(cfg, log_scale, bias)
    fetched = {"image": "timm_model_pretrained", "text": "hf_model_pretrained"}
    trained = {
        part: bool(cfg[section].get(key))
        for (part, key), section in zip(fetched.items(), ("vision_cfg", "text_cfg"), strict=True)
    }
    sources = {name: read_weights(name) for name in names}
    pixels = _pixels(clip, trained["image"], sources.get(options["image"].init or init or ""))
    for section, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        # What is saved must rebuild without fetching: the weights follow from the state dict.
        if key in cfg[section]:
            cfg[section][key] = False
    towers = Towers(clip, cfg, complete_preprocess(cfg, pixels | architecture.preprocess_cfg), words)
    towers.notes[:0] = architecture.notes
    projected = _initialise(towers, options, init, sources)
    for part in ("image", "text"):
        given = trained[part] or bool(init or options[part].init)
        _freeze(towers, part, options[part].frozen, given, projected[part])
        _settle_batchnorm(towers, part, micro_batch)
    _check(towers)
    return towers.train()


def _pixels(clip: CustomTextCLIP, trained: bool, weights: Weights | None) -> dict[str, Any]:
    """Returns the normalisation that the image weights were trained with, as far as it is known."""
    if weights is not None:
        return dict(weights.preprocess_cfg)
    settings = getattr(getattr(clip.visual, "trunk", None), "pretrained_cfg", None) if trained else None
    return {key: list(settings[key]) for key in ("mean", "std")} if settings else {}


def _initialise(
    towers: Towers, options: dict[str, TowerOptions], init: str | None, sources: dict[str, Weights]
) -> dict[str, bool]:
    """Copies initial weights into the towers; returns which projections they brought along."""
    projected = {"image": init is not None, "text": init is not None}
    if init:
        check_activation(towers.model_cfg, sources[init])
        towers.notes += load_model(towers.clip, sources[init])
    for part in ("image", "text"):
        source = options[part].init
        if source:
            name, _, cut = towers.part(part)
            check_activation(towers.model_cfg, sources[source])
            loaded, notes = load_tower(towers.clip, name, sources[source], cut.frozen, cut.in_projection)
            projected[part] = projected[part] or loaded
            towers.notes += notes
    return projected


def _freeze(towers: Towers, part: str, how: str, given: bool, projected: bool) -> None:
    """Freezes one tower; a projection that came with the weights is frozen with the trunk."""
    if not how:
        return
    _, _, cut = towers.part(part)
    if how == "trunk" and (projected or not cut.projection):
        how = "all"
    towers.freeze(part, how)
    what = "the whole tower is frozen" if how == "all" else "trunk frozen, the projection trains"
    towers.notes.append(f"{part}: {what}{'' if given else ' AT RANDOM WEIGHTS (no init was given)'}")


def _settle_batchnorm(towers: Towers, part: str, micro_batch: bool) -> None:
    """Freezes or converts the BatchNorm of one tower, or refuses it."""
    _, tower, _ = towers.part(part)
    layers = batchnorm_layers(tower)
    if not layers:
        return
    if towers.frozen[part]:
        towers.notes.append(f"{part}: {len(layers)} BatchNorm layers keep their running statistics (frozen)")
        return
    if micro_batch:
        raise ConfigError(
            f"data.micro_batch with BatchNorm in the {part} tower: parts of a batch have other statistics",
            f"remove data.micro_batch, set model.{part}.freeze: trunk, or choose a tower without BatchNorm",
        )
    convert_batchnorm(tower)
    towers.notes.append(f"{part}: {len(layers)} BatchNorm layers use the statistics of the global batch")


def _check(towers: Towers) -> None:
    """Runs an image and captions through the towers: what cannot work fails here, not in training."""
    towers.eval()
    height, width = towers.image_size
    picture = torch.arange(3 * height * width, dtype=torch.float32).view(1, 3, height, width).sin()
    check_cut("image", *towers.part("image")[1:], picture, towers.embed_dim)
    towers.fixed_size = not takes_any_size(towers.clip.visual, picture)
    check_tokenizer(towers.clip.text, towers.tokenizer)
    tokens = towers.tokenizer(CHECK_CAPTIONS)
    full = towers.tokenizer([*CHECK_CAPTIONS, "word " * towers.context_length])
    check_cut("text", *towers.part("text")[1:], full, towers.embed_dim)
    towers.text_trim, note = settle_trim(*towers.part("text")[1:], tokens, towers.tokenizer)
    if note:
        towers.notes.append(note)
