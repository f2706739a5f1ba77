"""Hard captions: one exchange away from the caption, and never one that the true captions show to be true."""

from __future__ import annotations

import json
import random
import re
import tarfile
from pathlib import Path

import pytest

from clipkit.data.engine import Engine
from clipkit.data.hard_captions import HardCaptions, add_hard_captions, hard_captions, write_hard_captions
from clipkit.types import DataError
from tests.data.makers import Members, png, write_tar


def made(text: str, true: list[str] | None = None, rules: tuple[str, ...] = ("swap", "replace")) -> list[str]:
    return hard_captions(text, true or [text], random.Random(0), 20, rules)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red cup and a blue plate", ["a blue cup and a red plate"]),
        ("A dog on a sofa and a cat", ["A cat on a sofa and a dog"]),
        ("an orange cat on a grey box", ["a grey cat on an orange box"]),
        ("the cup is red and the plate is blue", ["the cup is blue and the plate is red"]),
        ("RED hat, blue shirt", ["BLUE hat, red shirt"]),
    ],
)
def test_two_words_of_a_class_change_places(text: str, expected: list[str]) -> None:
    assert made(text, rules=("swap",)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "red and blue stripes", "black and white photo", "a red ball and a blue ball", "a dog beside a cat",
        "a dog and a cat on a sofa", "a man next to a woman", "a man in red and a man in blue",
        "a dog on the left and a dog on the right", "red, white and blue flag", "a dog", "",
    ],
)  # fmt: skip
def test_an_exchange_that_changes_nothing_is_not_made(text: str) -> None:
    assert made(text, rules=("swap",)) == []


def test_a_replaced_word_is_in_no_true_caption() -> None:
    text = "two dogs on a red sofa"
    true = [text, "Three brown animals", "a cat, a white lamp and a Green chair"]
    taken = {"three", "brown", "cat", "white", "lamp", "green", "chair", "dog", "dogs", "red", "two", "sofa"}
    found = made(text, true, ("replace",))
    assert found
    for caption in found:
        (new,) = set(caption.split()) - set(text.split())
        assert not {new, new.removesuffix("s")} & taken
        assert sum(a != b for a, b in zip(caption.split(), text.split(), strict=True)) == 1


def test_other_true_captions_are_never_given_back() -> None:
    text = "a red cup and a blue plate"
    assert made(text, [text, "A blue cup, and a red plate!"], ("swap",)) == []
    assert made(text, [text, "the red plate and the blue cup"], ("swap",)) == []


def test_exchanges_have_the_case_the_number_and_the_article() -> None:
    found = made("An orange cat and two Dogs", rules=("replace",))
    # The colour, the animal, the number and the other animal: each of them in some caption.
    for place in (1, 2, 4, 5):
        assert len({caption.split()[place] for caption in found}) > 1
    for caption in found:
        assert re.match(r"(An [aeiou]|A [^aeiou])", caption), caption
        assert re.search(r"[A-Z][a-z]+s$", caption), caption
    assert {caption.split()[0] for caption in found} == {"A", "An"}


def test_names_of_other_things_are_left_alone() -> None:
    assert made("Redmond, a hot-dog and a T-shirt in the left-hand corner of Whitechapel") == []


def sample(number: int, caption: str, document: dict[str, object] | None = None) -> Members:
    members = [(f"{number:04d}.png", png(number)), (f"{number:04d}.txt", caption.encode())]
    if document is not None:
        members.append((f"{number:04d}.json", json.dumps(document).encode()))
    return members


def read(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]


def test_shards_keep_every_other_member_and_the_draws_their_samples(tmp_path: Path) -> None:
    texts = ["a red cup and a blue plate", "nothing here", "two dogs", "a man in a green hat"]
    others = {"captions": ["three dogs", "two puppies"], "source": "x"}
    samples = [sample(n, text, others if n == 2 else None) for n, text in enumerate(texts)]
    source = write_tar(tmp_path / "in.tar", samples)
    options = HardCaptions(num=2, seed=4)
    written = add_hard_captions(tmp_path / "out.tar", str(source), options)
    before, after = read(source), read(tmp_path / "out.tar")
    assert {name: after[name] for name in before if not name.endswith("json")} == {
        name: data for name, data in before.items() if not name.endswith("json")
    }
    assert "0001.json" not in after
    assert written.made == {2: 3, 0: 1}
    document = json.loads(after["0002.json"])
    assert {name: document[name] for name in others} == others
    assert document["hard"]
    assert not {"three dogs", "two dogs"} & set(document["hard"])
    # The other way round, in another shard: the same captions for the same keys.
    write_tar(tmp_path / "turned.tar", [samples[n] for n in (3, 2, 1, 0)])
    add_hard_captions(tmp_path / "again.tar", str(tmp_path / "turned.tar"), options)
    assert read(tmp_path / "again.tar") == after


def test_true_captions_of_the_json_are_never_given_back(tmp_path: Path) -> None:
    """Every sample draws another number for `two`; those that true captions name are never drawn."""
    named = [f"{number} dogs" for number in ("one", "three", "four", "five")]
    drawn = []
    for at, document in enumerate(({}, {"captions": named}, {"caption": named[1]})):
        source = write_tar(tmp_path / f"{at}.tar", [sample(n, "two dogs", {**document}) for n in range(40)])
        out = tmp_path / f"out{at}.tar"
        add_hard_captions(out, str(source), HardCaptions())
        documents = [json.loads(data) for name, data in read(out).items() if name.endswith("json")]
        assert len(documents) == 40
        drawn.append({caption for document in documents for caption in document["hard"]})
    assert {*named[1:]} <= drawn[0]
    assert drawn[1]
    assert not {*named} & drawn[1]
    assert named[1] not in drawn[2]


def test_an_entry_that_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "in.tar", [sample(0, "two dogs", {"hard": ["mine"]})])
    with pytest.raises(DataError, match="has an entry 'hard' already"):
        add_hard_captions(tmp_path / "out.tar", str(source), HardCaptions())
    assert not (tmp_path / "out.tar").exists()
    add_hard_captions(tmp_path / "out.tar", str(source), HardCaptions(replace=True))
    assert json.loads(read(tmp_path / "out.tar")["0000.json"])["hard"] != ["mine"]


def test_what_cannot_be_read_is_copied_and_counted(tmp_path: Path) -> None:
    samples = [
        [("0.png", png(0)), ("0.txt", b"two dogs"), ("0.json", b"{broken")],
        [("1.png", png(1)), ("1.txt", b"\xff\xfe")],
        [("2.png", png(2)), ("2.txt", b"two dogs"), ("2.json", b"[]")],
    ]
    source = write_tar(tmp_path / "in.tar", samples)
    written = add_hard_captions(tmp_path / "out.tar", str(source), HardCaptions())
    assert written.reasons == {"bad JSON": 1, "caption is not UTF-8": 1, "JSON is no object": 1}
    assert read(tmp_path / "out.tar") == read(source)


def test_a_field_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_tar(source / "0.tar", [sample(0, "a red cat"), sample(1, "a blue dog")])
    options = HardCaptions(caption="json.nope")
    with pytest.raises(DataError, match=r"no caption could be read from json\.nope"):
        write_hard_captions([str(source)], tmp_path / "out", options, Engine(), range)
    assert not (tmp_path / "out").exists()


def test_the_objective_reads_the_field_that_is_written() -> None:
    from clipkit.objectives.paired import hard_views

    (view,) = hard_views("json.hard", 1)
    assert view.field == f"json.{HardCaptions().field}"
    assert view.optional
