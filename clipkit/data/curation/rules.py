"""Rules about one sample: DataComp's basic filter (arXiv:2304.14108, baselines "basic"), and values read
from JSON fields.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.curation.balancing import Entries
from clipkit.data.curation.survey import Rows, rows_of
from clipkit.data.key_table import text_hash
from clipkit.data.preflight import holds_field
from clipkit.data.sample import (
    Absent,
    RawSample,
    Unusable,
    caption,
    field_value,
    image_bytes,
    image_size,
)
from clipkit.data.uid_subset import uid_halves
from clipkit.data.walked import walked_samples
from clipkit.types import ConfigError, DataError

DATACOMP = {"min_words": 3, "min_chars": 6, "min_side": 200, "max_aspect": 3.0}


@dataclass(frozen=True)
class Basic:
    """Bounds of the basic rules; None: the rule is left out. DataComp's basic filter: 3, 6, 200, 3.0, "en".

    min_words      words between white space, at least
    min_chars      characters of the caption, at least
    min_side       pixels of the shorter side, at least
    max_aspect     longer by shorter side, at most
    language       what `language_field` must hold, or what the fastText model `language_model` must say
    """

    min_words: int | None = None
    min_chars: int | None = None
    min_side: int | None = None
    max_aspect: float | None = None
    language: str | None = None
    language_field: str = "json.language"
    language_model: Path | None = None

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the rules that are asked for, in order."""
        bounds = {
            "words": self.min_words,
            "characters": self.min_chars,
            "shorter side": self.min_side,
            "aspect": self.max_aspect,
            "language": self.language,
        }
        return tuple(name for name, bound in bounds.items() if bound is not None)

    def check(self) -> None:
        """Raises ConfigError when the language rule cannot be computed."""
        if self.language_model is not None and self.language is None:
            raise ConfigError("--language-model needs a language", "add --language en")
        if self.language_model is not None:
            _language_model(str(self.language_model))

    def failed(self, sample: RawSample, caption_field: str) -> int:
        """Returns the rules that the sample breaks: bit i for `rules[i]`. Raises Unusable."""
        broken = []
        if self.min_words is not None or self.min_chars is not None or self.language_model is not None:
            text = text_of(sample, caption_field)
        if self.min_words is not None:
            broken.append(len(text.split()) < self.min_words)
        if self.min_chars is not None:
            broken.append(len(text) < self.min_chars)
        if self.min_side is not None or self.max_aspect is not None:
            width, height = original_size(sample)
        if self.min_side is not None:
            broken.append(min(width, height) < self.min_side)
        if self.max_aspect is not None:
            broken.append(not max(width, height) <= self.max_aspect * min(width, height))
        if self.language is not None:
            found = (
                _detected(str(self.language_model), text)
                if self.language_model is not None
                else _stated(sample, self.language_field)
            )
            broken.append(found != self.language)
        return sum(1 << bit for bit, value in enumerate(broken) if value)


def text_of(sample: RawSample, field: str) -> str:
    """Returns the caption with its white space, as the published rules count it; "" for none.

    Of a list the first entry. Raises Unusable for what training would refuse.
    """
    try:
        caption(sample, field)
    except Absent:
        return ""
    value = field_value(sample, field)
    return str(value[0] if isinstance(value, list) else value)


def original_size(sample: RawSample) -> tuple[float, float]:
    """Returns (width, height) in pixels: json.original_width and original_height, which img2dataset writes
    when it resizes, otherwise as the header of the image says.
    """
    try:
        width, height = (field_value(sample, f"json.original_{side}") for side in ("width", "height"))
        if isinstance(width, int | float) and isinstance(height, int | float) and min(width, height) > 0:
            return width, height
    except Absent:
        pass  # most shards: the image tells
    return image_size(image_bytes(sample))


def number_at(sample: RawSample, field: str) -> float:
    """Returns the number at a JSON field, NaN where there is none. Raises Unusable for a damaged member."""
    try:
        value = field_value(sample, field)
    except Absent:
        return math.nan
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _stated(sample: RawSample, field: str) -> Any:
    try:
        return field_value(sample, field)
    except Absent:
        return None


@functools.cache
def _language_model(path: str) -> Any:
    try:
        fasttext: Any = importlib.import_module("fasttext")
    except ImportError as error:
        raise ConfigError(
            "--language-model needs the package fasttext", "install it, or use --language-field"
        ) from error
    if not os.path.isfile(path):
        raise ConfigError(
            f"{path}: no such file", "download fastText's lid.176.bin and give its path to --language-model"
        )
    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}", "give a fastText model, for example lid.176.bin") from error


def _detected(path: str, text: str) -> str:
    # fastText refuses line breaks; DataComp replaces them as well.
    labels, _ = _language_model(path).predict(text.replace("\n", " "))
    return str(labels[0]).removeprefix("__label__") if len(labels) else ""


@dataclass(frozen=True)
class Plan:
    """What the survey of a filter looks at.

    caption       field of the caption that counts
    score_field   JSON field with a precomputed score, None: no score, or one of a model
    entries       what finds the metadata entries in a caption, None: no balancing
    uid_field     field with the 32 hexadecimal digits of a DataComp uid, None: not needed
    """

    caption: str
    basic: Basic
    score_field: str | None = None
    entries: Entries | None = None
    uid_field: str | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that decide, each of which some sample must hold."""
        basic = self.basic
        by_text = (basic.min_words, basic.min_chars, basic.language_model, self.entries)
        stated = basic.language is not None and basic.language_model is None
        fields = (
            self.caption if any(rule is not None for rule in by_text) else None,
            basic.language_field if stated else None,
            self.score_field,
        )
        return tuple(dict.fromkeys(field for field in fields if field is not None))


def examine(shard: str, plan: Plan) -> dict[str, Rows]:
    """Returns the rows of one shard: key, `failed` (bits), `reason` why a sample cannot be used, `score`,
    `draw` (hash of the key), `entries` (how many were found), `uid`; flat as `entries` their numbers; and as
    `absent` which of `plan.reads` no sample holds.
    """
    absent = set(plan.reads)
    keys: list[str] = []
    failed, reasons, scores, draws, counts = [], [], [], [], []
    found: list[NDArray[np.int32]] = []
    uids = []
    for sample in walked_samples(shard):
        absent -= {field for field in absent if holds_field(sample, field)}
        bits, reason, score, uid = 0, "", math.nan, (0, 0)
        matched = np.zeros(0, np.int32)
        try:
            bits = plan.basic.failed(sample, plan.caption)
            if plan.score_field is not None:
                score = number_at(sample, plan.score_field)
            if plan.entries is not None:
                matched = plan.entries.find(text_of(sample, plan.caption))
            if plan.uid_field is not None:
                uid = uid_at(sample, plan.uid_field)
        except Unusable as error:
            reason = error.reason
        keys.append(sample.key)
        failed.append(bits)
        reasons.append(reason.encode()[:40])
        scores.append(score)
        uids.append(uid)
        if plan.entries is not None:
            draws.append(text_hash(sample.key))
            counts.append(len(matched))
            found.append(matched)
    columns: dict[str, NDArray[Any]] = {
        "failed": np.array(failed, np.uint8),
        "reason": np.array(reasons, "S40"),
    }
    if plan.score_field is not None:
        columns["score"] = np.array(scores, np.float64)
    if plan.uid_field is not None:
        columns["uid"] = np.array(uids, np.uint64).reshape(-1, 2)
    nowhere = np.array([field in absent for field in plan.reads], np.bool_)
    if plan.entries is None:
        return {"samples": rows_of(keys, **columns), "absent": nowhere}
    columns["draw"] = np.array(draws, np.uint64)
    columns["entries"] = np.array(counts, np.int32)
    return {
        "samples": rows_of(keys, **columns),
        "absent": nowhere,
        "entries": np.concatenate(found) if found else np.zeros(0, np.int32),
    }


def uid_at(sample: RawSample, field: str) -> tuple[int, int]:
    """Returns the two halves of a DataComp uid. DataError when the sample has none."""
    halves = uid_halves(_stated(sample, field))
    if halves is None:
        raise DataError(
            f"sample {sample.key!r}: {field} holds no uid of 32 hexadecimal digits",
            "name the field with --uid-field, or write the keys as .csv or .parquet",
        )
    return halves
