"""Frozen parts: which parameters, which mode, which graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from clipkit.models import TowerOptions, Towers, build
from clipkit.types import ConfigError
from tests.models.test_towers import CAPTIONS, IMAGE_TOWERS, ROBERTA, TEXT, VIT, model_cfg, pixels_for

# kind -> (config, parameters that train when the trunk is frozen)
PROJECTIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "native": (model_cfg(), {"visual.proj", "text.text_projection"}),
    "timm_roberta": (
        model_cfg(IMAGE_TOWERS["timm_resnet"][0], ROBERTA),
        {"visual.head.proj.weight", "text.proj.0.weight", "text.proj.2.weight"},
    ),
    "biased": (
        model_cfg(IMAGE_TOWERS["timm_vit_mlp"][0], TEXT | {"proj_bias": True}),
        {
            *(f"visual.head.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight")),
            *("text.text_projection.weight", "text.text_projection.bias"),
        },
    ),
    "joint": (model_cfg(IMAGE_TOWERS["modified_resnet"][0]), {"text.text_projection"}),
}


def trainable(towers: Towers) -> set[str]:
    return {name for name, p in towers.clip.named_parameters() if p.requires_grad} - {"logit_scale"}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_frozen_trunk_leaves_exactly_the_projection_trainable(kind: str) -> None:
    cfg, expected = PROJECTIONS[kind]
    towers = build(cfg, image=TowerOptions(freeze=True), text=TowerOptions(freeze="trunk"))
    assert trainable(towers) == expected
    image_trunk, image = towers.image(pixels_for(towers))
    text_trunk, text = towers.text(towers.tokenizer(CAPTIONS))
    assert not image_trunk.requires_grad
    assert not text_trunk.requires_grad
    (image.sum() + text.sum()).backward()
    assert {n for n, p in towers.clip.named_parameters() if p.grad is not None} == expected


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    cfg = model_cfg(VIT | {"patch_dropout": 0.5}, ROBERTA)
    towers = build(cfg, image=TowerOptions(freeze="trunk"), text=TowerOptions(freeze="trunk"))
    for mode in (True, False, True):
        towers.train(mode)
        assert not towers.clip.visual.patch_dropout.training
        assert not towers.clip.text.transformer.training
        assert towers.clip.text.proj.training == mode
        assert towers.training == mode
    pixels, tokens = pixels_for(towers), towers.tokenizer(CAPTIONS)
    assert torch.equal(towers.image(pixels)[1], towers.image(pixels)[1])
    assert torch.equal(towers.text(tokens)[1], towers.text(tokens)[1])


def test_all_freezes_the_projection_too_and_only_that_tower() -> None:
    towers = build(model_cfg(), image=TowerOptions(freeze="all"))
    assert all(name.startswith("text.") for name in trainable(towers))
    assert not towers.image(pixels_for(towers))[1].requires_grad
    assert towers.text(towers.tokenizer(CAPTIONS))[1].requires_grad
    assert "image: the whole tower is frozen AT RANDOM WEIGHTS (no init was given)" in towers.notes


def test_a_projection_that_came_with_the_weights_is_frozen_with_the_trunk(tmp_path: Path) -> None:
    source = build(model_cfg())
    file = str(tmp_path / "whole.safetensors")
    save_file(source.clip.state_dict(), file)
    towers = build(
        model_cfg(), image=TowerOptions(init=file, freeze="trunk"), text=TowerOptions(freeze="trunk")
    )
    assert trainable(towers) == {"text.text_projection"}
    without = {n: x for n, x in source.clip.state_dict().items() if n != "visual.proj"}
    save_file(without, file)
    towers = build(model_cfg(), image=TowerOptions(init=file, freeze="trunk"))
    assert "visual.proj" in trainable(towers)
    assert "image: trunk frozen, the projection trains" in towers.notes


def test_an_unknown_way_to_freeze_is_refused() -> None:
    with pytest.raises(ConfigError, match="trunk"):
        build(model_cfg(), image=TowerOptions(freeze="half"))
