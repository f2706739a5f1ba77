"""Text views: which caption, edited or not, as token ids cut to the length the batch needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.data.captions import CaptionSource
from clipkit.data.recipes import suggestion
from clipkit.types import ClipkitError, ConfigError, View

Tokenizer = Callable[[list[str]], Tensor]
TRIM_MULTIPLE = 8
EDA = "eda"
TEXT_RECIPES = ("", "dropout", EDA)
# Tokenised where an optional caption is absent: rows of padding alone give NaN in towers that mask it.
ABSENT_CAPTION = "a"


@dataclass(frozen=True, kw_only=True)
class TextView:
    """A named view of a caption. Picklable when its tokenizer is.

    tokenizer        list of n captions -> int64 (n, context_length)
    context_length   in tokens
    trim             "argmax": a row ends at its largest id (CLIP's end-of-text); an int: the padding id;
                     None: the tower needs the full length
    recipe           "" or "dropout": the caption as it is; "eda": edited, drawn per slot and view name
    field            caption field, None: the one drawn for the slot among those of the source
    index            line of a text member or entry of a JSON list; None: the whole text, or the first entry
    optional         a sample without this caption is kept; `Batch.present` says which
    """

    name: str = "text"
    tokenizer: Tokenizer
    context_length: int = 77
    trim: str | int | None = None
    recipe: str = ""
    field: str | None = None
    index: int | None = None
    optional: bool = False

    @property
    def source(self) -> CaptionSource:
        """Which caption the view reads."""
        return CaptionSource(self.field, self.index)

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


def text_view(view: View, tokenizer: Tokenizer, context_length: int, trim: str | int | None) -> TextView:
    """Returns what builds a declared text view for a tower with this tokenizer.

    `view.index` picks a caption (line or list entry) in a plain view that names a field or a later caption;
    in other recipes it only numbers the views. Raises ConfigError for an unknown recipe.
    """
    if view.recipe not in TEXT_RECIPES:
        raise ConfigError(
            f"view {view.name!r}: no text recipe is called {view.recipe!r}",
            suggestion(view.recipe, TEXT_RECIPES),
        )
    picks = view.recipe == "" and (view.field is not None or view.index > 0)
    return TextView(
        name=view.name,
        tokenizer=tokenizer,
        context_length=context_length,
        trim=trim,
        recipe=view.recipe,
        field=view.field,
        index=view.index if picks else None,
        optional=view.optional,
    )
