"""The first look: what is there is said as it is, what is nowhere is refused with the nearest cure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from clipkit.data.options import CaptionField, Source
from clipkit.data.preflight import Wanted, check, describe, look
from clipkit.data.source import expand_shards
from clipkit.types import IMAGE, TEXT, ConfigError, DataError, Needs, View
from tests.data.makers import Members, good, png, write_shards, write_tar

PAIRS = Needs(views=(IMAGE, TEXT))


def wanted(*fields: str, needs: Needs = PAIRS) -> Wanted:
    return Wanted.of(needs, Source("", tuple(map(CaptionField, fields or ("txt",)))))


def sample(number: int) -> Members:
    """Every fourth sample without a text; in the document what image sets come with."""
    name = f"{number:03d}"
    document = {
        "url": "https://example.org/a.jpg",
        "caption": f"a {number}",
        "alt": None if number % 2 else "b",
        "size": {"width": 4},
        "sha256": "ab12",
        "all": ["x", "y"],
    }
    return [
        (f"{name}.jpg", png(number)),
        *([(f"{name}.txt", b"caption")] if number % 4 else []),
        (f"{name}.cls", b"7"),
        (f"{name}.json", json.dumps(document).encode()),
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Sixteen samples in four shards."""
    folder = tmp_path_factory.mktemp("set")
    for at in range(4):
        write_tar(folder / f"{at}.tar", map(sample, range(4 * at, 4 * at + 4)))
    return expand_shards(str(folder))


def test_shares_are_those_of_the_samples(shards: list[str]) -> None:
    found = look(shards, wanted("txt", "json.caption"))
    assert (found.samples, found.shards, found.complete) == (16, 4, 16)
    assert found.shares() == (
        "cls 100 %, jpg 100 %, json.all 100 %, json.caption 100 %, json.sha256 100 %, json.size.width 100 %, "
        "json.url 100 %, txt 75 %, json.alt 50 %"
    )
    assert found.texts == {"txt", "json.caption", "json.alt", "json.all"}
    (line,) = describe(found, wanted("txt", "json.caption"))
    assert line.endswith(
        "used: images, captions from txt (weight 1), json.caption (weight 1) (missing: fallback)"
    )
    assert "4 of them lack something" in describe(look(shards, wanted()), wanted())[0]
    # Places that the list above does not show can be read all the same.
    for field in ("json.all.1", "json.size.width"):
        check(look(shards, wanted(field)), wanted(field))


@pytest.mark.parametrize(
    ("fields", "near"),
    [
        (("json.captoin",), "did you mean json.caption?"),
        (("caption",), "did you mean json.caption?"),
        (("text",), "did you mean txt?"),
        (("txt", "json.recaption"), "did you mean json.caption?"),
        (("json.all.2",), "fields that hold text: json.all, json.alt, json.caption, txt"),
        (("json.alt.x",), "fields that hold text"),
        (("nothing",), "fields that hold text"),
    ],
)
def test_a_field_that_is_nowhere_is_refused(shards: list[str], fields: tuple[str, ...], near: str) -> None:
    need = wanted(*fields)
    with pytest.raises(
        ConfigError, match=f"reads {fields[-1]}, which none of 16 samples of 4 shards"
    ) as caught:
        check(look(shards, need), need, "data.train.1")
    assert near in caught.value.cure
    assert "data.train.1.captions" in str(caught.value)


def test_views_labels_and_vectors_are_looked_for_too(shards: list[str]) -> None:
    own = View("second", "text", field="json.caption")
    missing = View("third", "text", field="json.missing")
    check(look(shards, wanted("bad", needs=Needs((IMAGE, own)))), wanted("bad", needs=Needs((IMAGE, own))))
    for needs, named in (
        (Needs((IMAGE, missing)), "the view third of an objective reads json.missing"),
        (Needs((IMAGE, replace(missing, optional=True))), "json.missing"),
        (Needs((IMAGE,), labels=("json.class",)), "the label of an objective reads json.class"),
        (Needs((IMAGE,), labels=("caption:json.no",)), "reads json.no"),
        (Needs((IMAGE,), stored=("teacher.npy",)), "a stored vector of an objective reads teacher.npy"),
    ):
        need = wanted(needs=needs)
        with pytest.raises(ConfigError, match=named):
            check(look(shards, need), need)
    # Images alone ask for no caption, labels of captions do.
    assert Wanted.of(Needs((IMAGE,)), Source("")).captions == ()
    assert Wanted.of(Needs((IMAGE,), labels=("caption",)), Source("")).captions == (CaptionField(),)


def test_a_rare_field_is_found_by_a_second_look(tmp_path: Path) -> None:
    rare = [
        [(f"{n:04d}.png", png(0)), (f"{n:04d}.json", b'{"a": "x", "b": "y"}' if n == 700 else b'{"a": "x"}')]
        for n in range(800)
    ]
    path = str(write_tar(tmp_path / "a.tar", rare))
    found = look([path], wanted("json.a", "json.b"))
    check(found, wanted("json.a", "json.b"))
    assert found.samples == 800
    assert "json.b 0.1 %" in found.shares()


def test_images_and_captions_under_different_names_are_no_pairs(tmp_path: Path) -> None:
    halves: list[Members] = [[("input.jpg", png(0))], [("outputs.txt", b"caption")]]
    path = str(write_tar(tmp_path / "a.tar", halves))
    with pytest.raises(DataError, match="'input' has jpg; 'outputs' has txt") as caught:
        check(look([path], wanted()), wanted())
    assert "first dot" in caught.value.cure
    labels = str(
        write_tar(tmp_path / "b.tar", [[(f"{n}.png", png(n)), (f"{n}.cls", b"1")] for n in range(3)])
    )
    with pytest.raises(
        ConfigError, match="none of 3 samples of 1 shard holds; they hold cls 100 %, png 100 %"
    ):
        check(look([labels], wanted()), wanted())
    texts = str(write_tar(tmp_path / "c.tar", [[(f"{n}.txt", b"x")] for n in range(3)]))
    with pytest.raises(ConfigError, match="reads image, which none"):
        check(look([texts], wanted()), wanted())


def test_damage_is_left_to_those_who_find_all_of_it(tmp_path: Path) -> None:
    """Unreadable shards and samples are passed over; names of strangers stay on their line."""
    folder = write_shards(tmp_path / "set", [5, 5, 5])
    (folder / "00001.tar").write_bytes(b"")
    with open(folder / "00002.tar", "r+b") as file:
        file.truncate(700)
    (folder / "00003.tar").write_bytes(b"<html>" * 400)
    shards = [*expand_shards(str(folder)), str(tmp_path / "no.tar")]
    found = look(shards, wanted())
    check(found, wanted())
    assert (found.samples, found.shards, found.unread) == (5, 1, 4)
    assert "4 shards could not be read" in describe(found, wanted())[0]
    nothing = look(shards[1:], wanted())
    check(nothing, wanted())
    assert describe(nothing, wanted()) == []
    broken = [[("a.png", png(0)), ("a.txt", b"\xff\xfe"), ("a.json", b"[" * 100_000)]]
    path = str(write_tar(tmp_path / "d.tar", broken))
    check(look([path], wanted()), wanted())
    check(look([path], wanted("json.a")), wanted("json.a"))
    strange = json.dumps({"x" * 1000: "y", "a\x1b[2J": "b", "c.d": "e"}).encode()
    path = str(write_tar(tmp_path / "e.tar", [[("a.png", png(0)), ("a.json", strange)]]))
    with pytest.raises(ConfigError) as caught:
        check(look([path], wanted()), wanted())
    assert "\x1b" not in str(caught.value)
    assert "xxx" not in str(caught.value)


def test_packed_shards_are_looked_at_as_well(tmp_path: Path) -> None:
    path = str(write_tar(tmp_path / "a.tar.gz", map(good, range(90)), "w:gz"))
    found = look([path], wanted())
    assert (found.samples, found.shares()) == (64, "png 100 %, txt 100 %")
