"""Class names and templates: the kinds of files, open_clip's lists, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clipkit.evaluation.prompts import (
    build_prompts,
    check_order,
    imagenet_classnames,
    load_classnames,
    openai_templates,
    read_classnames,
    simple_templates,
    wordnet_names,
)
from clipkit.types import ConfigError, DataError

NAMES = ("ant", "b{c}e")


def build(given: Any = None, own: Any = None, wordnet: bool = False) -> tuple[tuple[str, ...], ...]:
    """Returns the prompts of two classes."""
    return build_prompts(NAMES, given, own, wordnet).texts


def test_open_clips_lists_are_used_as_they_are() -> None:
    import open_clip

    assert imagenet_classnames() == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert len(imagenet_classnames()) == 1000
    for ours, theirs in (
        (openai_templates(), open_clip.OPENAI_IMAGENET_TEMPLATES),
        (simple_templates(), open_clip.SIMPLE_IMAGENET_TEMPLATES),
    ):
        assert [build_prompts(["ant"], list(ours), None, False).texts[0]] == [tuple(f("ant") for f in theirs)]
    assert (len(openai_templates()), len(simple_templates())) == (80, 7)
    names = wordnet_names()
    # Known pairs from ImageNet's published synset list.
    assert (names["n01440764"], names["n02123045"], names["n07753592"]) == ("tench", "tabby cat", "banana")


def test_defaults_are_the_data_then_wordnet_then_one_template() -> None:
    assert build() == (("a photo of a ant.",), ("a photo of a b{c}e.",))
    assert build(own=("the {}",)) == (("the ant",), ("the b{c}e",))
    assert len(build(wordnet=True)[0]) == 80
    assert build(own=("the {}",), wordnet=True)[0] == ("the ant",)
    assert build("simple", own=("the {}",))[0][0] == "itap of a ant."


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", "a {}\nthe {c}, {c}\n\n"),
        ("t.txt", "\ufeffa {}\r\nthe {c}, {c}"),
        ("t.json", '["a {}", "the {c}, {c}"]'),
    ],
)
def test_template_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert build(tmp_path / name) == (("a ant", "the ant, ant"), ("a b{c}e", "the b{c}e, b{c}e"))
    assert build(str(tmp_path / name)) == build(tmp_path / name)


def test_whole_prompts_per_class(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"ant": ["a six-legged ant", "ant"], "b{c}e": ["bee"], "other": ["x"]}')
    prompts = build_prompts(NAMES, tmp_path / "p.json", None, False)
    assert prompts.texts == (("a six-legged ant", "ant"), ("bee",))
    assert prompts.per_class == "1 to 2 templates"
    with pytest.raises(ConfigError, match="'cat'"):
        build_prompts(("ant", "cat"), tmp_path / "p.json", None, False)


@pytest.mark.parametrize(
    "templates",
    [["a photo"], ["a {} {d}"], ["a {0}"], ["{ {} }"], [], [""], [3], "no such file", {"ant": "a"}],
)
def test_bad_templates_are_usage_errors(templates: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        build(templates)
    assert "\n" not in caught.value.cause + caught.value.cure


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("n.json", "[1, 2]"),
        ("n.json", '"ant"'),
        ("n.json", "{"),
        ("n.txt", ""),
        ("n.json", "[]"),
        ("n.json", "{}"),
    ],
)
def test_bad_class_name_files_are_usage_errors(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        read_classnames(tmp_path / name)


def test_class_name_files(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text('["ant", " bee "]')
    (tmp_path / "n.txt").write_text("ant\nbee\n\n")
    for name in ("n.json", "n.txt"):
        assert load_classnames(tmp_path / name, None) == (("ant", "bee"), str(tmp_path / name))
    (tmp_path / "o.json").write_text('{"x": "ant", "y": "bee"}')
    assert read_classnames(tmp_path / "o.json", ["y", "x"]) == ("bee", "ant")
    assert load_classnames("imagenet", None) == (imagenet_classnames(), "imagenet")


def test_permutations_are_refused_and_rewordings_are_not() -> None:
    known = ("crane bird", "sunglasses", "sunglasses", "ant_eater", "bee")
    check_order(known, known, "f")
    check_order(("crane", "shades", "sunglasses", "Ant Eater", "bee"), known, "f")
    check_order(("bee", "x", "y", "z", "w"), known, "f")  # its own place holds another word: a rewording
    with pytest.raises(DataError, match="entry 4"):
        check_order(("crane bird", "sunglasses", "sunglasses", "bee", "ant eater"), known, "f")
