"""The inference handle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipkit.models import Model, build
from clipkit.models.model import choose_device
from clipkit.types import ConfigError
from tests.models.test_towers import model_cfg

CAPTIONS = ["a cat", "two dogs on the wet sand of a beach"]


def resized(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1)


def test_pictures_and_captions_become_unit_vectors_of_the_towers() -> None:
    torch.manual_seed(0)
    towers = build(model_cfg(), log_scale=2.0, bias=-3.0)
    model = Model(towers, resized, "cpu")
    assert not towers.training
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "green", "blue")]
    pixels = torch.stack([model.preprocess(picture) for picture in pictures])
    images, words = model.encode_image(pictures), model.encode_text(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(images, towers.image(pixels)[1])
    assert torch.equal(images, model.encode_image(pixels))
    torch.testing.assert_close(words, towers.text(model.tokenize(CAPTIONS))[1], rtol=0, atol=1e-6)
    assert not images.requires_grad
    assert model.logit_scale == pytest.approx(7.389056)
    assert model.logit_bias == -3.0
    assert model.encode_text(model.tokenize(CAPTIONS)[:0]).shape == (0, 16)


def test_precision_is_stated_and_checked() -> None:
    towers = build(model_cfg())
    low = Model(towers, resized, "cpu", "bf16")
    assert low.encode_text(CAPTIONS).dtype == torch.float32
    assert not torch.equal(low.encode_text(CAPTIONS), Model(towers, resized, "cpu").encode_text(CAPTIONS))
    with pytest.raises(ConfigError, match="CUDA"):
        Model(towers, resized, "cpu", "fp16")
    with pytest.raises(ConfigError, match="precision"):
        Model(towers, resized, "cpu", "int4")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x", "meta:q"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(device: str) -> None:
    with pytest.raises(ConfigError, match=f"no device '{device}'") as caught:
        choose_device(device)
    assert caught.value.exit_code == 2
    assert "cpu" in caught.value.cure
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_cuda_on_a_machine_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="no device 'cuda'"):
        choose_device("cuda")
