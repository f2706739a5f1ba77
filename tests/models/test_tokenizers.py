"""Tokenizers: the same ids as open_clip, in every process, from local files only."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from clipkit.models import Tokenizer, build
from clipkit.models import tokenizer as module
from clipkit.models.tokenizer import build_tokenizer
from clipkit.types import ConfigError
from tests.models.test_towers import ROBERTA, TEXT, model_cfg

CAPTIONS = ["a photo of a cat", "Naïve café — 東京!", "", "word " * 100]


def local_tokenizer(folder: Path) -> str:
    """A word-level tokenizer of a few words, saved as transformers saves one."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "a",
        "photo",
        "of",
        "cat",
        "red",
        "kite",
        "two",
        "small",
        "dogs",
    ]
    words = Words(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(str(folder))
    return str(folder)


def encode(tokenizer: Tokenizer, captions: list[str]) -> Any:
    return tokenizer(captions).tolist()


def test_byte_pairs_are_those_of_open_clip() -> None:
    ours = build_tokenizer({"context_length": 16}, None)
    assert torch.equal(ours(CAPTIONS), open_clip.get_tokenizer("ViT-B-32", context_length=16)(CAPTIONS))
    clean = {"context_length": 16, "tokenizer_kwargs": {"clean": "canonicalize"}}
    assert torch.equal(
        build_tokenizer(clean, None)(CAPTIONS), open_clip.SimpleTokenizer(clean="canonicalize")(CAPTIONS, 16)
    )
    for options in ({"clean": "no"}, {"reduction_mask": "random"}, {"lower": True}):
        with pytest.raises(ConfigError, match="tokenizer_kwargs"):
            build_tokenizer({"tokenizer_kwargs": options}, None)


def test_tokenizers_survive_the_way_to_a_worker(tmp_path: Path) -> None:
    for kind, source in {"byte_pair": None, "huggingface": local_tokenizer(tmp_path)}.items():
        tokenizer = build_tokenizer({"context_length": 12}, source)
        assert tokenizer.describe()["kind"] == kind
        assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(CAPTIONS), tokenizer(CAPTIONS))


def test_the_memory_of_words_is_bounded_and_changes_nothing(monkeypatch: Any) -> None:
    tokenizer = build_tokenizer({"context_length": 12}, None)
    expected = tokenizer(CAPTIONS)
    monkeypatch.setattr(module, "CACHED_WORDS", 5)
    for _ in range(3):
        assert torch.equal(tokenizer(CAPTIONS), expected)
    assert torch.equal(tokenizer(["<end_of_text>"])[0, :3], torch.tensor([49406, 49407, 49407]))


def test_a_local_transformers_tokenizer(tmp_path: Path) -> None:
    source = local_tokenizer(tmp_path / "words")
    tokenizer = build_tokenizer({"context_length": 8}, source)
    assert tokenizer(["a red cat"]).tolist() == [[0, 4, 8, 7, 2, 1, 1, 1]]
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.vocab_size) == (1, 2, 13)
    small = {"context_length": 16, "vocab_size": 13, "width": 32, "heads": 2, "layers": 1}
    with pytest.raises(ConfigError, match="pool_type: eos"):
        build(model_cfg(text=small), tokenizer=source)
    towers = build(model_cfg(text=small | {"pool_type": "eos", "eos_id": 2}), tokenizer=source)
    assert towers.text_trim == 1
    roberta = ROBERTA | {"hf_config": {**ROBERTA["hf_config"], "vocab_size": 13}}  # type: ignore[dict-item]
    towers = build(model_cfg(text=roberta), tokenizer=source)
    assert towers.text_trim == 1
    assert towers.model_cfg["text_cfg"]["hf_config"]["pad_token_id"] == 1
    with pytest.raises(ConfigError, match="nothing is downloaded"):
        build(model_cfg(text=TEXT), tokenizer="someone/some-tokenizer")
    with pytest.raises(ConfigError, match="no such directory"):
        build(model_cfg(text=TEXT), tokenizer=str(tmp_path / "missing"))
