"""Augmentations of a small RGB image, on Pillow.

Colours are those of torchvision's operations on Pillow images, value for value, without its import (seconds
in every spawned worker). On tensors hue takes twice and blur up to four times as long.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from PIL import Image, ImageFilter

from clipkit.data.recipes import Augment

SIGMA_PIXELS = 224  # the view that sigma is given for
_ORDERS = tuple(itertools.permutations(range(4)))
_DRAWS = 12
_LEVELS = list(range(256))
_SOLARISED = [value if value < 128 else 255 - value for value in _LEVELS] * 3


def augmented(image: Image.Image, augment: Augment) -> Image.Image:
    """Returns an RGB image of the same size, changed as drawn from torch's global generator.

    Always twelve draws, each with its own purpose: changing one option leaves the others' draws alone.
    """
    draws = torch.rand(_DRAWS).tolist()
    flip, angle, jitter, order, *factors, grey, blur, sigma, solarise = draws
    if flip < augment.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.rotation:
        image = rotated(image, augment.rotation * (2 * angle - 1))
    if jitter < augment.jitter_p:
        image = _jittered(image, augment.jitter, _ORDERS[int(order * len(_ORDERS))], factors)
    if grey < augment.grey:
        image = image.convert("L").convert("RGB")
    if blur < augment.blur:
        low, high = augment.sigma
        pixels = (low + sigma * (high - low)) * min(image.size) / SIGMA_PIXELS
        image = image.filter(ImageFilter.GaussianBlur(pixels))
    if solarise < augment.solarise:
        image = image.point(_SOLARISED)
    return image


def _jittered(
    image: Image.Image, strength: tuple[float, ...], order: tuple[int, ...], draws: list[float]
) -> Image.Image:
    for which in order:
        largest = strength[which]
        if not largest:
            continue
        if which == 3:
            image = hue_shifted(image, largest * (2 * draws[3] - 1))
            continue
        low, high = max(0.0, 1 - largest), 1 + largest
        image = _SCALED[which](image, low + draws[which] * (high - low))
    return image


def brightness_scaled(image: Image.Image, factor: float) -> Image.Image:
    """Returns the image with its values scaled: 0 is black, 1 the image."""
    return Image.blend(Image.new("RGB", image.size), image, factor)


def contrast_scaled(image: Image.Image, factor: float) -> Image.Image:
    """Returns the image with its distances from the mean grey scaled."""
    grey = np.asarray(image.convert("L"))
    mean = int(int(grey.sum(dtype=np.int64)) / grey.size + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def saturation_scaled(image: Image.Image, factor: float) -> Image.Image:
    """Returns the image with its distances from its own grey scaled."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


_SCALED = (brightness_scaled, contrast_scaled, saturation_scaled)


def hue_shifted(image: Image.Image, shift: float) -> Image.Image:
    """Returns the image with its hues turned by `shift` circles, -0.5..0.5, in steps of 1/255."""
    step = int(shift * 255) % 256
    turned = _LEVELS[step:] + _LEVELS[:step]
    return image.convert("HSV").point(turned + _LEVELS + _LEVELS).convert("RGB")


def rotated(image: Image.Image, degrees: float) -> Image.Image:
    """Returns the image turned counter-clockwise about its centre, bilinear, at the same size.

    Black corners would tell the angle; the image is mirrored at its borders instead.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    width, height = image.size
    beside = max(0, math.ceil((width * abs(cos) + height * abs(sin) - width) / 2)) + 1
    above = max(0, math.ceil((width * abs(sin) + height * abs(cos) - height) / 2)) + 1
    margins = ((above, above), (beside, beside), (0, 0))
    ground = Image.fromarray(np.pad(np.asarray(image), margins, mode="reflect"))
    x, y = width / 2, height / 2
    matrix = (cos, -sin, x + beside - cos * x + sin * y, sin, cos, y + above - sin * x - cos * y)
    return ground.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
