"""Trunk and joint of every kind of tower, pixels, precision, trimming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipkit.models import Towers, build
from clipkit.models.checks import trimmed_length
from clipkit.models.trunk import Cut
from clipkit.types import ConfigError

ROBERTA = {
    "context_length": 24,
    "hf_proj_type": "mlp",
    "hf_config": {
        "model_type": "roberta",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
    },
}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CAPTIONS = ["a cat", "two dogs on the beach!", ""]

IMAGE_TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tok": (VIT, 32),
    "vit_avg": (VIT | {"pool_type": "avg", "final_ln_after_pool": True}, 32),
    "vit_attentional_pool": (VIT | {"attentional_pool": True, "attn_pooler_heads": 2}, 16),
    "timm_vit": ({"timm_model_name": "test_vit", "image_size": 160}, 64),
    "timm_vit_mlp": ({"timm_model_name": "test_vit", "image_size": 160, "timm_proj": "mlp"}, 64),
    "timm_resnet": ({"timm_model_name": "test_resnet", "image_size": 64}, 96),
    "timm_attention_pool": (
        {"timm_model_name": "test_efficientnet", "image_size": 160, "timm_pool": "abs_attn"},
        16,
    ),
    "timm_own_head": ({"timm_model_name": "test_vit", "image_size": 160, "timm_proj": None}, 16),
    "modified_resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}, 16),
}
TEXT_TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "causal": (TEXT, 32),
    "eos": (TEXT | {"pool_type": "eos", "eos_id": 49407}, 32),
    "biased_projection": (TEXT | {"proj_bias": True}, 32),
    "embed_cls": (TEXT | {"embed_cls": True}, 32),
    "siglip_like": (TEXT | {"no_causal_mask": True, "pool_type": "last"}, 32),
    "bidirectional_argmax": (TEXT | {"no_causal_mask": True}, 32),
    "roberta_mean": (ROBERTA, 32),
    "roberta_cls_linear": (ROBERTA | {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}, 32),
}
TRIMMED = {"causal", "eos", "biased_projection", "roberta_mean", "roberta_cls_linear"}


def model_cfg(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"embed_dim": 16, "vision_cfg": dict(vision or VIT), "text_cfg": dict(text or TEXT)}


def pixels_for(towers: Towers, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (rows, 3, *towers.image_size), generator=generator, dtype=torch.uint8)


def normalised_by_hand(towers: Towers, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(towers.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("kind", IMAGE_TOWERS)
def test_projection_of_the_image_trunk_is_the_encoding_bit_for_bit(kind: str) -> None:
    vision, width = IMAGE_TOWERS[kind]
    towers = build(model_cfg(vision=vision)).eval()
    pixels = pixels_for(towers)
    with torch.no_grad():
        trunk, joint = towers.image(pixels)
        encoded = towers.clip.encode_image(normalised_by_hand(towers, pixels))
        _, _, cut = towers.part("image")
        assert torch.equal(cut.project(towers.clip.visual, trunk), encoded)
    assert trunk.shape == (3, width)
    assert towers.image_trunk_dim == width
    assert torch.equal(joint, nn.functional.normalize(encoded, dim=-1))
    joint_only = kind in ("timm_attention_pool", "timm_own_head", "modified_resnet")
    assert any("trunk = joint" in note for note in towers.notes) == joint_only


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_projection_of_the_text_trunk_is_the_encoding_bit_for_bit(kind: str) -> None:
    text, width = TEXT_TOWERS[kind]
    towers = build(model_cfg(text=text)).eval()
    tokens = towers.tokenizer(CAPTIONS)
    with torch.no_grad():
        trunk, joint = towers.text(tokens)
        encoded = towers.clip.encode_text(tokens)
        _, _, cut = towers.part("text")
        assert torch.equal(cut.project(towers.clip.text, trunk), encoded)
    assert trunk.shape == (3, width)
    assert towers.text_trunk_dim == width
    assert torch.equal(joint, nn.functional.normalize(encoded, dim=-1))


@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_trimming_is_exact_where_it_is_declared_and_refused_elsewhere(kind: str) -> None:
    towers = build(model_cfg(text=TEXT_TOWERS[kind][0])).double().eval()
    tokens = towers.tokenizer(CAPTIONS)
    if kind not in TRIMMED:
        assert towers.text_trim is None
        assert any("no trimming" in note for note in towers.notes)
        with pytest.raises(ValueError, match="needs exactly"):
            towers.text(tokens[:, :8])
        return
    assert towers.text_trim is not None
    length = trimmed_length(tokens, towers.text_trim, towers.context_length)
    assert length == 8
    with torch.no_grad():
        torch.testing.assert_close(
            towers.text(tokens[:, :length])[1], towers.text(tokens)[1], rtol=0, atol=1e-14
        )


def test_the_self_check_catches_a_tower_that_wrongly_declares_trimming(monkeypatch: Any) -> None:
    from clipkit.models import towers as module

    real = module.cut_text

    def lying(tower: nn.Module, embed_dim: int) -> Cut:
        cut = real(tower, embed_dim)
        return Cut(cut.trunk, cut.project, cut.dim, cut.projection, cut.frozen, trims=True)

    monkeypatch.setattr(module, "cut_text", lying)
    towers = build(model_cfg(text=TEXT_TOWERS["siglip_like"][0]))
    assert towers.text_trim is None
    assert any("tokens differ by" in note for note in towers.notes)


def test_trimmed_length_is_the_longest_row_rounded_up_to_eight() -> None:
    tokens = torch.zeros(2, 30, dtype=torch.long)
    tokens[0, :9] = torch.tensor([3, 5, 5, 0, 5, 5, 5, 5, 9])
    tokens[1, :4] = torch.tensor([3, 5, 5, 9])
    assert trimmed_length(tokens, "argmax", 30) == 16
    assert trimmed_length(tokens, 0, 30) == 16
    assert trimmed_length(tokens[1:], 0, 30) == 8
    assert trimmed_length(tokens, 0, 12) == 12
    assert trimmed_length(torch.zeros(1, 30, dtype=torch.long), 0, 30) == 8


@pytest.mark.parametrize("text", [TEXT, ROBERTA], ids=["native", "roberta"])
def test_a_double_precision_model_stays_in_double(text: dict[str, Any]) -> None:
    towers = build(model_cfg(text=text)).double()
    for trunk, joint in (towers.image(pixels_for(towers)), towers.text(towers.tokenizer(CAPTIONS))):
        assert trunk.dtype == joint.dtype == torch.float64
        torch.testing.assert_close(joint.norm(dim=-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("text", [TEXT, ROBERTA], ids=["native", "roberta"])
def test_under_autocast_the_joint_is_normalised_in_fp32(text: dict[str, Any]) -> None:
    towers = build(model_cfg(text=text)).eval()
    exact = towers.image(pixels_for(towers))[1]
    with torch.autocast("cpu", torch.bfloat16):
        image, words = towers.image(pixels_for(towers))[1], towers.text(towers.tokenizer(CAPTIONS))[1]
    for joint in (image, words):
        assert joint.dtype == torch.float32
        torch.testing.assert_close(joint.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(image, exact, rtol=0, atol=0.05)


def test_stochastic_towers_draw_in_training_and_only_there() -> None:
    towers = build(model_cfg(vision=VIT | {"patch_dropout": 0.5}, text=ROBERTA))
    pixels, tokens = pixels_for(towers), towers.tokenizer(CAPTIONS)
    for encode, x in ((towers.image, pixels), (towers.text, tokens)):
        towers.train()
        torch.manual_seed(3)
        first, second = encode(x)[1], encode(x)[1]
        torch.manual_seed(3)
        assert not torch.equal(first, second)
        assert torch.equal(first, encode(x)[1])
        towers.eval()
        assert torch.equal(encode(x)[1], encode(x)[1])


def test_pixels_must_be_uint8() -> None:
    towers = build(model_cfg())
    with pytest.raises(TypeError, match="uint8"):
        towers.image(torch.zeros(1, 3, 32, 32))


def test_a_preprocess_cfg_decides_the_normalisation() -> None:
    grey = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]}
    towers = build({"model_cfg": model_cfg(), "preprocess_cfg": grey}).eval()
    pixels = pixels_for(towers)
    by_hand = (pixels / 255 - 0.5) / torch.tensor([0.5, 0.25, 0.5]).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(towers.image(pixels)[1], towers.clip.encode_image(by_hand, normalize=True))
    assert towers.preprocess_cfg["size"] == 32


def test_the_scale_has_one_dimension_and_is_clamped() -> None:
    towers = build(model_cfg(), log_scale=2.0, bias=-10.0)
    assert towers.logit_scale.shape == (1,)
    assert towers.logit_bias is not None
    assert towers.logit_bias.tolist() == [-10.0]
    for start, end in ((7.0, 4.605170185988092), (-1.0, 0.0), (2.0, 2.0)):
        towers.logit_scale.data.fill_(start)
        towers.clamp_scale()
        assert towers.logit_scale.item() == pytest.approx(end)
    assert build(model_cfg()).logit_bias is None


def test_a_deepcopy_uses_its_own_weights() -> None:
    towers = build(model_cfg()).eval()
    twin = copy.deepcopy(towers)
    before = twin.text(twin.tokenizer(CAPTIONS))[1]
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.zero_()
    assert torch.equal(twin.text(twin.tokenizer(CAPTIONS))[1], before)


def test_building_leaves_batchnorm_statistics_untouched() -> None:
    towers = build(model_cfg(vision=IMAGE_TOWERS["timm_resnet"][0]))
    for name, buffer in towers.named_buffers():
        if name.endswith("running_mean"):
            assert not buffer.any()
    assert towers.training


def test_batchnorm_is_converted_frozen_or_refused() -> None:
    from clipkit.models import TowerOptions

    vision = IMAGE_TOWERS["timm_resnet"][0]
    assert any("global batch" in note for note in build(model_cfg(vision=vision)).notes)
    with pytest.raises(ConfigError, match="micro_batch"):
        build(model_cfg(vision=vision), micro_batch=True)
    frozen = build(model_cfg(vision=vision), micro_batch=True, image=TowerOptions(freeze="trunk")).train()
    assert any("running statistics" in note for note in frozen.notes)
    before = {name: x.clone() for name, x in frozen.named_buffers()}
    frozen.image(pixels_for(frozen))
    assert all(torch.equal(before[name], x) for name, x in frozen.named_buffers())
