"""Encoders that need no weights: fixed random projections of pixels and characters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

SIZE = (6, 8)
LENGTH = 24


def small_pixels(image: Image.Image) -> Tensor:
    """Returns uint8 (3, 6, 8)."""
    resized = image.convert("RGB").resize((SIZE[1], SIZE[0]))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


class Projection:
    """An Encoder whose rows also depend, a little, on their place in the batch and on the batch around them.

    Real kernels do that in the last bits; here it is large enough to change ranks, so that results can only
    agree across numbers of ranks if every row is computed in the same batch at the same place.
    """

    name, precision, image_size = "projection", "fp32", SIZE

    def __init__(self, width: int = 12, position_noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(7)
        self.image_weight = torch.randn(3 * SIZE[0] * SIZE[1], width, generator=generator)
        self.text_weight = torch.randn(LENGTH, width, generator=generator)
        self.position_noise = position_noise
        self.image_shapes: list[tuple[int, ...]] = []
        self.text_shapes: list[tuple[int, ...]] = []
        self.preprocess = small_pixels

    def _disturbed(self, rows: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, rows.numel()).reshape(rows.shape)
        rows = rows + self.position_noise * (place + rows.mean(0))
        return functional.normalize(rows, dim=1)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Returns character codes, int64 (n, 24)."""
        return torch.tensor([[ord(c) for c in caption.ljust(LENGTH)[:LENGTH]] for caption in captions])

    def encode_image(self, images: Tensor) -> Tensor:
        """Returns unit rows of uint8 images."""
        assert images.dtype == torch.uint8
        self.image_shapes.append(tuple(images.shape))
        return self._disturbed((images.float() / 255 - 0.5).flatten(1) @ self.image_weight)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns unit rows of character codes."""
        self.text_shapes.append(tuple(tokens.shape))
        return self._disturbed(torch.sin(tokens.float()) @ self.text_weight)


class OnMetal(Tensor):
    """A tensor on an Apple GPU, as far as evaluation notices: without float64, and apart from CPU tensors."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuses what Metal refuses."""
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        if any(x is torch.float64 for x in args) or func is Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if any(isinstance(x, Tensor) and not isinstance(x, cls) for x in args):
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})


class MetalProjection(Projection):
    """A Projection that computes on an Apple GPU."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Returns unit rows of uint8 images."""
        return super().encode_image(images).as_subclass(OnMetal)

    def encode_image_trunk(self, images: Tensor) -> Tensor:
        """Returns unit rows of uint8 images."""
        return self.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns unit rows of character codes."""
        return super().encode_text(tokens).as_subclass(OnMetal)
