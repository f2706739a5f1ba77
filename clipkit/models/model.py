"""The inference handle: pictures and captions in, unit vectors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from PIL import Image
from torch import Tensor

from clipkit.models.checks import trimmed_length
from clipkit.models.tokenizer import Tokenizer
from clipkit.models.towers import Towers
from clipkit.types import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: str) -> torch.device:
    """Returns the device named, or for "auto" the best present: cuda, mps, cpu.

    Raises ConfigError for a device that this machine does not have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # torch raises a type of its own for every backend, AssertionError for one it was built without.
    except Exception:
        present = _devices_present()
        if device in present or f"{device}:0" in present:
            raise
        raise ConfigError(
            f"there is no device {device!r} on this machine", f"use auto or one of {', '.join(present)}"
        ) from None
    return found


def _devices_present() -> list[str]:
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


class Model:
    """Two towers ready for use: in evaluation mode, without gradients, under one stated precision.

    preprocess  PIL image -> uint8 (3, H, V): open_clip's evaluation transform before normalisation
    image_size (height, width); tokenizer; logit_scale (a float, already exponentiated); logit_bias (a float
    or None); name and precision go into result files. Raises ConfigError for fp16 outside CUDA.
    """

    def __init__(
        self,
        towers: Towers,
        preprocess: Callable[[Image.Image], Tensor],
        device: str = "auto",
        precision: str = "fp32",
        name: str = "model",
    ) -> None:
        if precision not in DTYPES:
            raise ConfigError(f"unknown precision {precision}", f"use one of {', '.join(DTYPES)}")
        self.device = choose_device(device)
        if precision == "fp16" and self.device.type != "cuda":
            raise ConfigError(
                f"precision fp16 needs CUDA, the device is {self.device.type}", "use bf16 or fp32"
            )
        # requires_grad stays as it is: without it torch folds matrix products differently, even under
        # no_grad, and embeddings would no longer equal open_clip's to the last bit.
        self.towers = towers.to(self.device).eval()
        self.preprocess, self.precision, self.name = preprocess, precision, name
        self.image_size, self.context_length = towers.image_size, towers.context_length
        self.tokenizer: Tokenizer = towers.tokenizer
        self.logit_scale = float(towers.logit_scale.detach().exp())
        self.logit_bias = None if towers.logit_bias is None else float(towers.logit_bias.detach())

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Returns int64 (n, context_length)."""
        return self.tokenizer(list(captions))

    def _autocast(self) -> AbstractContextManager[None]:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def encode_image(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Returns unit vectors (B, D), at least fp32, of uint8 (B, 3, H, V) or of PIL images."""
        pixels = images if isinstance(images, Tensor) else torch.stack([self.preprocess(x) for x in images])
        with self._autocast():
            return self.towers.image(pixels.to(self.device))[1]

    @torch.no_grad()
    def encode_image_trunk(self, images: Tensor) -> Tensor:
        """Returns the pooled features before the joint projection (B, F), of uint8 (B, 3, H, V)."""
        with self._autocast():
            return self.towers.image(images.to(self.device))[0]

    @torch.no_grad()
    def encode_text(self, texts: Tensor | Sequence[str]) -> Tensor:
        """Returns unit vectors (n, D), at least fp32, of ids (n, T) or of captions."""
        tokens = texts if isinstance(texts, Tensor) else self.tokenize(texts)
        trim = self.towers.text_trim
        if trim is not None and len(tokens):
            tokens = tokens[:, : trimmed_length(tokens, trim, tokens.shape[1])]
        with self._autocast():
            return self.towers.text(tokens.to(self.device))[1]
