"""Where each kind of tower is cut: trunk (pooled features, F) and joint projection (D).

open_clip's towers return projected features only. A `Cut` holds module-level functions that take the
tower as an argument (never bound methods or closures), so that a deepcopy of a model uses its own modules.
For every cut, `project(tower, trunk(tower, x))` runs the same operations as `tower(x)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from clipkit.types import ConfigError

TowerFunction = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """How one tower is used in two steps.

    trunk       (tower, input) -> (B, F)
    project     (tower, (B, F)) -> (B, D), not normalised
    dim         F
    projection  parameter names, or prefixes ending in a dot, that belong to the projection
    frozen      submodule that stays in eval mode when the trunk is frozen; "" is the whole tower
    note        a line for the banner, or ""
    trims       True when the tower declares that padding after the text cannot reach its output
    """

    trunk: TowerFunction
    project: TowerFunction
    dim: int
    projection: tuple[str, ...]
    frozen: str = ""
    note: str = ""
    trims: bool = False

    def in_projection(self, name: str) -> bool:
        """Returns whether the parameter `name` of the tower belongs to its joint projection."""
        return any(name.startswith(part) if part.endswith(".") else name == part for part in self.projection)


def _whole(tower: nn.Module, x: Tensor) -> Tensor:
    return tower(x)


def _as_is(tower: nn.Module, trunk: Tensor) -> Tensor:
    return trunk


def _vit_trunk(tower: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(tower, VisionTransformer)
    return tower._pool(tower.transformer(tower._embeds(x)))[0]


def _vit_project(tower: nn.Module, trunk: Tensor) -> Tensor:
    assert isinstance(tower, VisionTransformer)
    return trunk @ tower.proj


def _timm_trunk(tower: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(tower, TimmModel)
    return tower.trunk(x)


def _timm_project(tower: nn.Module, trunk: Tensor) -> Tensor:
    assert isinstance(tower, TimmModel)
    return tower.head(trunk)


def _text_trunk(tower: nn.Module, tokens: Tensor) -> Tensor:
    """TextTransformer.forward up to its projection, with the causal mask cut to the length of the text."""
    assert isinstance(tower, TextTransformer)
    x, mask = tower._embeds(tokens)
    if mask is not None and mask.ndim == 2:
        mask = mask[: x.shape[1], : x.shape[1]]
    x = tower.transformer(x, attn_mask=mask)
    if tower.cls_emb is not None:
        return tower.ln_final(text_global_pool(x, pool_type="last"))
    return text_global_pool(tower.ln_final(x), tokens, tower.pool_type, eos_token_id=tower.eos_id)


def _text_project(tower: nn.Module, trunk: Tensor) -> Tensor:
    assert isinstance(tower, TextTransformer)
    projection = tower.text_projection
    if projection is None:
        return trunk
    return projection(trunk) if isinstance(projection, nn.Linear) else trunk @ projection


def _hf_trunk(tower: nn.Module, tokens: Tensor) -> Tensor:
    assert isinstance(tower, HFTextEncoder)
    mask = (tokens != tower.config.pad_token_id).long()
    return tower.pooler(tower.transformer(input_ids=tokens, attention_mask=mask), mask)


def _hf_project(tower: nn.Module, trunk: Tensor) -> Tensor:
    assert isinstance(tower, HFTextEncoder)
    return tower.proj(trunk)


def cut_image(tower: nn.Module, embed_dim: int) -> Cut:
    """Returns the cut of an open_clip image tower whose output is (B, `embed_dim`)."""
    joint = Cut(_whole, _as_is, embed_dim, ())
    if isinstance(tower, VisionTransformer):
        if tower.pool_type == "none":
            raise ConfigError(
                "the image tower pools no tokens (pool_type none), so it has no (B, D) output",
                "set vision_cfg.pool_type to tok or avg, and attentional_pool to true or false",
            )
        width = tower.proj.shape[0]
        return Cut(_vit_trunk, _vit_project, width, ("proj",))
    if isinstance(tower, TimmModel):
        layers = dict(tower.head.named_children())
        if "pool" in layers:
            return _noted(joint, "its attention pool already ends in the joint projection")
        if "proj" in layers:
            return Cut(_timm_trunk, _timm_project, tower.head.proj.in_features, ("head.",), "trunk")
        if "mlp" in layers:
            return Cut(_timm_trunk, _timm_project, tower.head.mlp.fc1.in_features, ("head.",), "trunk")
        return _noted(joint, "the timm model's own head is the projection")
    return _noted(joint, f"{type(tower).__name__} has no separate projection")


def _noted(cut: Cut, reason: str) -> Cut:
    return Cut(cut.trunk, cut.project, cut.dim, (), note=f"image: trunk = joint, because {reason}")


def cut_text(tower: nn.Module, embed_dim: int) -> Cut:
    """Returns the cut of an open_clip text tower, and whether it declares that trimming is exact."""
    if isinstance(tower, TextTransformer):
        trims = tower.attn_mask is not None and tower.cls_emb is None and tower.pool_type in ("argmax", "eos")
        if tower.pool_type == "none" and tower.cls_emb is None:
            raise ConfigError(
                "the text tower pools no tokens (pool_type none), so it has no (B, D) output",
                "set text_cfg.pool_type to argmax, eos, first or last",
            )
        return Cut(
            _text_trunk, _text_project, tower.width, ("text_projection", "text_projection."), trims=trims
        )
    if isinstance(tower, HFTextEncoder):
        masked = isinstance(tower.pooler, MeanPooler | ClsPooler | ClsLastHiddenStatePooler)
        return Cut(_hf_trunk, _hf_project, hf_width(tower), ("proj.",), "transformer", trims=masked)
    raise ConfigError(
        f"a text tower of type {type(tower).__name__} is not supported",
        "use open_clip's own text tower or a transformers encoder (text_cfg.hf_model_name)",
    )


def hf_width(tower: HFTextEncoder) -> int:
    """Returns F of a transformers text tower."""
    return int(getattr(tower.config, "hidden_size", None) or tower.config.d_model)


def normalised(x: Tensor) -> Tensor:
    """Returns the rows of `x` at length one, at least fp32, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return nn.functional.normalize(wide, dim=-1)
