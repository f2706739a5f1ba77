"""Teachers: averages follow their rule, fixed models stay fixed, and both see what the student sees."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.models import Towers, build
from clipkit.models.teachers import Teachers, moving_copy
from clipkit.train import pretrain
from clipkit.types import ConfigError, Teacher
from tests.conftest import TINY_MODEL
from tests.train.runs import values


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


def test_a_run_continues_only_with_the_teacher_it_began_with(tiny_shards: Path, tmp_path: Path) -> None:
    teacher = pretrain(values(tiny_shards, tmp_path / "teacher", run__steps=1, run__seed=5))["export"]
    config = values(tiny_shards, tmp_path / "run", run__steps=3)
    config["objectives"] = [{"name": "distill", "teachers": [teacher]}]
    assert pretrain(config)["steps"] == 3
    assert pretrain(config)["steps"] == 3
    other = pretrain(values(tiny_shards, tmp_path / "other", run__steps=1, run__seed=6))["export"]
    Path(teacher).rename(tmp_path / "moved")
    Path(other).rename(teacher)
    with pytest.raises(ConfigError, match="other weights"):
        pretrain(config)
