"""Recipes for real scales: their headers add up, and each rehearses and trains two steps, shrunk."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest

from clipkit.config import load_config
from clipkit.train import pretrain

RECIPES = sorted((Path(__file__).parents[1] / "configs" / "recipes").glob("*.yaml"))
# What a recipe asks of a cluster and a data set; everything else stays as it is written.
HERE: dict[str, Any] = {
    "data.index_dir": "null", "data.batch_size": 16, "data.micro_batch": "null", "data.workers": 0,
    "run.world_size": "null", "run.evaluate": "[]", "run.evaluate_every": "null", "run.precision": "fp32",
    "run.samples": "null", "run.epochs": "null", "run.steps": 2, "run.log_every": 1, "optim.warmup": 0,
    "model.image.init": "null", "model.init": "null",
}  # fmt: skip


def shrunk(name: str) -> dict[str, Any]:
    """The model_cfg of `name` with the same kinds of towers, small, and a tokenizer that needs no hub."""
    full = open_clip.get_model_config(name)
    assert full is not None
    vision, text = dict(full["vision_cfg"]), dict(full["text_cfg"])
    if "timm_model_name" in vision:
        vision |= {"timm_model_name": "test_vit", "image_size": 160}
    else:
        vision |= {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    if "hf_model_name" in text:
        config = {"model_type": "xlm-roberta", "vocab_size": 49408, "hidden_size": 32, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 80}
        text = {"hf_config": config, "hf_pooler_type": text["hf_pooler_type"], "context_length": 16}
    else:
        text |= {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        text.pop("hf_tokenizer_name", None)
    return {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}


def test_there_is_one_for_every_purpose() -> None:
    """Without them the tests below would be none."""
    names = " ".join(path.stem for path in RECIPES)
    for purpose in ("2m", "12m", "500m", "siglip", "lit", "finetune", "multilingual"):
        assert purpose in names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_header_adds_up(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    run = load_config(path).run
    assert "Expect:" in header
    assert "ot yet measured" in header
    speed = float(re.search(r"assumed ([\d,]+) samples/s", header)[1].replace(",", ""))  # type: ignore[index]
    pairs = re.search(r"(\d+e\d+) (?:pairs )?x \d+ epochs", header)
    pairs = pairs or re.search(r"(\d+e\d+) pairs x", header)
    samples = run.samples or (run.epochs or 0) * float(pairs[1] if pairs else "nan")
    hours = re.search(r"([\d,]+) GPU-hours", header)
    minutes = re.search(r"(\d+) minutes", header)
    stated = float(hours[1].replace(",", "")) if hours else float(minutes[1]) / 60  # type: ignore[index]
    assert samples / speed / 3600 == pytest.approx(stated, rel=0.03)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_rehearses_and_trains_two_steps(path: Path, tiny_shards: Path, tmp_path: Path) -> None:
    name = load_config(path).model.name
    assert name is not None
    (tmp_path / "small.yaml").write_text(
        f"extends: {path}\nmodel: {json.dumps({'name': None, **shrunk(name)})}\n"
    )
    overrides = [f"{key}={value}" for key, value in HERE.items()]
    overrides += [f"data.train={tiny_shards}", f"run.dir={tmp_path / 'run'}"]
    config = load_config(tmp_path / "small.yaml", overrides)
    written = load_config(path)
    assert (config.optim.lr, config.objectives) == (written.optim.lr, written.objectives)
    report = pretrain(config, dry_run=True)
    assert report["steps"] == 2
    assert report["samples_per_s"] > 0
    assert pretrain(config)["steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
