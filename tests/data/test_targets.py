"""Labels and stored vectors: what is read, what is refused, and that nothing is unpickled."""

from __future__ import annotations

import io
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkit.data.sample import Absent, Unusable, caption
from clipkit.data.targets import caption_label, field_label, stored_vector, stored_widths
from clipkit.types import DataError
from tests.data.makers import npy
from tests.data.test_sample import raw


def test_equal_captions_have_equal_labels() -> None:
    same = ["A red car", "a  RED\tcar ", "\uff21 red car", "a red\u00a0car"]
    assert len({caption_label(text) for text in same}) == 1
    others = ["a red cars", "a redcar", "red car a", "caf\u00e9", "cafe", "stra\u00dfe"]
    assert len({caption_label(text) for text in [*same, *others]}) == 1 + len(others)
    assert caption_label("caf\u00e9") == caption_label("cafe\u0301")
    assert caption_label("STRASSE") == caption_label("stra\u00dfe")
    assert all(0 <= caption_label(text) < 1 << 63 for text in others)
    # Written down: a resumed run must give its captions the same numbers.
    assert caption_label("a red car") == 1718427823368801642


def test_labels_of_fields() -> None:
    assert field_label(raw(cls=b"7"), "cls") == 7
    assert field_label(raw(cls=b" -12\n"), "cls") == -12
    document = b'{"category": 3, "deep": {"name": "tench"}, "list": [5, "7"], "flag": true, "whole": 4.0}'
    sample = raw(json=document)
    assert field_label(sample, "json.category") == 3
    assert field_label(sample, "json.list.1") == 7
    assert field_label(sample, "json.flag") == 1
    assert field_label(sample, "json.whole") == 4
    name = field_label(sample, "json.deep.name")
    assert name == field_label(raw(cls=b"tench"), "cls")
    assert 1 << 40 < name < 1 << 63
    assert (
        len({name, *(field_label(raw(cls=text), "cls") for text in (b"Tench", b"007", b"1e3", b"+7"))}) == 5
    )


@pytest.mark.parametrize(
    ("sample", "field", "reason"),
    [
        (raw(txt=b"x"), "cls", "missing label"),
        (raw(cls=b" "), "cls", "missing label"),
        (raw(json=b"{}"), "json.category", "missing label"),
        (raw(json=b'{"category": null}'), "json.category", "missing label"),
        (raw(json=b'{"category": []}'), "json.category.2", "missing label"),
        (raw(json=b'{"category": []}'), "json.category", "bad label"),
        (raw(json=b'{"category": 1.5}'), "json.category", "bad label"),
        (raw(json=b'{"category": NaN}'), "json.category", "bad label"),
        (raw(json=b'{"category": 9223372036854775808}'), "json.category", "bad label"),
        (raw(json=rb'{"category": "\ud83d"}'), "json.category", "bad label"),
        (raw(json=b"{"), "json.category", "bad label"),
        (raw(cls=b"\xff"), "cls", "bad label"),
        (raw(cls=b"1" * 100_000), "cls", "bad label"),
    ],
)
def test_labels_that_are_refused(sample: Any, field: str, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        field_label(sample, field)
    assert caught.value.reason == reason
    assert not isinstance(caught.value, Absent)


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8"])
def test_stored_vectors_become_fp32(kind: str) -> None:
    values = np.linspace(-1, 1, 7).astype(kind)
    found = stored_vector(raw(**{"teacher_image.npy": npy(values)}), "teacher_image.npy", 7)
    assert found.dtype == np.float32
    assert np.array_equal(found, values.astype(np.float32))
    found[0] = 1.0


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


def test_stored_vectors_that_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = io.BytesIO()
    np.save(evil, np.array([Canary(str(canary))], dtype=object), allow_pickle=True)
    canary.unlink(missing_ok=True)
    archive = io.BytesIO()
    np.savez(archive, a=np.ones(4, np.float32))
    good = npy(np.ones(4, np.float32))
    huge = good.replace(b"(4,)", b"(4000000000,)").replace(b" " * 9, b"", 1)
    bad = [
        b"", b"rubbish", evil.getvalue(), pickle.dumps(Canary(str(canary))), archive.getvalue(), good[:-1],
        good + b"0", good[:20], huge, npy(np.ones((1, 4), np.float32)), npy(np.ones((), np.float32)),
        npy(np.ones(0, np.float32)), npy(np.ones(4, np.int64)), npy(np.ones(4, np.complex64)),
        npy(np.array([1, np.nan], np.float32)), npy(np.array([1, np.inf])), npy(np.array([1e300])),
        npy(np.ones(5, np.float32)),
    ]  # fmt: skip
    for data in bad:
        with pytest.raises(Unusable) as caught:
            stored_vector(raw(npy=data), "npy", 4)
        assert caught.value.reason == "bad stored vector"
        assert len(caught.value.detail) < 300
    assert not canary.exists()
    with pytest.raises(Unusable, match="missing stored vector"):
        stored_vector(raw(txt=b"x"), "teacher.npy")


@pytest.mark.filterwarnings("ignore")
def test_damaged_headers_are_refused() -> None:
    """Noise in the header: refused or read, never another error."""
    good = npy(np.ones(4, np.float32))
    rng = np.random.default_rng(0)
    for _ in range(1500):
        noisy = bytearray(good)
        for at in rng.integers(0, 100, 4):
            noisy[at] = rng.integers(256)
        with suppress(Unusable):
            assert stored_vector(raw(npy=bytes(noisy)), "npy", 4).shape == (4,)


def test_widths_are_those_of_the_first_good_sample() -> None:
    samples = [
        raw(txt=b"x"),
        raw(**{"a.npy": b"bad", "b.npy": npy(np.ones(3, np.float32))}),
        raw(**{"a.npy": npy(np.ones(5, np.float16))}),
        raw(**{"a.npy": npy(np.ones(6, np.float16))}),
    ]
    assert stored_widths(samples, ("a.npy", "b.npy"), 10) == (5, 3)
    assert stored_widths(samples, (), 10) == ()
    with pytest.raises(DataError, match=r"usable \.a\.npy \(key: missing stored vector"):
        stored_widths(samples, ("a.npy",), 2)


# Which caption.


def test_one_caption_of_several() -> None:
    lines = raw(txt=b"first\r\n\n  second \nthird")
    assert caption(lines, "txt") == "first\r\n\n  second \nthird"
    assert [caption(lines, "txt", number) for number in range(3)] == ["first", "second", "third"]
    document = raw(json=b'{"captions": ["a", "b"], "single": "two\\nlines"}')
    assert caption(document, "json.captions") == caption(document, "json.captions", 0) == "a"
    assert caption(document, "json.captions", 1) == caption(document, "json.captions.1") == "b"
    assert caption(document, "json.single", 0) == "two\nlines"
    for sample, field, number in [
        (lines, "txt", 3), (document, "json.captions", 2), (document, "json.single", 1),
        (document, "json.captions.2", None), (document, "json.none", None), (raw(txt=b" "), "txt", None),
        (raw(json=b'{"captions": []}'), "json.captions", None), (raw(json=b'{"a": null}'), "json.a", None),
    ]:  # fmt: skip
        with pytest.raises(Absent):
            caption(sample, field, number)
    for sample in (raw(json=b'{"a": 7}'), raw(json=b'{"a": [7]}'), raw(json=b"{")):
        with pytest.raises(Unusable) as caught:
            caption(sample, "json.a")
        assert not isinstance(caught.value, Absent)
