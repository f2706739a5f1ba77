"""Text views: captions to token ids, cut to the length the batch needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.types import ClipkitError

Tokenizer = Callable[[list[str]], Tensor]
TRIM_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class TextView:
    """A named view of a caption. Picklable when its tokenizer is.

    tokenizer        list of n captions -> int64 (n, context_length)
    context_length   in tokens
    trim             "argmax": a row ends at its largest id (CLIP's end-of-text); an int: the padding id;
                     None: the tower needs the full length
    """

    name: str = "text"
    tokenizer: Tokenizer
    context_length: int = 77
    trim: str | int | None = None

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Returns int64 (B, context_length)."""
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        tokens = self.tokenizer(list(captions)).to(torch.int64)
        if tokens.shape != (len(captions), self.context_length):
            raise ClipkitError(
                f"the tokenizer of text view {self.name!r} returned shape {tuple(tokens.shape)} "
                f"for {len(captions)} captions and a context of {self.context_length}",
                "use the tokenizer that belongs to the model",
            )
        return tokens

    def trimmed(self, tokens: Tensor) -> Tensor:
        """Returns the tokens cut to the longest row, rounded up to a multiple of 8, at most their length."""
        if self.trim is None or not len(tokens):
            return tokens
        if self.trim == "argmax":
            longest = int(tokens.argmax(dim=-1).max()) + 1
        else:
            used = tokens.ne(int(self.trim)).any(dim=0).nonzero()
            longest = int(used.max()) + 1 if len(used) else 1
        return tokens[:, : min(-(-longest // TRIM_MULTIPLE) * TRIM_MULTIPLE, tokens.shape[1])].contiguous()
