"""Teachers: averages follow their rule, fixed models stay fixed, and both see what the student sees."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.export import save_open_clip
from clipkit.models import Towers, build
from clipkit.models.teachers import Teachers, moving_copy
from clipkit.train import pretrain
from clipkit.types import ClipkitError, ConfigError, Teacher
from tests.conftest import TINY_MODEL
from tests.models.test_tokenizers import local_tokenizer
from tests.train.runs import trace, train, values, weights


def tiny(**changes: Any) -> Towers:
    torch.manual_seed(1)
    cfg = copy.deepcopy(TINY_MODEL)
    cfg["vision_cfg"] |= changes  # type: ignore[operator]
    return build(cfg)


def test_an_average_follows_its_rule_and_holds_only_the_towers_it_reads() -> None:
    towers = tiny()
    teacher = Teacher("ema", ("a",), momentum=0.9, schedule="cosine")
    teachers = Teachers([(teacher, moving_copy(towers, {"image"}))])
    expected = {name: p.detach().clone() for name, p in towers.named_parameters() if "visual" in name}
    for step in range(5):
        with torch.no_grad():
            for parameter in towers.parameters():
                parameter.add_(torch.randn_like(parameter))
        progress = step / 5
        momentum = 1 - (1 - 0.9) * (torch.cos(torch.tensor(torch.pi * progress)).item() + 1) / 2
        for name, parameter in towers.named_parameters():
            if name in expected:
                expected[name] = momentum * expected[name] + (1 - momentum) * parameter.detach()
        teachers.follow(towers, progress)
    average = dict(teachers.towers_of("ema").named_parameters())
    assert not any(name.startswith("clip.text.") for name in average)
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value)
    assert not any(p.requires_grad for p in teachers.parameters())
    teachers.train(True)
    assert not any(module.training for module in teachers.modules())


def test_a_fixed_teacher_is_outside_the_state_and_reads_its_own_size() -> None:
    towers = tiny()
    big = tiny(image_size=48)
    teachers = Teachers([(Teacher("big", ("image", "text"), model="x"), big)])
    assert list(teachers.state_dict()) == []
    assert list(teachers.parameters()) == []
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    own = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    tokens = towers.tokenizer(["red", "blue"])
    found = teachers.embed({"image": pixels, "image@big": own}, {"text": tokens})
    assert set(found) == {
        f"teacher.big.{part}.{view}" for part in ("trunk", "joint") for view in ("image", "text")
    }
    torch.testing.assert_close(found["teacher.big.joint.image"], big.eval().image(own)[1].detach())
    assert not any(x.requires_grad for x in found.values())
    teachers.double()
    assert big.logit_scale.dtype == torch.float64


@pytest.fixture(scope="module")
def taught(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: models small and worded (another size, another tokenizer), and `run`, 4 steps with both."""
    folder = tmp_path_factory.mktemp("taught")
    save_open_clip(tiny(), folder / "small")
    torch.manual_seed(2)
    cfg = copy.deepcopy(TINY_MODEL)
    cfg["vision_cfg"] |= {"image_size": 48}  # type: ignore[operator]
    cfg["text_cfg"] |= {"vocab_size": 13, "pool_type": "eos", "eos_id": 2}  # type: ignore[operator]
    words = local_tokenizer(folder / "words")
    save_open_clip(build(cfg, tokenizer=words), folder / "worded")
    pretrain(distilling(tiny_shards, folder))
    return folder


def distilling(shards: Path, folder: Path) -> dict[str, Any]:
    config = values(shards, folder / "run", run__steps=4, run__checkpoint_every=2)
    config["objectives"] = [
        {"name": "distill", "teachers": [str(folder / "small"), str(folder / "worded")]},
        {"name": "clip"},
    ]
    return config


def stopped(taught: Path, folder: Path) -> Path:
    """A copy of the folder whose run knows no later checkpoint than that of step 2."""
    shutil.copytree(taught, folder, symlinks=True)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    return folder


def in_place_of(config: dict[str, Any], taught: Path, folder: Path) -> dict[str, Any]:
    # The names of the models are part of what a run is: they stay, wherever its directory is copied to.
    config["run"]["dir"] = str(folder / "run")
    config["objectives"] = distilling(folder, taught)["objectives"]
    return config


def test_a_run_outlives_the_models_it_learns_from(
    taught: Path, tiny_shards: Path, tmp_path: Path, run_ranks: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(taught, tmp_path / "copy")
    config = in_place_of(distilling(tiny_shards, folder), taught, folder)
    expected, exported = trace(taught / "run"), weights(taught / "run")
    hidden = [(taught / name).rename(taught / f"{name}.gone") for name in ("small", "worded", "words")]
    try:
        assert pretrain(config)["steps"] == 4
        said = capsys.readouterr().err
        assert said.count("as this run stored it in") == 2
        assert trace(folder / "run") == expected
        assert weights(folder / "run") == exported
        # A checkpoint continued in another directory brings its teachers along.
        other = in_place_of(distilling(tiny_shards, folder), taught, tmp_path / "other")
        resumed = str(folder / "run" / "checkpoints" / "step-00000002")
        run_ranks(2, train, other, resumed)
        stored = sorted(path.name for path in (tmp_path / "other" / "run" / "teachers").iterdir())
        assert stored == sorted(path.name for path in (folder / "run" / "teachers").iterdir())
        assert len(stored) == 2
    finally:
        for path in hidden:
            path.rename(path.with_suffix(""))


def test_a_stored_teacher_wins_over_a_model_that_has_changed(
    taught: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    folder = stopped(taught, tmp_path / "copy")
    config = in_place_of(distilling(tiny_shards, folder), taught, folder)
    shutil.move(taught / "small", tmp_path / "small")
    save_open_clip(tiny(width=48), taught / "small")
    try:
        assert pretrain(config)["steps"] == 4
        assert trace(folder / "run") == trace(taught / "run")
        shutil.rmtree(folder / "run" / "teachers")
        with pytest.raises(ConfigError, match="other weights"):
            pretrain(config)
    finally:
        shutil.rmtree(taught / "small")
        shutil.move(tmp_path / "small", taught / "small")
    assert pretrain(config)["steps"] == 4
    names = {path.name for path in (folder / "run" / "teachers").iterdir()}
    assert names == {path.name for path in (taught / "run" / "teachers").iterdir()}


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json", "tokenizer.json"])
def test_a_damaged_stored_teacher_is_refused(
    taught: Path, tiny_shards: Path, tmp_path: Path, name: str
) -> None:
    folder = stopped(taught, tmp_path / "copy")
    (path,) = (folder / "run" / "teachers").glob(f"*worded/{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ClipkitError, match=f"stored teacher .*worded is damaged: {name} was changed"
    ) as error:
        pretrain(in_place_of(distilling(tiny_shards, folder), taught, folder))
    assert "remove it" in error.value.cure
    shutil.rmtree(path.parent)
    assert pretrain(in_place_of(distilling(tiny_shards, folder), taught, folder))["steps"] == 4
    assert trace(folder / "run") == trace(taught / "run")
