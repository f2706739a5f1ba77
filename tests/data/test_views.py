"""Views: the pixels of open_clip for evaluation, torchvision's distribution for training, trimmed texts."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from clipkit.data.text import TextView
from clipkit.data.views import ImageView
from clipkit.types import ClipkitError, ConfigError
from tests.data.makers import ByteTokenizer


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_pixels_are_open_clips(size: tuple[int, int], mode: str, interpolation: str) -> None:
    cfg = {"size": size, "resize_mode": mode, "interpolation": interpolation, "fill_color": 7}
    reference = image_transform_v2(
        PreprocessCfg(**cfg, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), is_train=False
    )
    view = ImageView.from_preprocess(cfg, train=False)
    for number, (width, height) in enumerate(
        [(32, 32), (50, 33), (33, 50), (20, 91), (97, 31), (5, 9), (64, 64)]
    ):
        image = picture(width, height, number)
        expected = (reference(image) * 255).round().to(torch.uint8)
        found = view(image)
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected), (width, height)


def test_training_crops_follow_torchvision() -> None:
    """Mean and spread of area, aspect and position of the crop boxes equal those of torchvision."""
    view = ImageView(size=(16, 16), scale=(0.3, 1.0))
    torch.manual_seed(0)
    boxes = np.array([view._crop_box(90, 60) for _ in range(4000)], dtype=float)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    image = picture(90, 60)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], dtype=float
    )
    for mine, other in [
        (width * height, theirs[:, 2] * theirs[:, 3]),
        (width / height, theirs[:, 3] / theirs[:, 2]),
        (boxes[:, 0], theirs[:, 1]),
        (boxes[:, 1], theirs[:, 0]),
    ]:
        assert abs(mine.mean() - other.mean()) < 0.1 * other.std()
        assert abs(mine.std() - other.std()) < 0.1 * other.std()


def test_crops_of_any_shape_stay_inside() -> None:
    view = ImageView(size=(8, 8), scale=(0.9, 1.0))
    for width, height in [(1, 1), (1, 90), (90, 1), (3, 200), (7, 7)]:
        left, top, right, bottom = view._crop_box(width, height)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert view(picture(width, height)).shape == (3, 8, 8)


def test_training_draws_only_when_training() -> None:
    view = ImageView(size=(8, 8), train=False)
    before = torch.get_rng_state()
    view(picture(20, 30))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    first = ImageView(size=(8, 8), scale=(0.2, 1.0))(picture(20, 30))
    torch.manual_seed(3)
    assert torch.equal(ImageView(size=(8, 8), scale=(0.2, 1.0))(picture(20, 30)), first)


def test_crop_scale_follows_the_size_of_the_set() -> None:
    view = ImageView(scale=None)
    assert view.for_pairs(10_000).scale == (0.5, 1.0)
    assert view.for_pairs(60_000_000).scale == (0.9, 1.0)
    assert ImageView(scale=(0.1, 0.2)).for_pairs(10).scale == (0.1, 0.2)
    with pytest.raises(ConfigError, match="crop scale"):
        ImageView(scale=(0.5, 1.5))
    with pytest.raises(ConfigError, match="nearest"):
        ImageView(interpolation="nearest")


def test_texts_are_trimmed_to_eights() -> None:
    view = TextView(tokenizer=ByteTokenizer(24), context_length=24, trim="argmax")
    tokens = view.encode(["ab", "abcdefgh"])
    assert tokens.shape == (2, 24)
    assert view.trimmed(tokens).shape == (2, 16)
    assert view.trimmed(view.encode(["abcdefg"])).shape == (1, 8)
    assert view.trimmed(view.encode(["x" * 99])).shape == (1, 24)
    padded = TextView(tokenizer=ByteTokenizer(24), context_length=24, trim=0)
    assert torch.equal(padded.trimmed(tokens), tokens[:, :16])
    assert padded.trimmed(torch.zeros(2, 24, dtype=torch.int64)).shape == (2, 8)
    odd = TextView(tokenizer=ByteTokenizer(13), context_length=13, trim="argmax")
    assert odd.trimmed(odd.encode(["abcdefghij"])).shape == (1, 13)
    full = TextView(tokenizer=ByteTokenizer(24), context_length=24)
    assert full.trimmed(tokens).shape == (2, 24)


def test_a_foreign_tokenizer_is_named() -> None:
    with pytest.raises(ClipkitError, match=r"text view 'text'.*24"):
        TextView(tokenizer=ByteTokenizer(13), context_length=24).encode(["a"])


def test_views_pickle() -> None:
    random.seed(0)
    view = pickle.loads(pickle.dumps(TextView(tokenizer=ByteTokenizer(8), context_length=8)))
    assert view.encode(["a"]).shape == (1, 8)
    assert pickle.loads(pickle.dumps(ImageView())) == ImageView()
