"""Initial weights: whole models, single towers, bare backbones, older files, and what does not fit."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from clipkit.export import load_towers, save_open_clip
from clipkit.models import TowerOptions, Towers, build
from clipkit.types import ConfigError
from tests.conftest import TINY_MODEL
from tests.models.test_towers import CAPTIONS, IMAGE_TOWERS, ROBERTA, TEXT, VIT, model_cfg


def same(a: Towers, b: Towers, part: str = "") -> bool:
    left, right = a.clip.state_dict(), b.clip.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left if name.startswith(part))


def directory(path: Path, towers: Towers, **document: Any) -> str:
    path.mkdir()
    state = {
        name: x.squeeze() if name == "logit_scale" else x for name, x in towers.clip.state_dict().items()
    }
    save_file(state, path / "open_clip_model.safetensors")
    cfg = {"model_cfg": towers.model_cfg, "preprocess_cfg": towers.preprocess_cfg, **document}
    (path / "open_clip_config.json").write_text(json.dumps(cfg))
    return str(path)


def test_a_whole_model_with_its_temperature_and_normalisation(tmp_path: Path) -> None:
    source = build({"model_cfg": model_cfg(), "preprocess_cfg": {"mean": [0.5] * 3}}, log_scale=3.25)
    towers = build(model_cfg(), init=directory(tmp_path / "model", source))
    assert same(source, towers)
    assert towers.logit_scale.tolist() == [3.25]
    assert towers.preprocess_cfg["mean"] == [0.5] * 3
    file = str(tmp_path / "model" / "open_clip_model.safetensors")
    assert same(source, build(model_cfg(), init=file))


def test_one_tower_leaves_the_other_and_the_temperature_alone(tmp_path: Path) -> None:
    source = build({"model_cfg": model_cfg(), "preprocess_cfg": {"mean": [0.5] * 3}}, log_scale=3.25)
    folder = directory(tmp_path / "model", source)
    towers = build(model_cfg(), image=TowerOptions(init=folder))
    assert same(source, towers, "visual.")
    assert not same(source, towers, "text.token_embedding")
    assert towers.logit_scale.item() == pytest.approx(2.65926)
    assert towers.preprocess_cfg["mean"] == [0.5] * 3
    towers = build(model_cfg(), text=TowerOptions(init=folder))
    assert same(source, towers, "text.")
    assert not same(source, towers, "visual.conv1")
    assert towers.preprocess_cfg["mean"] != [0.5] * 3


def test_a_tower_saved_on_its_own(tmp_path: Path) -> None:
    source = build(model_cfg())
    for part, option in (("visual", "image"), ("text", "text")):
        file = str(tmp_path / f"{part}.safetensors")
        save_file(source.clip.get_submodule(part).state_dict(), file)
        assert same(source, build(model_cfg(), **{option: TowerOptions(init=file)}), f"{part}.")


def test_bare_backbones_of_timm_and_transformers(tmp_path: Path) -> None:
    backbone = timm.create_model("test_vit", num_classes=10)
    file = str(tmp_path / "timm.safetensors")
    save_file(backbone.state_dict(), file)
    cfg = model_cfg(IMAGE_TOWERS["timm_vit"][0], ROBERTA)
    towers = build(cfg, image=TowerOptions(init=file))
    assert torch.equal(towers.clip.visual.trunk.blocks[0].attn.qkv.weight, backbone.blocks[0].attn.qkv.weight)
    source = build(cfg)
    save_file(
        {f"roberta.{n}": x for n, x in source.clip.text.transformer.state_dict().items()}
        | {"lm_head.bias": torch.zeros(3)},
        file,
    )
    towers = build(cfg, text=TowerOptions(init=file))
    assert same(source, towers, "text.transformer.")
    assert not same(source, towers, "text.proj.")


def test_an_older_clip_file_gives_the_same_embeddings(tmp_path: Path) -> None:
    torch.manual_seed(5)
    old = open_clip.model.CLIP(**model_cfg()).eval()
    file = str(tmp_path / "old.safetensors")
    save_file(old.state_dict(), file)
    towers = build(model_cfg(), init=file).eval()
    tokens = towers.tokenizer(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(towers.text(tokens)[1], old.encode_text(tokens, normalize=True))


@pytest.mark.parametrize("weights", ["raw", "averaged"])
def test_a_file_of_a_training_checkpoint(tmp_path: Path, weights: str) -> None:
    raw, averaged = build(model_cfg()), build(model_cfg())
    state = {f"towers.{name}": x for name, x in raw.state_dict().items()}
    if weights == "averaged":
        state |= {f"ema.towers.{name}": x for name, x in averaged.state_dict().items()}
    file = str(tmp_path / "model.safetensors")
    save_file(state, file)
    assert same(averaged if weights == "averaged" else raw, build(model_cfg(), init=file))


def test_other_image_sizes_and_shorter_texts_are_fitted(tmp_path: Path) -> None:
    source = build(model_cfg())
    folder = directory(tmp_path / "model", source)
    towers = build(model_cfg(VIT | {"image_size": 48}, TEXT | {"context_length": 8}), init=folder)
    assert towers.clip.visual.positional_embedding.shape == (37, 32)
    assert torch.equal(towers.clip.text.positional_embedding, source.clip.text.positional_embedding[:8])
    assert any("interpolated from 17 to 37" in note for note in towers.notes)
    assert any("first 8 of 16" in note for note in towers.notes)


def test_a_temperature_of_another_kind_of_loss_is_not_taken_over(tmp_path: Path) -> None:
    folder = directory(tmp_path / "model", build(model_cfg(), log_scale=4.5))
    towers = build(model_cfg(), init=folder, log_scale=2.3, bias=-10.0)
    assert towers.logit_scale.item() == pytest.approx(2.3)
    assert towers.logit_bias is not None
    assert towers.logit_bias.item() == -10.0
    assert any("temperature" in note for note in towers.notes)
    sigmoid = directory(tmp_path / "sigmoid", towers)
    again = build(model_cfg(), init=sigmoid)
    assert again.logit_scale.item() == pytest.approx(2.65926)
    assert again.logit_bias is None
    same_kind = build(model_cfg(), init=sigmoid, log_scale=1.0, bias=-3.0)
    assert same_kind.logit_scale.item() == pytest.approx(2.3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("text.ln_final.weight"), "missing text.ln_final.weight"),
        (lambda s: s.update({"visual.extra": torch.zeros(1)}), "unexpected visual.extra"),
        (lambda s: s.update({"visual.proj": torch.zeros(32, 8)}), r"shape visual.proj \(32, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, words: str) -> None:
    state = dict(build(model_cfg()).clip.state_dict())
    change(state)
    file = str(tmp_path / "bad.safetensors")
    save_file(state, file)
    with pytest.raises(ConfigError, match=words) as caught:
        build(model_cfg(), init=file)
    assert file in caught.value.cause


def test_unreadable_and_unknown_sources_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a tensor file")
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"x")
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, words in (
        (str(broken), "cannot be read"),
        (str(pickled), "not a .safetensors"),
        (str(empty), "open_clip_config.json"),
        (str(tmp_path / "nowhere"), "no such directory"),
        ("ViT-B-32:no_such_tag", "no weights"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(model_cfg(), init=source)


def test_the_other_gelu_is_refused_because_it_would_load_and_be_wrong(tmp_path: Path) -> None:
    folder = directory(tmp_path / "model", build(model_cfg() | {"quick_gelu": True}))
    with pytest.raises(ConfigError, match="quick_gelu: true"):
        build(model_cfg(), init=folder)
    assert build(model_cfg() | {"quick_gelu": True}, init=folder).image_size == (32, 32)


def pretend_tag(monkeypatch: Any, source: Towers, file: Path, **tag: Any) -> list[Any]:
    """Makes open_clip know the model `tiny` with the weights `tiny:made`; returns what gets fetched."""
    save_file(source.clip.state_dict(), file)
    fetched: list[Any] = []

    def fetch(cfg: Any) -> str:
        fetched.append(cfg)
        return str(file)

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", model_cfg())
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"made": tag})
    monkeypatch.setattr("clipkit.models.weights.download_pretrained", fetch)
    return fetched


def test_a_tag_is_fetched_only_when_named_and_fits_like_a_file(tmp_path: Path, monkeypatch: Any) -> None:
    source = build(model_cfg())
    fetched = pretend_tag(monkeypatch, source, tmp_path / "tag.safetensors", mean=(0.5, 0.5, 0.5))
    build("tiny")
    assert not fetched
    towers = build("tiny", init="tiny:made")
    assert len(fetched) == 1
    assert same(source, towers)
    assert towers.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(ConfigError, match="tags of tiny: made"):
        build("tiny", init="tiny:other")


def test_a_run_directory_stands_for_its_export(tmp_path: Path) -> None:
    source = build({"model_cfg": model_cfg(), "preprocess_cfg": {"mean": [0.5] * 3}}, log_scale=3.25)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no export/ yet") as caught:
        build(model_cfg(), image=TowerOptions(init=str(run)))
    assert f"clipkit export {run} OUT" in caught.value.cure
    directory(run / "export", source)
    towers = build(model_cfg(), image=TowerOptions(init=str(run)))
    assert same(source, towers, "visual.")
    assert towers.preprocess_cfg["mean"] == [0.5] * 3
    assert same(source, build(model_cfg(), init=str(run)))


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("content", ["command", "list", "other", "empty", "cut"])
def test_a_pickle_beside_a_config_is_not_executed(tmp_path: Path, content: str) -> None:
    folder = save_open_clip(build(TINY_MODEL), tmp_path / "model")
    (folder / "open_clip_model.safetensors").unlink()
    path = folder / "open_clip_pytorch_model.bin"
    held = {
        "command": Command(tmp_path / "canary"),
        "list": [1],
        "other": {"state_dict": {"a": 1}},
        "empty": {},
    }
    if content == "command":
        path.write_bytes(pickle.dumps(held["command"], protocol=2))
    else:
        torch.save(held.get(content, {"a": torch.ones(2)}), path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"open_clip_pytorch_model\.bin (cannot be read|is a pickle)"):
        load_towers(folder)
    assert not (tmp_path / "canary").exists()
