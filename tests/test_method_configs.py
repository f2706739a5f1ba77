"""Every configuration that comes with clipkit is valid, and every method's trains five steps."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipkit.config import load_config
from clipkit.data.glyphs.corpus import make_scenes
from clipkit.objectives import OBJECTIVES, build_objectives
from clipkit.train import pretrain

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "extends:" in path.read_text())
# Not run here: they have tests of their own, or need data of another kind.
OTHERS = {"quickstart_scenes", "quickstart_characters", "products_64px"}
STEPS = 5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with a stored vector of width 8 per picture and per caption."""
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes(folder, train=64, evaluation=8, size=32, workers=1)
    generator = np.random.default_rng(0)
    (tar,) = (folder / "train").glob("*.tar")
    with tarfile.open(tar) as source, tarfile.open(folder / "stored.tar", "w") as target:
        for member in source.getmembers():
            content = source.extractfile(member)
            assert content is not None
            target.addfile(member, content)
            if not member.name.endswith(".txt"):
                continue
            for part in ("image", "text"):
                buffer = io.BytesIO()
                np.save(buffer, generator.standard_normal(8).astype(np.float32))
                info = tarfile.TarInfo(f"{member.name[:-4]}.teacher_{part}.npy")
                info.size = len(buffer.getvalue())
                target.addfile(info, io.BytesIO(buffer.getvalue()))
    return folder / "stored.tar"


@pytest.fixture(scope="module")
def teacher(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained model of another size and width, to distil from."""
    folder = tmp_path_factory.mktemp("teacher")
    overrides = [f"data.train={scenes}", f"run.dir={folder}", "model.vision_cfg.image_size=48"]
    overrides += ["model.embed_dim=64", "run.steps=1", "optim.warmup=0", "data.batch_size=8"]
    export = pretrain(load_config(CONFIGS / "quickstart_scenes.yaml", overrides))["export"]
    return str(export)


def test_every_configuration_is_accounted_for() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(METHODS) | OTHERS
    covered = {entry.name for name in METHODS for entry in load_config(CONFIGS / f"{name}.yaml").objectives}
    assert covered == set(OBJECTIVES)


@pytest.mark.parametrize("name", [*METHODS, *sorted(OTHERS)])
def test_every_configuration_is_valid_and_says_what_it_is(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    config = load_config(path)
    build_objectives([{"name": e.name, **e.options} for e in config.objectives], OBJECTIVES)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name: str, scenes: Path, teacher: str, tmp_path: Path) -> None:
    overrides = [f"data.train={scenes}", f"run.dir={tmp_path}", f"run.steps={STEPS}", "run.log_every=1"]
    overrides += ["data.batch_size=16", "optim.warmup=1", "optim.lr=1e-3"]
    if name == "distill":
        overrides.append(f"objectives.1.teachers=[{teacher}]")
    result = pretrain(load_config(CONFIGS / f"{name}.yaml", overrides))
    assert result["steps"] == STEPS
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) > 1
    assert any(record.get("grad_norm", 0) > 0 for record in records)
