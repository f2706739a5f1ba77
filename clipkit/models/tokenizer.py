"""Tokenizers that work offline and pickle (DataLoader workers start by fork, spawn or forkserver)."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from clipkit.types import ConfigError

SIMPLE_VOCABULARY = 49408
SIMPLE_START, SIMPLE_END = 49406, 49407
CACHED_WORDS = 1 << 18
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
)


class Tokenizer(Protocol):
    """Captions -> ids (n, context_length); `vocab_size`, `pad_id` and `end_id` describe them."""

    context_length: int
    vocab_size: int
    pad_id: int
    end_id: int | None

    def __call__(self, captions: list[str]) -> Tensor:
        """Returns int64 (n, context_length)."""

    def describe(self) -> dict[str, Any]:
        """Returns {"kind": "byte_pair" | "huggingface", "source": where its files are}, JSON-able."""

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files into `folder`, if it has any."""


@lru_cache(maxsize=8)
def _simple_tokenizer(options: str) -> SimpleTokenizer:
    return SimpleTokenizer(**json.loads(options))


class BytePairTokenizer:
    """open_clip's SimpleTokenizer: CLIP's 49,408 byte pairs, padded with 0, shipped in open_clip's wheel."""

    def __init__(self, context_length: int, **options: Any) -> None:
        self.context_length = context_length
        self.vocab_size = SIMPLE_VOCABULARY
        self.pad_id = 0
        self.end_id: int | None = SIMPLE_END
        self._options = json.dumps(options, sort_keys=True)
        if "reduction_mask" in options:
            raise ConfigError(
                "text_cfg.tokenizer_kwargs.reduction_mask draws tokens at random, in evaluation as well",
                "remove it: long captions are cut at the context length",
            )
        try:
            # Not kept as an attribute: copies and pickles stay small, and each process builds it once.
            _simple_tokenizer(self._options)
        except (TypeError, AssertionError) as error:
            raise ConfigError(
                f"text_cfg.tokenizer_kwargs {options} is not accepted: {error}",
                "known: clean (lower, whitespace or canonicalize)",
            ) from error

    def __call__(self, captions: list[str]) -> Tensor:
        """Returns int64 (n, context_length)."""
        tokenizer = _simple_tokenizer(self._options)
        # It remembers every word it ever met; on web text that never stops growing.
        if len(tokenizer.cache) > CACHED_WORDS:
            tokenizer.cache = {word: word for word in map(tokenizer.decoder.get, tokenizer.all_special_ids)}
        return tokenizer(list(captions), self.context_length)

    def describe(self) -> dict[str, Any]:
        """Returns its kind; there are no files to point at."""
        return {"kind": "byte_pair", "source": None}

    def save(self, folder: Path) -> None:
        """Writes nothing: the vocabulary ships with open_clip."""


class HuggingFaceTokenizer:
    """A tokenizer of the transformers library, read from a local directory or the local hub cache.

    fetch: whether it may be downloaded, which only a pretrained tag that the user named allows.
    """

    def __init__(
        self, source: str, context_length: int, mode: str | None = None, fetch: bool = False, **options: Any
    ) -> None:
        self.source, self.context_length = source, context_length
        path = Path(source)
        if not path.is_dir() and path.is_absolute():
            raise ConfigError(
                f"tokenizer {source}: no such directory",
                "name a directory that holds tokenizer.json (save_pretrained writes one)",
            )
        try:
            self._tokenizer = HFTokenizer(
                str(source), context_length, tokenizer_mode=mode, local_files_only=not fetch, **options
            )
        except (OSError, ValueError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"tokenizer {source} cannot be read: {str(error).splitlines()[0]}",
                "set model.tokenizer to a local directory with tokenizer files; nothing is downloaded",
            ) from error
        inner = self._tokenizer.tokenizer
        if inner.pad_token_id is None:
            raise ConfigError(
                f"tokenizer {source} has no padding token", "add a pad_token to its tokenizer_config.json"
            )
        self.vocab_size = len(inner)
        self.pad_id = int(inner.pad_token_id)
        end = inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id
        self.end_id: int | None = None if end is None else int(end)
        if options.get("strip_sep_token"):
            self.end_id = None

    def __call__(self, captions: list[str]) -> Tensor:
        """Returns int64 (n, context_length)."""
        return self._tokenizer(list(captions)).to(torch.int64)

    def describe(self) -> dict[str, Any]:
        """Returns its kind and source; the source is absolute when it is a directory."""
        source = str(Path(self.source).resolve()) if Path(self.source).is_dir() else self.source
        return {"kind": "huggingface", "source": source}

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files into `folder`."""
        self._tokenizer.save_pretrained(str(folder))


def has_tokenizer(folder: Path) -> bool:
    """Returns whether `folder` holds files of a transformers tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def build_tokenizer(text_cfg: dict[str, Any], tokenizer: str | None, fetch: bool = False) -> Tokenizer:
    """Returns the tokenizer of a text tower: `tokenizer`, else hf_tokenizer_name, else CLIP's own."""
    context_length = int(text_cfg.get("context_length", 77))
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    source = tokenizer or text_cfg.get("hf_tokenizer_name")
    if source:
        return HuggingFaceTokenizer(
            str(source), context_length, text_cfg.get("tokenizer_mode"), fetch, **options
        )
    return BytePairTokenizer(context_length, **options)
