"""Caption fields: what is drawn how often, what becomes of samples without it, and that nothing moves it."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.data.captions import CaptionRules, CaptionSource, SlotCaptions
from clipkit.data.loader import CaptionField, LoaderOptions, Source, TrainStream, open_train
from clipkit.data.order import hash_key
from clipkit.data.sample import Absent, RawSample, Unusable
from clipkit.data.targets import caption_label
from clipkit.data.text import TextView
from clipkit.dist import World
from clipkit.types import Batch, DataError
from tests.data.makers import ByteTokenizer, Members, png, raw, same, take, write_tar

DRAWN = CaptionSource()
DRAWS = 4000


def document(**values: Any) -> bytes:
    return json.dumps(values).encode()


def captions(rules: CaptionRules, sample: RawSample, count: int = DRAWS, seed: int = 0) -> list[str]:
    """The captions of the sample in `count` slots."""
    return [SlotCaptions(rules, sample, hash_key(seed, slot)).caption(DRAWN) for slot in range(count)]


def close(found: Counter[str], expected: dict[str, float], count: int = DRAWS) -> bool:
    """Whether every share lies within 4.5 standard deviations of what is expected."""
    assert found.keys() <= expected.keys()
    return all(
        abs(found[name] - count * share) <= 4.5 * math.sqrt(count * share * (1 - share))
        for name, share in expected.items()
    )


def oracle(present: dict[str, tuple[float, list[str]]], count: int) -> dict[str, float]:
    """Shares by rejection: draw a field among all, again until it is present, then an entry of it."""
    generator, found = random.Random(1), Counter[str]()
    names = list(present)
    while found.total() < count:
        name = generator.choices(names, [present[name][0] for name in names])[0]
        if present[name][1]:
            found[generator.choice(present[name][1])] += 1
    return {text: number / count for text, number in found.items()}


FIELDS = (CaptionField("txt"), CaptionField("json.re", 3.0), CaptionField("json.all", 0.5))


@pytest.mark.parametrize("lacking", [(), ("txt",), ("json.re",), ("txt", "json.all"), ("json.re", "txt")])
def test_fields_are_drawn_by_weight_among_those_present(lacking: tuple[str, ...]) -> None:
    held = {"txt": ["t"], "json.re": ["r"], "json.all": ["a", "b", "c"]}
    held |= {name: list[str]() for name in lacking}
    values: dict[str, Any] = {"re": held["json.re"][0]} if held["json.re"] else {}
    members = {"txt": held["txt"][0].encode()} if held["txt"] else {}
    sample = raw(json=document(all=held["json.all"], **values), **members)
    found = Counter(captions(CaptionRules(FIELDS), sample))
    weights = {"txt": 1.0, "json.re": 3.0, "json.all": 0.5}
    expected = oracle({name: (weights[name], texts) for name, texts in held.items()}, 200_000)
    assert close(found, expected)


def test_entries_of_lists_and_lines_are_drawn_evenly() -> None:
    listed = raw(json=document(c=["a", " ", None, "b ", "", "c"]))
    lines = raw(txt=b"\xef\xbb\xbfa\r\n\n b\n \nc")
    for sample, field in ((listed, CaptionField("json.c")), (lines, CaptionField("txt", lines=True))):
        assert close(Counter(captions(CaptionRules((field,)), sample)), dict.fromkeys("abc", 1 / 3))
    # A text is one caption unless lines are asked for.
    assert set(captions(CaptionRules(), lines, 20)) == {"a\r\n\n b\n \nc"}
    assert set(captions(CaptionRules((CaptionField("json.c.3"),)), listed, 20)) == {"b"}


def test_draws_of_slots_epochs_and_fields_are_independent() -> None:
    """Entries do not follow fields, nor one slot the one before it: counts of couples are products."""
    rules = CaptionRules((CaptionField("json.a"), CaptionField("json.b")))
    sample = raw(json=document(a=["a0", "a1"], b=["b0", "b1"]))
    texts = captions(rules, sample)
    assert close(Counter(texts), dict.fromkeys(("a0", "a1", "b0", "b1"), 0.25))
    couples = Counter(one[0] + other[0] for one, other in zip(texts[::2], texts[1::2], strict=True))
    assert close(couples, dict.fromkeys(("aa", "ab", "ba", "bb"), 0.25), DRAWS // 2)
    other = captions(rules, sample, seed=1)
    agree = Counter(str(one == two) for one, two in zip(texts, other, strict=True))
    assert close(agree, {"True": 0.25, "False": 0.75})


def test_what_is_missing_falls_back_or_is_refused() -> None:
    fields = (CaptionField("txt"), CaptionField("json.re", 3.0))
    half = raw(txt=b"t", json=b"{}")
    assert set(captions(CaptionRules(fields), half, 200)) == {"t"}
    strict, refused = CaptionRules(fields, "reject"), 0
    for slot in range(DRAWS):
        try:
            SlotCaptions(strict, half, hash_key(0, slot)).caption(DRAWN)
        except Absent:
            refused += 1
    assert close(Counter({"no": refused}), {"no": 0.75})
    with pytest.raises(Absent, match=r"none of txt, json\.re: "):
        captions(CaptionRules(fields), raw(txt=b" "), 1)
    # Damage is no absence: a sample with a field that cannot be read is unusable.
    for broken in (raw(txt=b"t", json=b"{"), raw(txt=b"t", json=document(re=7))):
        reasons = set()
        for slot in range(50):
            try:
                SlotCaptions(CaptionRules(fields), broken, hash_key(0, slot)).caption(DRAWN)
            except Unusable as problem:
                reasons.add((type(problem), problem.reason))
        assert reasons in ({(Unusable, "bad caption JSON")}, {(Unusable, "caption is not text")})


def test_a_later_caption_is_another_entry_than_the_drawn_one() -> None:
    rules, sample = CaptionRules((CaptionField("json.c"),)), raw(json=document(c=["a", "b", "c"]))
    for slot in range(60):
        read = SlotCaptions(rules, sample, hash_key(0, slot))
        assert {read.caption(CaptionSource(None, entry)) for entry in (None, 1, 2)} == {"a", "b", "c"}
        with pytest.raises(Absent):
            read.caption(CaptionSource(None, 3))


# In streams.

COUNTS = [13, 29, 18]


def members(number: int) -> Members:
    """A sample with a text and, but for every fifth one, a list of two further captions."""
    values = {"id": number} if number % 5 == 0 else {"id": number, "more": [f"x{number}", f"y{number}"]}
    name = f"{number:06d}"
    return [
        (f"{name}.png", png(number)),
        (f"{name}.txt", b"t%d" % number),
        (f"{name}.json", document(**values)),
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in three shards."""
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for at, count in enumerate(COUNTS):
        write_tar(folder / f"{at}.tar", map(members, range(first, first + count)))
        first += count
    return folder


TWO = (CaptionField("txt"), CaptionField("json.more", 2.0))


def views(*names: str) -> list[TextView]:
    tokenizer = ByteTokenizer()
    recipes = {"dropout:0": "dropout", "dropout:1": "dropout", "eda:0": "eda"}
    return [
        TextView(name=name, tokenizer=tokenizer, context_length=24, recipe=recipes.get(name, ""))
        for name in names
    ]


def opened(
    shards: Path,
    world: World | None = None,
    texts: Sequence[TextView] | None = None,
    missing: Any = "fallback",
    labels: Sequence[str] = ("caption",),
    fields: tuple[CaptionField, ...] = TWO,
    saved: Any = None,
    **options: Any,
) -> TrainStream:
    settings = LoaderOptions(Source(str(shards), fields, missing=missing), 12, 5, **options)
    return open_train(settings, [], texts or views("text"), world or World(), labels=labels, saved=saved)


def words(batch: Batch, view: str = "text") -> list[str]:
    return [bytes(token for token in row.tolist() if 0 < token < 256).decode() for row in batch.texts[view]]


def test_every_split_draws_the_same_captions(shards: Path) -> None:
    reference = take(opened(shards), 0, 12)
    drawn = Counter(text[0] for batch in reference for text in words(batch))
    assert set(drawn) == {"t", "x", "y"}
    for workers, size in ((2, 1), (0, 2), (2, 2)):
        parts = [take(opened(shards, World(rank, size), workers=workers), 0, 12) for rank in range(size)]
        for batch, split in zip(reference, zip(*parts, strict=True), strict=True):
            assert [text for part in split for text in words(part)] == words(batch)
            assert dict(sum((Counter(part.counts) for part in split), Counter())) == batch.counts
    # From any step, in epochs of their own, after a resume with other workers.
    state = opened(shards).state(7)
    later = take(opened(shards, saved=state, workers=2), 7, 12)
    assert [words(batch) for batch in later] == [words(batch) for batch in reference[7:]]
    first, second = (
        {
            number: text[0]
            for batch in part
            for number, text in zip(batch.ids.tolist(), words(batch), strict=True)
        }
        for part in (reference[:5], reference[5:10])
    )
    assert first.keys() == second.keys()
    assert first != second


def test_counts_say_where_captions_came_from(shards: Path) -> None:
    """Against the captions themselves; and what fell back is what a strict source refuses."""
    counts, texts, fallen = Counter[str](), Counter[str](), 0
    for batch in take(opened(shards), 0, 20):
        counts.update(batch.counts)
        texts.update(text[0] for text in words(batch))
    strict = [reject for batch in take(opened(shards, missing="reject"), 0, 20) for reject in batch.rejects]
    fallen = len(strict)
    assert counts["captions/txt"] == texts["t"]
    assert counts["captions/json.more"] == texts["x"] + texts["y"]
    assert counts["captions/txt"] + counts["captions/json.more"] == 240
    assert counts["captions_fallback/txt"] == fallen > 0
    assert counts["captions_fallback/json.more"] == 0
    assert {int(reject.key) % 5 for reject in strict} == {0}
    assert {reject.reason for reject in strict} == {"missing caption"}
    assert set(counts) <= set(opened(shards).counted)
    # One field, no choice: nothing is counted.
    alone = opened(shards, fields=TWO[:1])
    assert alone.counted == ()
    assert [batch.counts for batch in take(alone, 0, 2)] == [{}, {}]


def test_views_and_labels_mean_the_drawn_caption(shards: Path) -> None:
    wanted = [
        *views("text", "dropout:0", "dropout:1", "eda:0", "text@other"),
        replace(views("o")[0], field="txt", index=0),
    ]
    tokenizer = ByteTokenizer(16)
    wanted[4] = replace(wanted[4], tokenizer=tokenizer, context_length=16)
    labels = ("caption", "caption:txt")
    for batch, alone in zip(
        take(opened(shards, texts=wanted, labels=labels), 0, 10), take(opened(shards), 0, 10), strict=True
    ):
        drawn = words(batch)
        assert drawn == words(alone)
        for name in ("dropout:0", "dropout:1", "text@other"):
            assert words(batch, name) == drawn
        own = [f"t{number}" for number in batch.ids.tolist()]
        assert words(batch, "o") == own
        assert batch.labels["caption"].tolist() == [caption_label(text) for text in drawn]
        assert batch.labels["caption:txt"].tolist() == [caption_label(text) for text in own]


@pytest.mark.parametrize("mode", ["eager", "lazy", "stream"])
def test_every_way_of_reading_draws(tmp_path: Path, shards: Path, mode: str) -> None:
    """Without an index and from packed shards too; a substitute draws for the slot it takes."""
    source = shards
    if mode == "stream":
        source = tmp_path / "a.tar.gz"
        write_tar(source, map(members, range(60)), "w:gz")
    options = {"index": "lazy"} if mode == "lazy" else {}
    batches = take(opened(source, missing="reject", **options), 0, 9)
    for batch in batches:
        for reject in batch.rejects:
            assert int(reject.key) % 5 == 0
        assert sum(batch.counts.values()) == 12
        assert all(text[1:] == str(int(key)) for text, key in zip(words(batch), batch.keys, strict=True))
    assert {text[0] for batch in batches for text in words(batch)} == {"t", "x", "y"}


def test_an_optional_caption_may_be_absent_in_all_fields(tmp_path: Path) -> None:
    samples = [[(f"{n}.png", png(n)), (f"{n}.json", document(a="a") if n % 2 else b"{}")] for n in range(12)]
    path = write_tar(tmp_path / "a.tar", samples)
    fields = (CaptionField("json.a"), CaptionField("json.b"))
    some = [replace(views("text")[0], optional=True)]
    (batch,) = take(opened(path, texts=some, fields=fields, labels=()), 0, 1)
    assert batch.present["text"].tolist() == [number % 2 == 1 for number in batch.ids.tolist()]
    assert sum(count for name, count in batch.counts.items() if name.startswith("captions/")) == 6
    only = write_tar(tmp_path / "b.tar", samples[::2])
    nothing = open_train(LoaderOptions(Source(str(only), fields), 6, 0), [], views("text"), World())
    with pytest.raises(DataError, match="none of json"):
        take(nothing, 0, 1)


def test_a_single_field_draws_nothing(shards: Path) -> None:
    """The whole text of every sample, whatever the seed: the stream of one field is what it always was."""
    for batch in take(opened(shards, fields=TWO[:1]), 0, 5):
        assert words(batch) == [f"t{number}" for number in batch.ids.tolist()]
    one, two = (take(opened(shards, fields=fields), 0, 1)[0] for fields in (TWO[:1], TWO))
    assert torch.equal(one.ids, two.ids)
    assert same(
        take(opened(shards, fields=TWO[:1]), 0, 2), take(opened(shards, fields=TWO[:1], workers=2), 0, 2)
    )
