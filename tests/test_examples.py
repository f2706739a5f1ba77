"""Every example runs, and does what its first line says."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipkit
from clipkit.train import pretrain
from tests.train.runs import values

EXAMPLES = Path(__file__).parents[1] / "examples"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_python_names_train_a_model_that_reads_an_unseen_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module("python_api").main(tmp_path) == "blue over white over red"
    assert capsys.readouterr().out.count(" over ") == 12


def test_examples_stay_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert path.read_text().count("\n") <= 100, path


def test_an_own_objective_passes_the_suite_from_its_file(run_ranks: Any) -> None:
    from clipkit.objectives import suite

    path = EXAMPLES / "own_objective.py"
    assert path.read_text().count("\n") <= 60
    maker = suite.FromEntry({"name": f"{path}:TolerantClip", "threshold": 0.5})
    for finding in suite.check_all(maker, run_ranks):
        assert finding.holds, finding


def test_objectives_are_compared_in_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.evaluation.probe.ITERATIONS", 5)  # this is not about accuracy
    example = module("compare_objectives")
    example.make_scenes(tmp_path / "data", train=64, evaluation=60, size=32)
    data = f"{tmp_path}/data/zeroshot_pictogram", f"data.train={tmp_path}/data/train", "data.batch_size=16"
    found = example.compare(tmp_path, 5, ["siglip", "simclr"], *data)
    assert list(found) == ["pixels", "random", "siglip", "simclr"]
    assert all(0 < row["knn_acc1"] <= 1 for row in found.values())
    assert "zero_shot" in found["siglip"]
    assert "zero_shot" not in found["simclr"]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_stored_teacher_vectors_are_those_of_the_teacher(tiny_shards: Path, tmp_path: Path) -> None:
    teacher = pretrain(values(tiny_shards, tmp_path / "teacher", run__steps=1))["export"]
    written = module("store_teacher").main(teacher, tiny_shards, tmp_path / "stored")
    assert written == 96
    model, vectors = clipkit.load(teacher), {}
    with tarfile.open(sorted((tmp_path / "stored").glob("*.tar"))[-1]) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            vectors[member.name] = stream.read()
    picture = Image.open(io.BytesIO(vectors["000095.png"]))
    for side, expected in (
        ("image", model.encode_image([picture])),
        ("text", model.encode_text([vectors["000095.txt"].decode()])),
    ):
        found = torch.from_numpy(np.load(io.BytesIO(vectors[f"000095.teacher_{side}.npy"])))
        torch.testing.assert_close(found.float(), expected[0].cpu(), rtol=0, atol=1e-3)
    config = values(tmp_path / "stored", tmp_path / "student", run__steps=2)
    config["objectives"] = [{"name": "distill", "stored": {"scale": 50}, "views": {"image": "none"}}]
    assert pretrain(config)["steps"] == 2


def test_configurations_in_the_guides_are_valid(tmp_path: Path) -> None:
    import re

    from clipkit.config import load_config
    from clipkit.objectives import OBJECTIVES, build_objectives

    guides = sorted((EXAMPLES / "guides").glob("*.md"))
    assert guides
    for guide in guides:
        for block in re.findall(r"```yaml\n(.*?)```", guide.read_text(encoding="utf-8"), flags=re.DOTALL):
            (tmp_path / "shown.yaml").write_text(block)
            config = load_config(tmp_path / "shown.yaml")
            build_objectives([{"name": e.name, **e.options} for e in config.objectives], OBJECTIVES)
