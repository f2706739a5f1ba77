"""Export to an open_clip directory and back, equal to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipkit.data import ImageView
from clipkit.export import load_open_clip, location_note, reload, save_open_clip, verify
from clipkit.export.open_clip import CAPTIONS
from clipkit.models import Towers, build
from clipkit.types import ClipkitError, ConfigError
from tests.models.test_tokenizers import local_tokenizer
from tests.models.test_towers import IMAGE_TOWERS, ROBERTA, TEXT, VIT, model_cfg, pixels_for

SMALL = {"context_length": 16, "vocab_size": 13, "width": 32, "heads": 2, "layers": 1}
KINDS: dict[str, tuple[dict[str, Any], float | None]] = {
    "native": (model_cfg(), None),
    "siglip": (model_cfg(), -10.0),
    "quick_gelu_wide": (model_cfg(VIT | {"image_size": [32, 48]}) | {"quick_gelu": True}, None),
    "timm_vit": (model_cfg(IMAGE_TOWERS["timm_vit"][0]), None),
    "timm_resnet": (model_cfg(IMAGE_TOWERS["timm_resnet"][0]), -10.0),
    "modified_resnet": (model_cfg(IMAGE_TOWERS["modified_resnet"][0]), None),
    "roberta": (model_cfg(text=ROBERTA), None),
    "words": (model_cfg(text=SMALL | {"pool_type": "eos", "eos_id": 2}), None),
}


def trained(kind: str, folder: Path) -> Towers:
    """Towers whose weights, statistics and temperature differ from any start, in evaluation mode."""
    cfg, bias = KINDS[kind]
    towers = build(cfg, bias=bias, tokenizer=local_tokenizer(folder / "words") if kind == "words" else None)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        towers.train().image(pixels_for(towers))
    return towers.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_open_clip_and_clipkit_reload_the_same_model(tmp_path: Path, kind: str) -> None:
    towers = trained(kind, tmp_path)
    out = save_open_clip(towers, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    model.eval()
    ours = load_open_clip(out)
    assert not ours.training
    assert isinstance(model, open_clip.CustomTextCLIP)
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    pixels = ImageView.from_preprocess(towers.preprocess_cfg, train=False)(picture)[None]
    with torch.no_grad():
        image = model.encode_image(preprocess(picture)[None], normalize=True)
        text = model.encode_text(tokens, normalize=True)
        for mine in (towers, ours):
            assert torch.equal(mine.tokenizer(CAPTIONS), tokens)
            assert torch.equal(mine.image(pixels)[1], image)
            assert torch.equal(mine.text(tokens)[1], text)
            assert torch.equal(mine.logit_scale[0], model.logit_scale)
    assert model.logit_scale.ndim == 0
    if KINDS[kind][1] is None:
        assert model.logit_bias is None
    else:
        assert towers.logit_bias is not None
        assert model.logit_bias is not None
        assert torch.equal(towers.logit_bias[0], model.logit_bias)
    assert ours.text_trim == towers.text_trim
    assert ours.preprocess_cfg == towers.preprocess_cfg


def test_a_directory_that_asks_for_other_weights_fetches_none(tmp_path: Path) -> None:
    """Loading would end in an error here, where the hub is out of reach."""
    towers = trained("timm_vit", tmp_path)
    out = save_open_clip(towers, tmp_path / "out")
    document = json.loads((out / "open_clip_config.json").read_text())
    document["model_cfg"]["vision_cfg"]["timm_model_pretrained"] = True
    (out / "open_clip_config.json").write_text(json.dumps(document))
    found = load_open_clip(out).clip.state_dict()
    assert all(torch.equal(found[name], x) for name, x in towers.clip.state_dict().items())


def test_verify_runs_in_a_fresh_process_and_finds_no_difference(tmp_path: Path) -> None:
    towers = trained("timm_resnet", tmp_path)
    towers.freeze("text", "all")
    found = verify(save_open_clip(towers, tmp_path / "out"), towers)
    assert found["max_difference"] == dict.fromkeys(
        ("image", "text", "tokens", "logit_scale", "logit_bias"), 0.0
    )
    assert found["note"] == ""


@pytest.fixture
def same_process(monkeypatch: Any) -> None:
    """Runs the other side of `verify` here: one fresh process in this file is enough, each costs 10 s."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        try:
            reload.main(*command[3:])
        except (OSError, RuntimeError, ValueError) as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sys.modules["clipkit.export.open_clip"].subprocess, "run", run)


@pytest.mark.usefixtures("same_process")
def test_verify_refuses_a_directory_that_differs(tmp_path: Path) -> None:
    towers = trained("siglip", tmp_path)
    out = save_open_clip(towers, tmp_path / "out")
    file = out / "open_clip_model.safetensors"
    state = load_file(file)
    state["text.text_projection"][0, 0] += 1e-3
    save_file(state, file)
    with pytest.raises(ClipkitError, match=r"differs in text by"):
        verify(out, towers)


@pytest.mark.usefixtures("same_process")
def test_a_transformers_text_tower_moves_with_clipkit_and_says_where_open_clip_finds_it(
    tmp_path: Path,
) -> None:
    towers = trained("roberta", tmp_path)
    out = save_open_clip(towers, tmp_path / "out")
    note = verify(out, towers)["note"]
    assert str(out / "hf_text") in note
    moved = tmp_path / "elsewhere" / "model"
    moved.parent.mkdir()
    shutil.move(out, moved)
    tokens = towers.tokenizer(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(load_open_clip(moved).text(tokens)[1], towers.text(tokens)[1])
    with pytest.raises(ClipkitError, match="open_clip cannot load"):
        verify(moved, towers)
    named = save_open_clip(towers, moved, hf_name="someone/some-roberta")
    assert location_note(named) == ""
    document = json.loads((named / "open_clip_config.json").read_text())
    assert document["model_cfg"]["text_cfg"]["hf_model_name"] == "someone/some-roberta"
    assert "hf_config" not in document["model_cfg"]["text_cfg"]


def test_files_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    towers = build(model_cfg())
    previous = os.umask(0o027)
    try:
        out = save_open_clip(towers, tmp_path / "deep" / "out", extra_files={"notes.txt": "hello"})
    finally:
        os.umask(previous)
    assert out.stat().st_mode & 0o777 == 0o750
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    expected = ("open_clip_config.json", "open_clip_model.safetensors", "notes.txt")
    assert modes == dict.fromkeys(expected, 0o640)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_export_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: Any) -> None:
    first, second = build(model_cfg()), build(model_cfg())
    out = save_open_clip(first, tmp_path / "out", extra_files={"old.txt": "old"})

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["clipkit.export.open_clip"], "save_file", fail)
        with pytest.raises(OSError, match="No space"):
            save_open_clip(second, out)
    assert torch.equal(load_open_clip(out).clip.visual.proj, first.clip.visual.proj)
    save_open_clip(second, out)
    assert torch.equal(load_open_clip(out).clip.visual.proj, second.clip.visual.proj)
    assert sorted(path.name for path in out.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_something_else_is_never_overwritten(tmp_path: Path) -> None:
    towers = build(model_cfg())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")
    for target in ("photos", "photos/holiday.jpg"):
        with pytest.raises(ConfigError):
            save_open_clip(towers, tmp_path / target)
    assert (tmp_path / "photos" / "holiday.jpg").read_bytes() == b"x"


def test_loading_leaves_the_random_generators_alone(tmp_path: Path) -> None:
    out = save_open_clip(build(model_cfg()), tmp_path / "out")
    before = torch.get_rng_state()
    load_open_clip(out)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_older_open_clip_directory_loads(tmp_path: Path) -> None:
    old = open_clip.model.CLIP(**model_cfg(text=TEXT)).eval()
    save_file(old.state_dict(), tmp_path / "open_clip_pytorch_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg(), "preprocess_cfg": {}})
    )
    towers = load_open_clip(tmp_path)
    tokens = towers.tokenizer(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(towers.text(tokens)[1], old.encode_text(tokens, normalize=True))
