"""Augmentations: torchvision's values, the papers' recipes, users' own, and errors that name the key."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional

from clipkit.data.augment import (
    augmented,
    brightness_scaled,
    contrast_scaled,
    hue_shifted,
    rotated,
    saturation_scaled,
)
from clipkit.data.recipes import RECIPES, Augment, read_recipes
from clipkit.data.rows import slot_seeds
from clipkit.data.views import ImageView, image_view
from clipkit.types import ConfigError, View

CFG = {"size": 32, "interpolation": "bicubic"}


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 2, width // 2, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(image)


def view(name: str, index: int = 0, **options: Any) -> ImageView:
    return image_view(View(f"{name}:{index}", "image", name, index), CFG, **options)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_colours_are_torchvisions(seed: int) -> None:
    image = picture(seed=seed)
    for factor in (0.0, 0.2, 0.61, 1.0, 1.37, 1.8):
        assert np.array_equal(
            array(brightness_scaled(image, factor)), array(functional.adjust_brightness(image, factor))
        )
        assert np.array_equal(
            array(contrast_scaled(image, factor)), array(functional.adjust_contrast(image, factor))
        )
        assert np.array_equal(
            array(saturation_scaled(image, factor)), array(functional.adjust_saturation(image, factor))
        )
    for shift in (-0.5, -0.2, -0.013, 0.0, 0.1, 0.5):
        assert np.array_equal(array(hue_shifted(image, shift)), array(functional.adjust_hue(image, shift)))


def test_certain_operations() -> None:
    image = picture(32, 32)
    assert np.array_equal(array(augmented(image, Augment())), array(image))
    assert np.array_equal(array(augmented(image, Augment(flip=1.0))), array(image)[:, ::-1])
    assert np.array_equal(
        array(augmented(image, Augment(solarise=1.0))), array(ImageOps.solarize(image, 128))
    )
    grey = array(augmented(image, Augment(grey=1.0)))
    assert np.array_equal(grey, array(functional.to_grayscale(image, 3)))
    blurred = augmented(image, Augment(blur=1.0, sigma=(7.0, 7.0)))
    assert np.array_equal(array(blurred), array(image.filter(ImageFilter.GaussianBlur(1.0))))


def test_blur_has_the_sigma_it_says() -> None:
    """The variance of a blurred point is sigma squared, in pixels of the view's size."""
    point = Image.new("RGB", (112, 112))
    point.putpixel((56, 56), (255, 255, 255))
    wide = array(augmented(point, Augment(blur=1.0, sigma=(4.0, 4.0))))[..., 0].astype(float)
    assert wide.sum() == pytest.approx(255, rel=0.2)
    spread = (wide.sum(0) * (np.arange(112) - 56) ** 2).sum() / wide.sum()
    assert math.sqrt(spread) == pytest.approx(2.0, rel=0.1)


def test_rotation_keeps_size_and_has_no_black_corners() -> None:
    image = picture(32, 32)
    assert np.array_equal(array(rotated(image, 0.0)), array(image))
    assert np.abs(array(rotated(image, 90.0)).astype(int) - np.rot90(array(image))).max() <= 1
    theirs = array(image.rotate(20, Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(array(rotated(image, 20.0)).astype(int) - theirs)[8:24, 8:24].max() <= 1
    white = Image.new("RGB", (30, 20), (255, 255, 255))
    for degrees in (-180.0, -33.0, 7.0, 45.0, 120.0):
        turned = rotated(white, degrees)
        assert turned.size == (30, 20)
        assert array(turned).min() == 255
    for size in ((1, 1), (1, 9), (40, 3)):
        assert rotated(Image.new("RGB", size), 30.0).size == size


def test_each_option_has_its_own_draws() -> None:
    """Changing one option changes nothing about the others, and the generator advances equally."""

    def draw(augment: Augment) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
        torch.manual_seed(11)
        return array(augmented(image, augment)), torch.get_rng_state()

    image = picture(16, 16)
    plain, state = draw(Augment())
    assert np.array_equal(plain, array(image))
    flips = []
    for seed in range(200):
        torch.manual_seed(seed)
        flipped = np.array_equal(array(augmented(image, Augment(flip=0.5))), plain[:, ::-1])
        torch.manual_seed(seed)
        grey = np.array_equal(
            array(augmented(image, Augment(flip=0.5, grey=1.0))),
            array(augmented(image if not flipped else ImageOps.mirror(image), Augment(grey=1.0))),
        )
        assert grey
        flips.append(flipped)
    assert 70 < sum(flips) < 130
    for name in ("simclr", "moco_v1", "byol"):
        jittered, after = draw(RECIPES[name][0].augment)
        assert torch.equal(after, state)
        assert jittered.shape == plain.shape
        assert np.array_equal(draw(RECIPES[name][0].augment)[0], jittered)


def test_jitter_stays_in_its_range_and_changes_its_order() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    levels = []
    for seed in range(300):
        torch.manual_seed(seed)
        levels.append(int(array(augmented(grey, Augment(jitter=(0.4, 0.0, 0.0, 0.0))))[0, 0, 0]))
    assert 59 <= min(levels) < 65
    assert 135 < max(levels) <= 140
    kept = sum(
        np.array_equal(
            array(augmented(grey, Augment(jitter=(0.9, 0.0, 0.0, 0.0), jitter_p=0.2))), array(grey)
        )
        for _ in range(300)
    )
    assert 200 < kept < 280
    image = picture(8, 8)
    torch.manual_seed(0)
    full = Augment(jitter=(0.8, 0.8, 0.8, 0.2))
    assert len({array(augmented(image, full)).tobytes() for _ in range(20)}) == 20


# Recipes.


def test_recipes_are_those_of_the_papers() -> None:
    simclr = view("simclr")
    assert simclr.scale == (0.08, 1.0)
    assert simclr.augment == Augment(
        flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey=0.2, blur=0.5, sigma=(0.1, 2.0)
    )
    assert view("simclr", 1) == replace(simclr, name="simclr:1")
    v1, v2 = view("moco_v1"), view("moco_v2")
    assert v1.scale == v2.scale == (0.2, 1.0)
    assert v1.augment == Augment(flip=0.5, jitter=(0.4,) * 4, jitter_p=1.0, grey=0.2)
    assert v2.augment == Augment(flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2, blur=0.5)
    first, second = view("byol", 0).augment, view("byol", 1).augment
    assert first is not None
    assert second is not None
    assert (first.blur, first.solarise) == (1.0, 0.0)
    assert second == replace(first, blur=0.1, solarise=0.2)
    assert RECIPES["barlow"] == RECIPES["byol"]


@pytest.mark.parametrize(("size", "local"), [(224, 96), (64, 24), (32, 16), (8, 8)])
def test_multi_crop_scales_with_the_tower(size: int, local: int) -> None:
    views = [image_view(View(f"swav:{n}", "image", "swav", n), CFG, size=(size, size)) for n in range(8)]
    assert [built.size[0] for built in views] == [size] * 2 + [local] * 6
    assert [built.scale for built in views] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6
    assert views[5](picture()).shape == (3, local, local)


def test_plain_views_are_as_before() -> None:
    """No recipe: equal to the view that a preprocess_cfg alone describes, and so are its draws."""
    plain = image_view(View("image", "image"), CFG, crop_scale=(0.5, 1.0))
    assert plain == ImageView.from_preprocess(CFG, scale=(0.5, 1.0))
    assert image_view(View("image", "image", "weak"), CFG) == ImageView.from_preprocess(CFG, scale=None)
    none = image_view(View("image", "image", "none"), CFG)
    assert not none.train
    state = torch.get_rng_state()
    assert torch.equal(none(picture()), ImageView.from_preprocess(CFG, train=False)(picture()))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_picture_for_a_teacher() -> None:
    """A view behind an @ has the seeds of the one before it: the same crop, flip and colours."""
    slots = [0, 7, 8]
    assert slot_seeds(3, 1, "simclr:0@big", slots) == slot_seeds(3, 1, "simclr:0", slots)
    assert slot_seeds(3, 1, "simclr:1", slots) != slot_seeds(3, 1, "simclr:0", slots)
    small = view("simclr")
    large = image_view(View("simclr:0@big", "image", "simclr"), {"size": 64, "interpolation": "bilinear"})
    for seed in range(5):
        torch.manual_seed(seed)
        box = small._crop_box(90, 60)
        torch.manual_seed(seed)
        assert large._crop_box(90, 60) == box
        torch.manual_seed(seed)
        low = small(picture(90, 60)).float()
        torch.manual_seed(seed)
        high = torch.nn.functional.avg_pool2d(large(picture(90, 60)).float(), 2)
        assert (low - high).abs().mean() < 12


def test_own_recipes() -> None:
    own: dict[str, Any] = {
        "mine": {"extends": "simclr", "jitter": [0.4, 0.4, 0.4, 0.1], "flip": 0, "rotation": 15},
        "pair": {"extends": "mine", "views": [{"blur": 1.0}, {"blur": 0.1, "solarise": 0.2}]},
        "byol": {"extends": "byol", "crop": [0.3, 1.0]},
        "turned": {"rotation": 90, "crop": None, "ratio": [1, 1]},
    }
    found = read_recipes(own)
    assert found["simclr"] == RECIPES["simclr"]
    (mine,) = found["mine"]
    assert mine.crop == (0.08, 1.0)
    assert mine.augment == replace(
        RECIPES["simclr"][0].augment, jitter=(0.4, 0.4, 0.4, 0.1), flip=0.0, rotation=15.0
    )
    assert [look.augment.blur for look in found["pair"]] == [1.0, 0.1]
    assert found["pair"][1].augment.rotation == 15.0
    assert [look.crop for look in found["byol"]] == [(0.3, 1.0)] * 2
    assert found["byol"][1].augment.solarise == 0.2
    turned = view("turned", recipes=own, crop_scale=(0.6, 1.0))
    assert (turned.scale, turned.ratio) == ((0.6, 1.0), (1.0, 1.0))
    assert turned(picture()).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("own", "cause", "cure"),
    [
        ({"a": {"jiter": [1, 1, 1, 0]}}, r"data\.recipes\.a: unknown key 'jiter'", "'jitter'"),
        ({"a": {"extends": "simclrr"}}, r"a\.extends is 'simclrr'", "'simclr'"),
        ({"a": {"extends": "b"}, "b": {"extends": "a"}}, "extends itself", "simclr"),
        ({"a": {"extends": "a"}}, "extends itself", "simclr"),
        ({"a": {"flip": 1.5}}, r"a\.flip is 1.5", "between 0 and 1"),
        ({"a": {"flip": True}}, r"a\.flip is True", "between 0 and 1"),
        ({"a": {"jitter": [0.4, 0.4, 0.4]}}, r"a\.jitter", "4 numbers"),
        ({"a": {"jitter": [0.4, 0.4, 0.4, 0.9]}}, r"a\.jitter\.3 is 0.9", "0.5"),
        ({"a": {"crop": [0.9, 0.1]}}, r"a\.crop", "low <= high"),
        ({"a": {"views": {"blur": 1}}}, r"a\.views", "list"),
        ({"a": {"views": [{}, {"extends": "simclr"}]}}, r"a\.views\.1: unknown key 'extends'", "known:"),
        ({"a": "simclr"}, r"data\.recipes\.a is 'simclr'", "extends"),
        ({"a": {"extends": ["simclr"]}}, r"data\.recipes\.a is", "extends"),
    ],
)
def test_mistakes_are_named(own: dict[str, Any], cause: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        read_recipes(own)
    assert cure in caught.value.cure


def test_unknown_recipes_and_optional_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="view 'simlcr:0': no augmentation recipe") as caught:
        view("simlcr")
    assert "'simclr'" in caught.value.cure
    with pytest.raises(ConfigError, match="own"):
        view("own")
    with pytest.raises(ConfigError, match="optional"):
        image_view(View("image", "image", optional=True), CFG)


def test_recipes_pickle_and_load_no_torch() -> None:
    assert pickle.loads(pickle.dumps(view("byol", 1))) == view("byol", 1)
    code = "import sys, clipkit.data.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
