"""What is tried on two captions and one image at build time, so that wrong settings fail before training."""

from __future__ import annotations

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from clipkit.models.tokenizer import Tokenizer
from clipkit.models.trunk import Cut, normalised
from clipkit.types import ConfigError

CHECK_CAPTIONS = ["a red kite", "two small dogs running after a ball on wet sand"]
# Rounding moves a unit vector by about 1e-7; a tower that must not be trimmed moves by 0.1 and more.
TOLERANCE = 1e-5


def trimmed_length(tokens: Tensor, trim: str | int, context_length: int) -> int:
    """Returns the length to which `tokens` (n, T) may be cut: the longest row, rounded up to 8.

    "argmax": a row ends at its largest id (CLIP's end of text); an int: at its last id that is not it.
    """
    if trim == "argmax":
        longest = int(tokens.argmax(dim=-1).max()) + 1
    else:
        kept = tokens.ne(int(trim)).any(dim=0).nonzero()
        longest = int(kept.max()) + 1 if len(kept) else 1
    return min(-(-longest // 8) * 8, context_length)


def check_tokenizer(tower: nn.Module, tokenizer: Tokenizer) -> None:
    """Raises ConfigError when the ids of the tokenizer are not those that the text tower was set up for."""
    rows = int(tower.vocab_size)  # type: ignore[arg-type]
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the text tower only {rows}",
            f"set the tower's vocab_size to at least {tokenizer.vocab_size}, or name its own tokenizer",
        )
    if isinstance(tower, HFTextEncoder) and tower.config.pad_token_id != tokenizer.pad_id:
        raise ConfigError(
            f"the tokenizer pads with {tokenizer.pad_id}, the text tower masks {tower.config.pad_token_id}",
            f"set the text model's pad_token_id to {tokenizer.pad_id}, or name its own tokenizer",
        )
    if not isinstance(tower, TextTransformer) or tower.cls_emb is not None or tokenizer.end_id is None:
        return
    if tower.pool_type == "eos" and tower.eos_id != tokenizer.end_id:
        raise ConfigError(
            f"text_cfg.eos_id is {tower.eos_id}, the tokenizer ends texts with {tokenizer.end_id}",
            f"set text_cfg.eos_id: {tokenizer.end_id}",
        )
    if tower.pool_type == "argmax" and any(tokenizer(CHECK_CAPTIONS).amax(dim=-1) != tokenizer.end_id):
        raise ConfigError(
            "text_cfg.pool_type argmax reads the largest id, which is not this tokenizer's end of text",
            f"set text_cfg.pool_type: eos and text_cfg.eos_id: {tokenizer.end_id}",
        )


@torch.no_grad()
def check_cut(part: str, tower: nn.Module, cut: Cut, x: Tensor, embed_dim: int) -> None:
    """Raises ConfigError when the tower refuses `x`, returns no (B, D), or is cut in the wrong place."""
    try:
        expected = tower(x)
        joint = cut.project(tower, cut.trunk(tower, x))
    except (RuntimeError, ValueError, IndexError, AssertionError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        cure = (
            "set vision_cfg.image_size to the size that this timm model is made for"
            if part == "image"
            else "check context_length, the positions and the pooling of the text tower"
        )
        raise ConfigError(
            f"the {part} tower refuses input of shape {tuple(x.shape)}: {reason}", cure
        ) from error
    if expected.shape != (len(x), embed_dim):
        raise ConfigError(
            f"the {part} tower returns {tuple(expected.shape)} instead of {(len(x), embed_dim)}",
            "choose a projection and a pooling that give one vector of embed_dim numbers",
        )
    if not torch.allclose(joint, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise ConfigError(
            f"the {part} tower of the installed open_clip differs from the one clipkit knows",
            "install open_clip_torch 3.3",
        )


@torch.no_grad()
def settle_trim(
    tower: nn.Module, cut: Cut, tokens: Tensor, tokenizer: Tokenizer
) -> tuple[str | int | None, str]:
    """Returns (how texts may be trimmed, or None; a note for the banner, or "").

    A tower that declares trimming is tried at every length its captions allow; a difference switches it off.
    """
    off = "text: padding is encoded as well (no trimming), because "
    if not cut.trims:
        return None, off + "this tower's output depends on it"
    if tokenizer.pad_id == tokenizer.end_id:
        return None, off + "the tokenizer pads with its end of text"
    largest_ends = tokenizer.end_id == tokenizer.vocab_size - 1
    trim: str | int = "argmax" if largest_ends and tokenizer.pad_id == 0 else tokenizer.pad_id
    whole = normalised(cut.project(tower, cut.trunk(tower, tokens)))
    for row in range(len(tokens)):
        one = tokens[row : row + 1]
        shortest = trimmed_length(one, trim, tokens.shape[1])
        for length in range(shortest, tokens.shape[1], 8):
            part = normalised(cut.project(tower, cut.trunk(tower, one[:, :length])))
            if not torch.allclose(part, whole[row : row + 1], rtol=0, atol=TOLERANCE):
                difference = float((part - whole[row : row + 1]).abs().max())
                return None, off + f"{length} and {tokens.shape[1]} tokens differ by {difference:.2g}"
    return trim, ""


@torch.no_grad()
def takes_any_size(tower: nn.Module, picture: Tensor) -> bool:
    """Returns whether the image tower reads `picture` (1, 3, H, V) at half its size as well."""
    if not isinstance(tower, TimmModel):
        return False  # positional embeddings of one size
    half = nn.functional.interpolate(picture, scale_factor=0.5)
    try:
        tower(half)
    except (RuntimeError, ValueError, AssertionError):
        # timm says no in many words; which ones is its own affair.
        return False
    return True


def draws_random_numbers(tower: nn.Module) -> bool:
    """Returns whether the tower drops units, paths or patches while training."""
    for module in tower.modules():
        if "Drop" in type(module).__name__:
            rates = [getattr(module, name, 0.0) for name in ("p", "prob", "drop_prob")]
            if any(isinstance(rate, float) and rate > 0 for rate in rates):
                return True
    return False
