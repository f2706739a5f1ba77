"""Duplicates: planted ones are found, all of them and no others; perceptual hashes are the published ones."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkit.data.buckets import Buckets
from clipkit.data.curation import groups, similar
from clipkit.data.curation.deduplication import Deduplication, run_dedup
from clipkit.data.curation.duplicates import Likeness
from clipkit.data.curation.evaluation import Evaluation
from clipkit.data.curation.groups import Components, repeated, similar_pairs, similar_to
from clipkit.data.curation.hashes import EXACT, exact_digest, perceptual_hash
from clipkit.data.curation.selection import Target
from clipkit.data.curation.similar import join_similar, similar_rows
from clipkit.data.curation.survey import rows_of
from clipkit.data.engine import Engine
from clipkit.data.sample import Unusable, decode_image
from tests.data.makers import encoded, png, raw, write_tar


def bits_between(left: int | None, right: int | None) -> int:
    assert left is not None
    assert right is not None
    return (left ^ right).bit_count()


def near_hashes(count: int, distance: int, seed: int) -> np.ndarray:
    """Random hashes, half of them copies of another with up to distance + 3 bits changed."""
    draw = np.random.default_rng(seed)
    hashes = draw.integers(0, 2**64, count, dtype=np.uint64)
    for _ in range(count // 2):
        copied = int(hashes[draw.integers(count)])
        for bit in draw.choice(64, draw.integers(0, distance + 4), replace=False).tolist():
            copied ^= 1 << bit
        hashes[draw.integers(count)] = copied
    return hashes


@pytest.mark.parametrize("at_once", [1 << 22, 3])
@pytest.mark.parametrize(("count", "distance"), [(0, 4), (1, 4), (2, 0), (600, 0), (600, 4), (400, 9)])
def test_pairs_are_those_of_a_comparison_of_all(
    count: int, distance: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "_PAIRS_AT_ONCE", at_once)
    hashes = near_hashes(count, distance, 1)
    expected = {
        (a, b)
        for a, b in itertools.combinations(range(count), 2)
        if (int(hashes[a]) ^ int(hashes[b])).bit_count() <= distance
    }
    found: set[tuple[int, int]] = set()
    for left, right in similar_pairs(hashes, distance):
        found |= {(min(pair), max(pair)) for pair in zip(left.tolist(), right.tolist(), strict=True)}
    assert found == expected
    assert count < 600 or len(found) > 20
    mine, theirs = similar_to(hashes, hashes[: count // 3], distance)
    pairs = [
        (a, b)
        for a in range(count)
        for b in range(count // 3)
        if (int(hashes[a]) ^ int(hashes[b])).bit_count() <= distance
    ]
    assert list(zip(mine.tolist(), theirs.tolist(), strict=True)) == pairs


def slow_components(size: int, pairs: list[tuple[int, int]]) -> list[int]:
    labels = list(range(size))
    for a, b in pairs:
        low, high = sorted((labels[a], labels[b]))
        labels = [low if label == high else label for label in labels]
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_components_are_those_of_a_slow_union(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = 80
    pairs = draw.integers(0, size, (40 + 10 * seed, 2))
    components = Components(size)
    for part in np.array_split(pairs, 4):
        components.join(part[:, 0], part[:, 1])
    assert components.lowest().tolist() == slow_components(size, [tuple(pair) for pair in pairs.tolist()])


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 700])
def test_repeated_digests_are_those_of_a_dictionary(tmp_path: Path, bucket_bytes: int) -> None:
    draw = np.random.default_rng(0)
    pool = [draw.bytes(16) for _ in range(60)] + [b"\0" * 16, b"\0" * 15 + b"\1", b"\1" + b"\0" * 15]
    digests = [pool[place] for place in draw.integers(0, len(pool), 300)]
    expected, seen = {}, {}
    for number, digest in enumerate(digests):
        if seen.setdefault(digest, number) != number:
            expected[number] = seen[digest]
    parts = [
        (np.arange(start, min(start + 70, 300)), np.array(digests[start : start + 70], "V16"))
        for start in range(0, 300, 70)
    ]
    found = {}
    for numbers, firsts in repeated(parts, 300, tmp_path, bucket_bytes):
        found.update(zip(numbers.tolist(), firsts.tolist(), strict=True))
    assert found == expected
    assert list(tmp_path.iterdir()) == []
    assert (Buckets(tmp_path, "V24", 300, bucket_bytes).bits > 0) == (bucket_bytes == 700)


def test_kinds_of_exact_duplicates() -> None:
    image = decode_image(png(1))
    same_pixels = encoded(image, "BMP")
    first = raw(png=png(1), txt=b"a  caption")
    cases = {
        "copy": (raw(png=png(1), txt=b"a caption\n"), {"image", "pixels", "caption", "pair"}),
        "bmp": (raw(bmp=same_pixels, txt=b"a caption"), {"pixels", "caption"}),
        "other text": (raw(png=png(1), txt=b"A caption"), {"image", "pixels"}),
        "other image": (raw(png=png(2), txt=b"a caption"), {"caption"}),
    }
    for name, (other, kinds) in cases.items():
        equal = {
            kind for kind in EXACT if exact_digest(first, kind, "txt") == exact_digest(other, kind, "txt")
        }
        assert equal == kinds, name
    with pytest.raises(Unusable):
        exact_digest(raw(txt=b"x"), "image", "txt")


def test_the_perceptual_hash_is_the_published_one() -> None:
    """Against a DCT-II by its definition, as ImageHash takes it: above the median of the 8 x 8 lowest."""
    for number in range(3):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 50, 3)).astype(np.uint8))
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
        places = np.arange(32) + 0.5

        def wave(k: int, places: np.ndarray = places) -> np.ndarray:
            return 2 * np.cos(np.pi * k * places / 32)

        low = np.array(
            [[(grey * np.outer(wave(u), wave(v))).sum() for v in range(8)] for u in range(8)]
        ).ravel()
        text = "".join("1" if value > np.median(low) else "0" for value in low)
        assert perceptual_hash(image) == int(text, 2)


def test_pictures_without_structure_have_no_hash() -> None:
    for colour in ((0, 0, 0), (255, 255, 255), (10, 200, 30)):
        assert perceptual_hash(Image.new("RGB", (64, 48), colour)) is None
    assert perceptual_hash(Image.new("RGB", (64, 48)).convert("L").point(lambda _: 7)) is None


CAUGHT: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg 40": lambda image: decode_image(encoded(image, "JPEG", quality=40)),
    "webp 50": lambda image: decode_image(encoded(image, "WEBP", quality=50)),
    "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "squashed": lambda image: image.resize((224, 224)),
}
MISSED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "crop": lambda image: image.crop(
        (image.width // 20, image.height // 20, image.width * 19 // 20, image.height * 19 // 20)
    ),
    "flip": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def test_photographs_are_caught_after_encoding_and_resizing_but_not_cropping(real_data: Path) -> None:
    with zipfile.ZipFile(real_data / "ret_coco_free" / "images.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:20]
        images = [decode_image(archive.read(name)) for name in names]
    hashes = [perceptual_hash(image) for image in images]
    for name, change in CAUGHT.items():
        distances = [bits_between(perceptual_hash(change(i)), h) for i, h in zip(images, hashes, strict=True)]
        assert max(distances) <= 4, name
    for name, change in MISSED.items():
        distances = [bits_between(perceptual_hash(change(i)), h) for i, h in zip(images, hashes, strict=True)]
        assert sum(distance <= 4 for distance in distances) <= 2, name
    assert min(bits_between(a, b) for a, b in itertools.combinations(hashes, 2)) > 8


def test_vectors_are_joined_as_by_a_comparison_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch")
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(200, 16))
    vectors[100:150] = vectors[:50] + 0.1 * draw.normal(size=(50, 16))
    vectors[150:160] = vectors[0]
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    pairs = np.argwhere(unit @ unit.T >= 0.95)
    numbers = np.arange(200)
    none = np.zeros((0, 1), np.float32)  # what a shard without samples has
    parts = [(numbers[:0], none), (numbers[:120], unit[:120]), (numbers[120:], unit[120:])]
    components = Components(200)
    join_similar(components, lambda: iter(parts), 0.95, 32)
    assert components.lowest().tolist() == slow_components(200, [tuple(pair) for pair in pairs.tolist()])
    assert (components.lowest() != numbers).sum() > 40
    for block in (similar._BLOCK, 20):
        monkeypatch.setattr(similar, "_BLOCK", block)
        mine, theirs, cosines = similar_rows(unit, unit[:7], 0.95)
        assert sorted(zip(mine.tolist(), theirs.tolist(), strict=True)) == sorted(
            map(tuple, np.argwhere(unit @ unit[:7].T >= 0.95).tolist())
        )
        assert cosines == pytest.approx((unit[mine] * unit[theirs]).sum(axis=1))


def test_what_an_evaluation_set_holds_takes_no_other_sample_along(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3)).astype(np.uint8)
    pictures = [Image.fromarray(each) for each in noise]
    # The first is in the evaluation set; the second has its caption and another picture.
    members = [
        [(f"{n}.png", encoded(picture, "PNG")), (f"{n}.txt", b"same" if n < 2 else b"other")]
        for n, picture in enumerate(pictures)
    ]
    write_tar(tmp_path / "0.tar", members)
    hashes = np.array([perceptual_hash(pictures[0])], np.uint64)
    likeness = Likeness(("caption",), phash=True)
    job = Deduplication(likeness, Target(tmp_path / "out", None), ("caption",), evaluation_sets=("e",))
    evaluation = Evaluation((Single(),), hashes, np.array([True]))
    done = run_dedup(job, [str(tmp_path / "0.tar")], Engine(), evaluation=lambda: evaluation)
    assert done.summary is not None
    assert done.summary.rules == {"caption": (0, 0), "evaluation": (1, 1), "unusable": (0, 0)}
    assert done.summary.kept == 2


class Single:
    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "e"


def test_a_pair_that_matches_by_hash_and_by_embedding_is_one_pair(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8))
    others = [[(f"{key}.png", png(ord(key), 16)), (f"{key}.txt", b"x")] for key in "bcd"]
    same = [("a.png", encoded(image, "PNG")), ("a.txt", b"a")]
    for number, members in enumerate((others[:2], [], [others[2], same])):
        write_tar(tmp_path / f"{number}.tar", members)
    vectors = {
        "0.tar": {"samples": rows_of(["b", "c"]), "vectors": np.eye(4, dtype=np.float32)[:2]},
        "1.tar": {"samples": rows_of([]), "vectors": np.zeros((0, 4), np.float32)},
        "2.tar": {"samples": rows_of(["d", "a"]), "vectors": np.eye(4, dtype=np.float32)[2:]},
    }
    hashes = np.array([perceptual_hash(image)], np.uint64)
    evaluation = Evaluation((Single(),), hashes, np.array([True]), np.array([[0, 0, 0, 1]], np.float32))
    job = Deduplication(
        Likeness((), phash=True, cosine=0.9), Target(tmp_path / "out", None), (),
        embedded_by=("m",), evaluation_sets=("e",),
    )  # fmt: skip
    done = run_dedup(
        job, [str(tmp_path)], Engine(), lambda shard: vectors[Path(shard).name], lambda: evaluation
    )
    assert done.matches == 1
    assert [record.samples for record in done.records] == [2, 1]
    (line,) = (tmp_path / "out" / "evaluation_matches.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "shard": "2.tar", "key": "a", "image": "e", "distance": 0, "cosine": pytest.approx(1),
    }  # fmt: skip
