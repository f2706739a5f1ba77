"""Image views: how an image becomes the uint8 pixels of one size that a tower reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from clipkit.data.augment import augmented
from clipkit.data.recipes import Augment, find_looks, read_recipes
from clipkit.data.sample import WHITE, as_rgb
from clipkit.types import ConfigError, View

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_TRIES = 10
_DEFAULT_SCALE = (0.9, 1.0)
SIZE_MULTIPLE = 8  # of views smaller than the tower's size


@dataclass(frozen=True)
class ImageView:
    """A named view of an image. Calling it returns uint8 (3, H, V), not normalised.

    train=True   random resized crop: area `scale`, aspect `ratio` (torchvision's distribution), drawn from
                 torch's global generator; never a horizontal flip, because captions name left and right;
                 scale=None: settled by the number of pairs when training data is opened
    train=False  exactly the pixels of open_clip's evaluation transform before normalisation
    size         (height, width) in pixels
    background   the colour under transparent images, white by default: a plain conversion to RGB shows
                 whatever colour is stored below the transparency, usually black
    resize_mode  "shortest" (resize, centre crop), "longest" (resize, pad with fill_color) or "squash"
    augment      what happens to the image at this size, drawn after the crop from the same generator
    """

    name: str = "image"
    size: tuple[int, int] = (224, 224)
    scale: tuple[float, float] | None = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    train: bool = True
    background: tuple[int, int, int] = WHITE
    interpolation: str = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS:
            raise ConfigError(
                f"view {self.name!r}: interpolation {self.interpolation!r} is not known",
                "use bicubic or bilinear",
            )
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                f"view {self.name!r}: crop scale {self.scale} is not within 0..1",
                "use for example [0.5, 1.0]",
            )

    def for_pairs(self, num_pairs: int) -> ImageView:
        """Returns the view with its crop scale settled: the fewer pairs, the stronger the crops."""
        if self.scale is not None:
            return self
        low = 0.9 if num_pairs > 50_000_000 else 0.75 if num_pairs >= 15_000_000 else 0.5
        return replace(self, scale=(low, 1.0))

    @classmethod
    def from_preprocess(cls, preprocess_cfg: Mapping[str, Any], **options: Any) -> ImageView:
        """Returns the view that an open_clip preprocess_cfg describes; `options` are further fields."""
        size = preprocess_cfg.get("size", 224)
        known = {
            key: preprocess_cfg[key]
            for key in ("interpolation", "resize_mode", "fill_color")
            if preprocess_cfg.get(key) is not None
        }
        pair = (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
        return cls(size=pair, **{**known, **options})

    def __call__(self, image: Image.Image) -> Tensor:
        image = as_rgb(image, self.background)
        image = self._random_crop(image) if self.train else self._evaluation(image)
        if self.augment is not None:
            image = augmented(image, self.augment)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, 3).permute(2, 0, 1)

    def _random_crop(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        return image.resize((width, height), _FILTERS[self.interpolation], box=self._crop_box(*image.size))

    def _crop_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) as torchvision's RandomResizedCrop, with one draw for all tries."""
        least, most = self.scale or _DEFAULT_SCALE
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, aspect, x, y in torch.rand(_TRIES, 4).tolist():
            target = width * height * (least + area * (most - least))
            ratio = math.exp(low + aspect * (high - low))
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _evaluation(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        resample = _FILTERS[self.interpolation]
        if self.resize_mode == "squash":
            return image.resize((width, height), resample)
        if self.resize_mode == "shortest" and height != width:
            # open_clip has no choice of filter in this one case.
            resample = Image.Resampling.BICUBIC
        w, h = _resized(image.size, self.size, self.resize_mode)
        image = image.resize((w, h), resample) if (w, h) != image.size else image
        return _centre(image, self.size, self.fill_color)


def image_view(
    view: View,
    preprocess_cfg: Mapping[str, Any],
    *,
    size: tuple[int, int] | None = None,
    crop_scale: tuple[float, float] | None = None,
    recipes: Mapping[str, Any] | None = None,
) -> ImageView:
    """Returns what builds a declared view for a tower with this open_clip preprocess_cfg.

    size        (height, width) of the tower's input, the preprocess_cfg's without it
    crop_scale  of recipes that keep the default crop; None: settled by the number of pairs
    recipes     the user's own: name -> values (see `read_recipes`)
    Raises ConfigError for an unknown recipe or key, naming the nearest known one.
    """
    if view.optional:
        raise ConfigError(
            f"image view {view.name!r} is declared optional",
            "only text views can be; samples without an image are replaced",
        )
    looks = find_looks(view.recipe, read_recipes(recipes), f"view {view.name!r}")
    look = looks[min(view.index, len(looks) - 1)]
    built = ImageView.from_preprocess(
        preprocess_cfg,
        name=view.name,
        scale=look.crop or crop_scale,
        ratio=look.ratio,
        train=not look.evaluation,
        augment=None if look.augment == Augment() else look.augment,
    )
    height, width = size or built.size
    return replace(built, size=(_share(height, look.size), _share(width, look.size)))


def _share(pixels: int, share: float) -> int:
    if share == 1.0:
        return pixels
    return min(pixels, max(1, round(pixels * share / SIZE_MULTIPLE)) * SIZE_MULTIPLE)


def _resized(size: tuple[int, int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """(width, height) after open_clip's resize of `size` (width, height) for a `target` (height, width)."""
    w, h = size
    if mode == "shortest" and target[0] == target[1]:
        short, long = min(w, h), max(w, h)
        long = int(target[0] * long / short)
        return (target[0], long) if w <= h else (long, target[0])
    pick = min if mode == "shortest" else max
    ratio = pick(h / target[0], w / target[1])
    return max(1, round(w / ratio)), max(1, round(h / ratio))


def _centre(image: Image.Image, target: tuple[int, int], fill: int) -> Image.Image:
    """The centre of an image, padded first where it is smaller; rounding as in torchvision's center_crop."""
    height, width = target
    if image.width < width or image.height < height:
        left, top = max(0, (width - image.width) // 2), max(0, (height - image.height) // 2)
        ground = Image.new("RGB", (max(width, image.width), max(height, image.height)), (fill, fill, fill))
        ground.paste(image, (left, top))
        image = ground
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))
