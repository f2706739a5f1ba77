"""Names and inline configurations: what is accepted, completed, and refused with a cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipkit.models import build
from clipkit.models.architecture import resolve
from clipkit.types import ConfigError
from tests.models.test_towers import ROBERTA, TEXT, VIT, model_cfg

REFUSED: dict[str, tuple[Any, str]] = {
    "name": ("ViT-B-33", "ViT-B-32"),
    "coca": ("coca_ViT-B-32", "CoCa"),
    "hub_text": ("roberta-ViT-B-32", "hf_config"),
    "hub_tokenizer": ("ViT-B-16-SigLIP", "nothing is downloaded"),
    "missing": ({"embed_dim": 16, "vision_cfg": VIT}, "text_cfg is missing"),
    "typo": (model_cfg(VIT | {"widht": 3}), "did you mean `width`"),
    "text_typo": (model_cfg(text=TEXT | {"head": 3}), "did you mean `heads`"),
    "hf_typo": (
        model_cfg(text=ROBERTA | {"hf_config": ROBERTA["hf_config"] | {"hiden_size": 3}}),  # type: ignore[operator]
        "did you mean `hidden_size`",
    ),
    "hf_type": (model_cfg(text=ROBERTA | {"hf_config": {"model_type": "gpt2"}}), "roberta"),
    "output_tokens": (model_cfg(VIT | {"output_tokens": True}), "output_tokens"),
    "vocabulary": (model_cfg(text=TEXT | {"vocab_size": 100}), "only 100"),
    "eos": (model_cfg(text=TEXT | {"pool_type": "eos"}), "eos_id: 49407"),
    "unpooled_text": (model_cfg(text=TEXT | {"pool_type": "none"}), "pool_type"),
    "unpooled_image": (model_cfg(VIT | {"pool_type": "none"}), "pool_type"),
    "heads": (model_cfg(VIT | {"head_width": 64}), "cannot be built"),
    "timm_name": (model_cfg({"timm_model_name": "no_such_model"}), "cannot be built"),
    "timm_size": (model_cfg({"timm_model_name": "vit_tiny_patch16_224", "image_size": 64}), "image_size"),
    "positions": (
        model_cfg(text=ROBERTA | {"hf_config": ROBERTA["hf_config"] | {"max_position_embeddings": 20}}),  # type: ignore[operator]
        "context_length",
    ),
    "padding": (
        model_cfg(text=ROBERTA | {"hf_config": ROBERTA["hf_config"] | {"pad_token_id": 1}}),  # type: ignore[operator]
        "pads with 0",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_work_is_refused_with_a_cure(kind: str) -> None:
    model, words = REFUSED[kind]
    with pytest.raises(ConfigError) as caught:
        build(model)
    assert words in str(caught.value)
    assert "\n" not in caught.value.cause
    assert "\n" not in caught.value.cure


def test_names_never_ask_for_pretrained_backbones() -> None:
    assert resolve("convnext_base").model_cfg["vision_cfg"]["timm_model_pretrained"] is False
    assert resolve(model_cfg(text=ROBERTA)).model_cfg["text_cfg"]["hf_model_pretrained"] is False


def test_the_configuration_is_plain_data_and_rebuilds_the_same_model() -> None:
    towers = build(model_cfg(text=ROBERTA), bias=-10.0)
    cfg = json.loads(json.dumps(towers.model_cfg))
    assert cfg["init_logit_bias"] == -10.0
    again = build({"model_cfg": cfg, "preprocess_cfg": towers.preprocess_cfg}, bias=-10.0)
    assert again.model_cfg == towers.model_cfg
    again.load_state_dict(towers.state_dict())


def test_the_caller_s_dict_is_not_changed() -> None:
    cfg = model_cfg(text=ROBERTA)
    before = json.dumps(cfg)
    build(cfg)
    assert json.dumps(cfg) == before


def test_a_local_directory_gives_the_text_configuration_and_weights(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(**{**ROBERTA["hf_config"], "vocab_size": 49408, "pad_token_id": 0})  # type: ignore[dict-item]
    pretrained = RobertaModel(config, add_pooling_layer=False)
    pretrained.save_pretrained(tmp_path)
    text = {"context_length": 24, "hf_model_name": str(tmp_path)}
    random = build(model_cfg(text=text))
    weights = pretrained.embeddings.word_embeddings.weight
    assert not weights.equal(random.clip.text.transformer.embeddings.word_embeddings.weight)
    towers = build(model_cfg(text=text | {"hf_model_pretrained": True}))
    assert weights.equal(towers.clip.text.transformer.embeddings.word_embeddings.weight)
    assert towers.model_cfg["text_cfg"]["hf_model_pretrained"] is False
