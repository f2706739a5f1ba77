"""The filter's rules against slow ones written from the published definitions."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipkit.cli.app import main
from clipkit.data.curation.balancing import (
    PUBLISHED,
    WORDS,
    Entries,
    drawn,
    entry_hashes,
    keep_probabilities,
    kept_rows,
)
from clipkit.data.curation.rules import DATACOMP, Basic, Plan, examine
from clipkit.data.curation.thresholds import top_threshold
from clipkit.data.key_table import text_hash
from clipkit.types import ConfigError, DataError
from tests.data.makers import Members, encoded, png, write_tar


def datacomp_basic(text: str, width: int, height: int) -> bool:
    """DataComp's basic filter without its language rule, as the paper's code states it."""
    words, characters = len(text.split()) > 2, len(text) > 5
    return (
        words and characters and min(width, height) >= 200 and max(width, height) / min(width, height) <= 3.0
    )


def picture(width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height), (90, 90, 90)), "PNG", compress_level=1)


CAPTIONS = [
    "a b c", "a b cd", "one two", "one  two\tthree", " a b ", "a  b  c ", "\u3000x y z w", "ab cd",
    "hello world",
    "one two three", "\u72ac\u304c\u3044\u308b",
]  # fmt: skip
SIZES = [(200, 200), (199, 400), (200, 600), (200, 601), (600, 200), (601, 200), (640, 480), (1, 1)]


def resized(number: int) -> bool:
    """Of every size for every second caption."""
    return (number + number // len(SIZES)) % 2 == 1


def write_cases(path: Path) -> list[tuple[str, tuple[int, int]]]:
    """Writes a shard with a sample of every caption and size; returns both of each sample."""
    cases = [(text, size) for text in CAPTIONS for size in SIZES]
    samples: list[Members] = []
    for number, (text, (width, height)) in enumerate(cases):
        if resized(number):  # the original size stands in the JSON
            document = {"original_width": width, "original_height": height, "language": "en"}
            image = [(f"{number:04d}.json", json.dumps(document).encode()), (f"{number:04d}.png", png(1))]
        else:
            image = [(f"{number:04d}.png", picture(width, height))]
        samples.append([*image, (f"{number:04d}.txt", text.encode())])
    write_tar(path, samples)
    return cases


def test_the_basic_filter_keeps_what_datacomp_keeps(tmp_path: Path) -> None:
    cases = write_cases(tmp_path / "0.tar")
    rows = examine(str(tmp_path / "0.tar"), Plan("txt", Basic(**DATACOMP)))["samples"]
    kept = [bool(bits == 0) for bits in rows["failed"]]
    assert kept == [datacomp_basic(text, *size) for text, size in cases]
    assert 0 < sum(kept) < len(kept)
    assert not rows["reason"].any()


def test_the_command_has_the_same_rules_and_bounds_of_ones_own(tmp_path: Path) -> None:
    cases = write_cases(tmp_path / "0.tar")

    def kept(*options: str) -> list[int]:
        out = tmp_path / "kept.csv"
        arguments = ["data", "filter", str(tmp_path / "0.tar"), "--keys-out", str(out), "--overwrite"]
        assert main([*arguments, *options]) == 0
        with out.open(newline="") as stream:
            return [int(row["key"]) for row in csv.DictReader(stream)]

    basic = [number for number, (text, size) in enumerate(cases) if datacomp_basic(text, *size)]
    assert kept("--basic") == basic
    # Half of the samples name their language, the others none.
    assert kept("--basic", "--language", "en") == [number for number in basic if resized(number)]
    own = {
        ("--min-words", "3"): lambda text, size: len(text.split()) > 2,
        ("--min-chars", "6"): lambda text, size: len(text) > 5,
        ("--min-side", "201"): lambda text, size: min(size) > 200,
        ("--max-aspect", "1.9"): lambda text, size: max(size) / min(size) <= 1.9,
    }
    for options, rule in own.items():
        assert kept(*options) == [number for number, case in enumerate(cases) if rule(*case)], options
    wider = [number for number in basic if max(cases[number][1]) / min(cases[number][1]) <= 1.9]
    assert kept("--basic", "--max-aspect", "1.9") == wider != basic


def test_language_comes_from_a_field_or_needs_a_model(tmp_path: Path) -> None:
    documents: list[dict[str, Any]] = [{"language": "en"}, {"language": "de"}, {}]
    samples = [
        [(f"{n}.json", json.dumps(document).encode()), (f"{n}.png", png(n)), (f"{n}.txt", b"x")]
        for n, document in enumerate(documents)
    ]
    shard = write_tar(tmp_path / "0.tar", samples)
    rows = examine(str(shard), Plan("txt", Basic(language="en")))["samples"]
    assert rows["failed"].tolist() == [0, 1, 1]
    with pytest.raises(ConfigError, match="fasttext"):
        Basic(language="en", language_model=tmp_path / "lid.bin").check()
    with pytest.raises(ConfigError, match="needs a language"):
        Basic(language_model=tmp_path / "lid.bin").check()


def test_unusable_samples_are_named_with_their_reason(tmp_path: Path) -> None:
    samples = [
        [("0.png", b"no image"), ("0.txt", b"a caption that is long")],
        [("1.png", png(1)), ("1.txt", b"\xff\xfe")],
        [("2.txt", b"no image at all")],
        [("3.png", png(3)), ("3.txt", b"fine words here")],
    ]
    shard = write_tar(tmp_path / "0.tar", samples)
    rows = examine(str(shard), Plan("txt", Basic(min_words=2, min_side=4)))["samples"]
    assert rows["reason"].tolist() == [b"bad image", b"caption is not UTF-8", b"missing image", b""]


def datacomp_threshold(scores: list[float], fraction: float) -> float:
    return -np.sort(-np.array(scores))[int(len(scores) * fraction)]


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.3, 1 / 3, 0.5, 0.99])
def test_the_top_fraction_is_datacomps(fraction: float) -> None:
    draw = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 101, 5000):
        scores = draw.normal(0, 0.1, size).round(2)  # with ties, negative ones and zeros of both signs
        parts = [*np.array_split(scores, 3), np.zeros(0), np.array([math.nan, math.nan])]
        found = top_threshold(lambda parts=parts: iter(parts), fraction)  # type: ignore[misc]
        assert found == datacomp_threshold(scores.tolist(), fraction)
        exact = int(size * fraction) + 1
        assert (scores >= found).sum() >= exact
        assert (scores > found).sum() < exact


def test_the_whole_set_is_kept_where_the_published_code_fails() -> None:
    scores = np.array([0.3, 0.1, 0.2])
    with pytest.raises(IndexError):
        datacomp_threshold(scores.tolist(), 1.0)
    assert top_threshold(lambda: [scores], 1.0) == -math.inf
    with pytest.raises(DataError, match="no sample has a score"):
        top_threshold(lambda: [np.array([math.nan])], 0.5)


def published_matches(text: str, entries: list[str]) -> list[int]:
    """MetaCLIP's substring matching, slowly: blanks around the text and around , . ; : ? ! `."""
    text = f" {text} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for blank in "\t\n\r":
        text = text.replace(blank, " ")
    return [number for number, entry in enumerate(entries) if f" {entry} " in text]


def entries_of(folder: Path, names: list[str], rule: str) -> Entries:
    path = folder / "entries.txt"
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return Entries.open(path, rule)


RECORDED = {"the Dog": False, "(dog)": False, "hot-dog": False, "dogs": False, "A dog.": True, "dog": True}


def test_recorded_cases_of_the_published_matching(tmp_path: Path) -> None:
    published, words = (entries_of(tmp_path, ["dog"], rule) for rule in (PUBLISHED, WORDS))
    for text, matches in RECORDED.items():
        assert bool(len(published.find(text))) is matches, text
        assert bool(len(words.find(text))) is (text != "dogs"), text


def test_the_published_matching_equals_a_scan_over_all_entries(tmp_path: Path) -> None:
    names = [
        "dog",
        "hot dog",
        "dog dog",
        "U.S.",
        "New York",
        "new york",
        "york",
        "a",
        "!",
        ". .",
        "dog",
        " x",
        "a  b",
    ]
    entries = entries_of(tmp_path, names, PUBLISHED)
    draw = random.Random(3)
    pieces = [
        "dog",
        "hot",
        "new",
        "New",
        "york",
        "York",
        "a",
        "b",
        "x",
        " ",
        "  ",
        ".",
        "!",
        "-",
        "(",
        "\t",
        "U.S.",
        "`",
    ]
    for _ in range(3000):
        text = "".join(draw.choice(pieces) + draw.choice(["", " "]) for _ in range(draw.randint(0, 12)))
        assert entries.find(text).tolist() == published_matches(text, names), text


def test_words_match_whatever_the_case_punctuation_and_hyphens(tmp_path: Path) -> None:
    names = [
        "Hot-Dog",
        "hot dog",
        "S\u00e3o Paulo",
        "\u72ac",
        "stra\u00dfe",
        "\u0915\u0941\u0924\u094d\u0924\u093e",
        "\u0915",
    ]
    entries = entries_of(tmp_path, names, WORDS)
    for text, found in {
        "a HOT dog!": [0], "hot-dogs": [], "the hot \u2013 dog": [0], "hotdog": [],
        "in (S\u00c3O-PAULO)": [2],
        "sa\u0303o paulo": [2], "\u9ed2\u3044\u72ac\u304c": [3], "STRASSE": [4],
        "\u0915\u0941\u0924\u094d\u0924\u093e": [5], "": [],
    }.items():  # fmt: skip
        assert entries.find(text).tolist() == found, text


def test_empty_and_missing_entries_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no entries"):
        entries_of(tmp_path, ["", "  "], WORDS)
    with pytest.raises(ConfigError, match="No such file"):
        Entries.open(tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not UTF-8"):
        Entries.open(tmp_path / "latin.txt")


def published_probabilities(counts: list[int], t: float) -> list[float]:
    raised = np.array(counts, dtype=np.float64)
    raised[raised < t] = t
    return (t / raised).tolist()


def test_probabilities_and_keep_rates_are_the_published_ones() -> None:
    counts = [0, 1, 19_999, 20_000, 20_001, 200_000, 10**9]
    assert keep_probabilities(np.array(counts), 20_000).tolist() == published_probabilities(counts, 20_000)
    keys = np.array([text_hash(f"{n:09d}") for n in range(60_000)], dtype=np.uint64)
    hashes = entry_hashes(["dog", "cat", "rare"])
    p = np.array([0.1, 0.1, 1.0])

    def rate(entries: list[int]) -> float:
        counts, flat = (
            np.full(len(keys), len(entries), np.int32),
            np.tile(entries, len(keys)).astype(np.int32),
        )
        return float(kept_rows(0, keys, counts, flat, hashes, p).mean())

    error = 4 * math.sqrt(0.19 * 0.81 / len(keys))
    assert abs(rate([0]) - 0.1) < error
    assert abs(rate([0, 1]) - 0.19) < error
    assert rate([0, 2]) == 1.0
    assert rate([]) == 0.0


def test_draws_depend_on_seed_key_and_entry_alone() -> None:
    keys = np.array([text_hash(str(n)) for n in range(2000)], dtype=np.uint64)
    dog, cat = entry_hashes(["dog", "cat"])
    half = np.full(len(keys), 0.5)

    def draws(seed: int, entry: np.uint64, order: Any = slice(None)) -> Any:
        return drawn(seed, keys[order], np.full(len(keys), entry), half)

    order = np.random.default_rng(1).permutation(len(keys))
    assert (draws(0, dog)[order] == draws(0, dog, order)).all()
    for other in (draws(1, dog), draws(0, cat)):
        agree = (draws(0, dog) == other).mean()
        assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(len(keys))
    assert abs(draws(0, dog).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(keys))


def test_a_png_of_the_size_limit_is_read_from_its_header() -> None:
    from clipkit.data.sample import Unusable, image_size

    content = io.BytesIO()
    Image.new("1", (20_000, 10)).save(content, "PNG")
    assert image_size(content.getvalue()) == (20_000, 10)
    for broken in (b"", b"<html>", content.getvalue()[:10]):
        with pytest.raises(Unusable):
            image_size(broken)
