"""The average of the weights against its closed form."""

from __future__ import annotations

import pytest
import torch

from clipkit.models import WeightEMA, build
from tests.models.test_towers import CAPTIONS, IMAGE_TOWERS, model_cfg


def test_the_average_is_the_closed_form_of_the_ramped_decays() -> None:
    towers = build(model_cfg()).double()
    ema = WeightEMA(towers, decay=0.3)
    parameter = towers.clip.visual.proj
    history = [parameter.detach().clone()]
    for step in range(6):
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        history.append(parameter.detach().clone())
        ema.update(towers, step)
    decays = [min(0.3, (1 + t) / (10 + t)) for t in range(6)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.3
    expected = torch.zeros_like(parameter)
    for number, value in enumerate(history):
        weight = 1.0 if number == 0 else 1 - decays[number - 1]
        for decay in decays[number:]:
            weight *= decay
        expected += weight * value
    torch.testing.assert_close(ema.towers.clip.visual.proj, expected, rtol=0, atol=1e-14)
    assert torch.equal(ema.towers.clip.visual.conv1.weight, towers.clip.visual.conv1.weight)


def test_buffers_are_copied_and_the_copy_never_trains() -> None:
    towers = build(model_cfg(IMAGE_TOWERS["timm_resnet"][0]))
    ema = WeightEMA(towers)
    with torch.no_grad():
        for buffer in towers.buffers():
            buffer.add_(1)
    ema.update(towers, 0)
    copied = dict(ema.named_buffers())
    assert all(torch.equal(copied[f"towers.{name}"], x) for name, x in towers.named_buffers())
    ema.train()
    assert not any(module.training for module in ema.modules())
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert list(ema.towers.state_dict()) == list(towers.state_dict())


def test_the_copy_encodes_with_its_own_weights() -> None:
    towers = build(model_cfg())
    ema = WeightEMA(towers)
    tokens = towers.tokenizer(CAPTIONS)
    before = ema.towers.text(tokens)[1]
    with torch.no_grad():
        towers.clip.text.text_projection.normal_()
    assert torch.equal(ema.towers.text(tokens)[1], before)
    ema.update(towers, 10**6)
    assert not torch.equal(ema.towers.text(tokens)[1], before)


@pytest.mark.parametrize("step", [0, 5, 10**9])
def test_the_decay_never_exceeds_its_limit(step: int) -> None:
    ema = WeightEMA(build(model_cfg()), decay=0.9998)
    assert ema.decay_at(step) == min(0.9998, (1 + step) / (10 + step))
