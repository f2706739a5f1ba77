"""How many tokens a caption has, without torch: CLIP's byte pairs as open_clip cleans and cuts text, or a
tokenizer.json.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import os
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clipkit.types import ConfigError

CLIP = "clip"
CONTEXT = 77
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49_152 - 256 - 2  # of the file's lines, which follow one of its version
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TokenRule:
    """Which tokens are counted: `source` is "clip", a tokenizer.json, or a name on the Hugging Face hub.

    context    tokens that a model reads, start and end among them
    clean      as in open_clip: lower, whitespace or canonicalize
    """

    source: str = CLIP
    context: int = CONTEXT
    clean: str = "lower"


def rule_of(model: str | None, tokenizer: str | None, context: int | None) -> TokenRule:
    """Returns the rule of an open_clip model name or exported directory, of a tokenizer.json, or of CLIP.

    Raises ConfigError for an unknown model, a missing file, or a tokenizer that is out of reach.
    """
    rule = TokenRule() if model is None else _of_model(model)
    if tokenizer is not None and tokenizer != CLIP:
        if not Path(tokenizer).is_file():
            raise ConfigError(f"--tokenizer {tokenizer} is not a file", "give a tokenizer.json, or clip")
        rule = TokenRule(str(Path(tokenizer).absolute()), rule.context, rule.clean if model else "whitespace")
    elif tokenizer == CLIP:
        rule = TokenRule(context=rule.context)
    rule = TokenRule(rule.source, context or rule.context, rule.clean)
    counter(rule)
    return rule


def _of_model(model: str) -> TokenRule:
    folder = Path(model)
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    configs = Path(spec.submodule_search_locations[0]) / "model_configs"
    exported = (folder / "open_clip_config.json").is_file()
    file = folder / "open_clip_config.json" if exported else configs / f"{model}.json"
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        text = config.get("model_cfg", config)["text_cfg"]
    except FileNotFoundError:
        raise ConfigError(
            f"no open_clip model and no exported directory is called {model!r}",
            "give a name such as ViT-B-32, or a directory with open_clip_config.json",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({type(error).__name__})", "export the model again"
        ) from None
    name, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs") or {}
    context = int(text.get("context_length") or CONTEXT)
    if name is None:
        return TokenRule(CLIP, context, options.get("clean", "lower"))
    own = folder / "tokenizer.json"
    source = str(own.absolute()) if own.is_file() else str(name)
    return TokenRule(source, context, options.get("clean", "whitespace"))


@lru_cache(maxsize=4)
def counter(rule: TokenRule) -> Callable[[Sequence[str]], list[int]]:
    """Returns a function: captions -> tokens of each, start and end included, before any cut."""
    # Threads of its own in each of our processes would only fight for the cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = _clip_tokenizer() if rule.source == CLIP else _stored_tokenizer(rule.source)
    more = len(_SPECIAL) if rule.source == CLIP else 0

    def count(captions: Sequence[str]) -> list[int]:
        cleaned = [cleaned_text(text, rule.clean) for text in captions]
        return [len(found.ids) + more for found in tokenizer.encode_batch(cleaned)]

    return count


def cleaned_text(text: str, clean: str) -> str:
    """Returns the caption as open_clip's tokenizers see it."""
    # What ftfy leaves alone, at a hundredth of its price.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if clean == "canonicalize":
        text = text.replace("_", " ").translate(_PUNCTUATION)
    text = " ".join(text.split())
    return text if clean == "whitespace" else text.lower()


def _clip_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    lines = gzip.decompress((Path(spec.submodule_search_locations[0]) / _VOCABULARY).read_bytes())
    merges = [
        (left, right)
        for left, _, right in (line.partition(" ") for line in lines.decode().split("\n")[1 : _MERGES + 1])
    ]
    letters = sorted(ByteLevel.alphabet())
    units = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    # Numbers of the units are ours: only how many there are is asked for.
    model = BPE({unit: number for number, unit in enumerate(units)}, merges, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    words = Split(Regex(_WORDS), "removed", invert=True)
    tokenizer.pre_tokenizer = Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def _stored_tokenizer(source: str) -> Any:
    from tokenizers import Tokenizer

    try:
        local = Path(source).is_file()
        tokenizer = Tokenizer.from_file(source) if local else Tokenizer.from_pretrained(source)
    except Exception as error:
        # The library raises Exception itself, for broken files and for a hub out of reach.
        raise ConfigError(
            f"the tokenizer {source} cannot be loaded ({' '.join(str(error).split())[:120]})",
            "give its file: --tokenizer PATH/tokenizer.json",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
