"""`load` and `export` for every kind of MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.checkpoint import CheckpointStore
from clipkit.dist import World
from clipkit.export import export, load, save_open_clip
from clipkit.models import Towers, WeightEMA, build
from clipkit.types import ClipkitError, ConfigError
from tests.models.test_tokenizers import local_tokenizer
from tests.models.test_tower_init import pretend_tag
from tests.models.test_towers import ROBERTA, model_cfg

CAPTIONS = ["a red kite", "two small dogs"]


def run_folder(path: Path, towers: Towers, ema: WeightEMA | None = None, step: int = 1) -> Path:
    """A run directory with one checkpoint, as training writes it."""
    state = {f"towers.{name}": x for name, x in towers.state_dict().items()}
    if ema is not None:
        state |= {f"ema.{name}": x for name, x in ema.state_dict().items()}
    store = CheckpointStore(path / "checkpoints", World())
    store.prepare()
    trainer = {
        "model_cfg": towers.model_cfg,
        "preprocess_cfg": towers.preprocess_cfg,
        "tokenizer": towers.tokenizer_spec,
    }
    store.save(
        step,
        tensors={"model": state},
        rank_tensors={"seed": torch.zeros(1)},
        documents={"trainer": trainer, "data": {}},
        identity={},
    )
    (path / "config.yaml").write_text("run: {}\n")
    return path


def vectors(model: Any) -> Any:
    return model.encode_text(CAPTIONS)


def of(towers: Towers) -> Any:
    with torch.no_grad():
        return towers.eval().text(towers.tokenizer(CAPTIONS)[:, :8])[1]


def test_an_exported_directory(tmp_path: Path) -> None:
    towers = build(model_cfg(), bias=-10.0)
    out = save_open_clip(towers, tmp_path / "out")
    model = load(out, device="cpu")
    assert torch.equal(vectors(model), of(towers))
    assert model.name == str(out)
    assert model.logit_bias == -10.0


def test_a_run_directory_gives_the_newest_averaged_or_raw_weights(tmp_path: Path) -> None:
    towers = build(model_cfg(text=ROBERTA), bias=-10.0)
    run = run_folder(tmp_path / "run", towers)
    assert torch.equal(vectors(load(run, device="cpu")), of(towers))
    with pytest.raises(ConfigError, match="no averaged weights"):
        load(run, weights="ema")
    ema = WeightEMA(towers)
    with torch.no_grad():
        towers.clip.text.proj[0].weight.normal_()
    run_folder(run, towers, ema, step=2)
    raw = of(towers)
    ema.towers.requires_grad_(True)  # torch rounds differently without it
    averaged = of(ema.towers)
    assert not torch.equal(raw, averaged)
    for weights, expected in (("auto", averaged), ("ema", averaged), ("raw", raw)):
        assert torch.equal(vectors(load(run, device="cpu", weights=weights)), expected)
    out = export(run, tmp_path / "out")
    torch.testing.assert_close(vectors(load(out, device="cpu")), averaged, rtol=0, atol=1e-6)
    assert (out / "clipkit_config.yaml").read_text().strip() == "run: {}"
    (newest,) = (path for path in (run / "checkpoints").iterdir() if path.name.endswith("2"))
    assert torch.equal(vectors(load(newest, device="cpu", weights="raw")), raw)


def test_a_tokenizer_kept_in_the_run_directory_wins_over_its_origin(tmp_path: Path) -> None:
    small = {"context_length": 16, "vocab_size": 13, "width": 32, "heads": 2, "layers": 1}
    origin = tmp_path / "origin"
    towers = build(
        model_cfg(text=small | {"pool_type": "eos", "eos_id": 2}), tokenizer=local_tokenizer(origin)
    )
    run = run_folder(tmp_path / "run", towers)
    assert torch.equal(vectors(load(run, device="cpu")), of(towers))
    towers.tokenizer.save(run / "tokenizer")
    for path in origin.iterdir():
        path.unlink()
    origin.rmdir()
    assert torch.equal(vectors(load(run, device="cpu")), of(towers))


def test_a_pretrained_tag_brings_its_own_normalisation_and_gelu(tmp_path: Path, monkeypatch: Any) -> None:
    source = build(model_cfg() | {"quick_gelu": True})
    pretend_tag(monkeypatch, source, tmp_path / "tag.safetensors", quick_gelu=True, mean=(0.5, 0.5, 0.5))
    model = load("tiny:made", device="cpu")
    assert model.towers.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    assert torch.equal(vectors(model), of(source))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    for model, words in (
        (tmp_path / "empty", "neither an exported model nor checkpoints"),
        (tmp_path / "nowhere", "is no directory"),
        (tmp_path / "young", "no checkpoint yet"),
        ("ViT-B-32:nope", "no weights"),
        ("ViT-B-32", "name:tag"),
    ):
        with pytest.raises(ConfigError, match=words):
            load(model)
    with pytest.raises(ConfigError, match="weights"):
        load(tmp_path, weights="best")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", build(model_cfg()))
    (checkpoint,) = (path for path in (run / "checkpoints").iterdir() if path.is_dir())
    (checkpoint / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ClipkitError, match="intact"):
        load(run)
