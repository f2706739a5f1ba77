"""The embedded corpora: same seed, same bytes; what is held out is never trained on; captions are true."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipkit.data.glyphs import compositional_pairs, make_characters, make_scenes, read_groups
from clipkit.data.glyphs.characters import (
    character_name,
    common_characters,
    draw_character_image,
    identical_groups,
    trained_pairs,
    unseen_characters,
)
from clipkit.data.glyphs.corpus import SETS, train_scene
from clipkit.data.glyphs.faces import (
    FACES,
    HELD_OUT_FACE,
    TRAIN_FACES,
    Draws,
    coverage,
    encode_png,
    face_path,
    glyph_mask,
)
from clipkit.data.glyphs.scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_BACKGROUND,
    NUM_WORDINGS,
    SHAPES,
    Glyph,
    Scene,
    captions,
    draw_scene,
    is_unseen_company,
    is_unseen_pair,
    render,
    word,
)
from clipkit.types import ConfigError

TOLD = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(sorted(SHAPES, key=len, reverse=True))})")
NAMED = re.compile("|".join(sorted(SHAPES, key=len, reverse=True)))
NUM_TRAIN = 400
GOLDEN = [98, 207, 689, 82, 722, 870, 619, 889, 600, 243, 333, 152, 982, 517, 973, 69, 527, 448, 207, 117]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(folder: Path) -> list[dict[str, bytes]]:
    """Returns the members of every sample below `folder`, read with tarfile alone."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar"), key=lambda path: int(path.stem)):
        with tarfile.open(path) as archive:
            for entry in archive:
                key, extension = entry.name.split(".")
                found.setdefault(f"{path.stem}/{key}", {})[extension] = archive.extractfile(entry).read()  # type: ignore[union-attr]
    return list(found.values())


def told(caption: str) -> list[tuple[str, str]]:
    """Returns the (shape, colour) pairs that a caption names, in its order."""
    return [(shape, colour) for colour, shape in TOLD.findall(caption)]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    make_scenes(out, train=NUM_TRAIN, evaluation=60, size=48, workers=1)
    return out


def test_draws_are_pinned_and_even() -> None:
    draws = Draws("golden", 1)
    assert [draws.below(1000) for _ in range(20)] == GOLDEN
    counts = Counter(Draws("even", number).below(7) for number in range(7000))
    assert max(counts.values()) - min(counts.values()) < 200
    assert sorted(Draws("s").sample(range(9), 9)) == list(range(9))
    assert {Draws("b", n).between(-1, 1) for n in range(50)} == {-1, 0, 1}


def test_same_seed_same_bytes_for_any_number_of_processes(tmp_path: Path, scenes: Path) -> None:
    make_scenes(tmp_path / "two", train=NUM_TRAIN, evaluation=60, size=48, workers=2)
    assert files(tmp_path / "two") == files(scenes)
    make_scenes(tmp_path / "other", train=20, evaluation=8, seed=1, workers=1)
    assert samples(tmp_path / "other" / "train")[0] != samples(scenes / "train")[0]


def test_generation_works_in_a_spawned_process() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(train_scene, (0, 3, 32)) == train_scene(0, 3, 32)


def test_a_finished_corpus_is_kept_and_another_is_refused(tmp_path: Path) -> None:
    first = make_scenes(tmp_path, train=10, evaluation=8, size=32, workers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert make_scenes(tmp_path, train=10, evaluation=8, size=32, workers=1) == first
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    with pytest.raises(ConfigError, match="train = 10, not 11"):
        make_scenes(tmp_path, train=11, evaluation=8, size=32, workers=1)


def test_training_scenes_hold_nothing_held_out(scenes: Path) -> None:
    found = samples(scenes / "train")
    assert len(found) == NUM_TRAIN
    for entry in found:
        fields = json.loads(entry["json"])
        pairs = list(zip(fields["shapes"], fields["colours"], strict=True))
        assert not any(is_unseen_pair(*pair) for pair in pairs)
        assert not any(is_unseen_company(a, b) for a, b in itertools.combinations(fields["shapes"], 2))
        assert fields["face"] in TRAIN_FACES
        assert fields["background"] != HELD_OUT_BACKGROUND
        assert entry["txt"].decode() == fields["captions"][0]
        assert len(set(fields["captions"])) == 4


def test_hard_captions_have_the_words_of_the_caption_and_are_wrong(scenes: Path) -> None:
    found = 0
    for entry in samples(scenes / "train"):
        fields, text = json.loads(entry["json"]), entry["txt"].decode()
        two = len(fields["shapes"]) == 2 and len(set(fields["shapes"])) == len(set(fields["colours"])) == 2
        if not fields["hard"]:
            continue
        assert two
        found += 1
        recoloured, reordered = fields["hard"]
        for hard in (recoloured, reordered):
            assert hard != text
            assert hard.split(" on ")[1:] == text.split(" on ")[1:]
        right = list(zip(fields["shapes"], fields["colours"], strict=True))
        assert set(told(text)) == set(right)
        assert set(told(recoloured)) == {(right[0][0], right[1][1]), (right[1][0], right[0][1])}
        assert not any(is_unseen_pair(*pair) for pair in told(recoloured))
        # Exchanged places name the same glyphs the other way round, in the same frame.
        assert told(reordered) == told(text)[::-1]
    assert found > NUM_TRAIN // 10


def test_every_caption_names_exactly_what_is_drawn(scenes: Path) -> None:
    for entry in samples(scenes / "train"):
        fields = json.loads(entry["json"])
        drawn = Counter(zip(fields["shapes"], fields["colours"], strict=True))
        for caption in fields["captions"]:
            named = told(caption)
            shapes = Counter(NAMED.findall(caption))
            assert shapes == Counter(fields["shapes"]) or not shapes
            assert Counter(named) == drawn or not (named or set(COLOURS) & set(caption.split()))
            number = re.search(r"(one|two|three) glyph", caption)
            assert number is None or ["one", "two", "three"].index(number[1]) == len(fields["shapes"]) - 1
            assert "background" not in caption or f"{fields['background']} background" in caption


def test_few_captions_tell_only_the_number_and_all_others_name_colours(scenes: Path) -> None:
    texts = [entry["txt"].decode() for entry in samples(scenes / "train")]
    counts = [text for text in texts if not told(text)]
    assert 0 < len(counts) < NUM_TRAIN / 10
    assert all(re.search(r"(one|two|three) glyph", text) for text in counts)


def test_pixels_show_the_colours_of_the_glyphs_in_order(scenes: Path) -> None:
    for entry in samples(scenes / "train")[:120]:
        fields = json.loads(entry["json"])
        if len(fields["shapes"]) == 1 or len(set(fields["colours"])) < len(fields["colours"]):
            continue
        pixels = np.asarray(Image.open(io.BytesIO(entry["png"]))).astype(int)
        places = []
        for colour in fields["colours"]:
            here = np.argwhere((pixels == COLOURS[colour]).all(axis=2))
            assert len(here)
            places.append(here.mean(axis=0)[1 if fields["arrangement"] == "row" else 0])
        assert places == sorted(places)


def test_order_words_agree_with_the_scene() -> None:
    first, second, third = Glyph("heart", "red"), Glyph("letter k", "blue"), Glyph("digit 7", "green")
    row = Scene((first, second), "row", "", "white", "DejaVuSans")
    for wording in range(NUM_WORDINGS[2]):
        for scene, before in ((row, ("left",)), (replace(row, arrangement="column"), ("above", "top"))):
            caption = word(scene, wording, Draws("w"))
            heart_first = caption.index("heart") < caption.index("letter")
            assert heart_first == any(name in caption.split("letter")[0] for name in before)
    three = Scene((first, second, third), "column", "", "white", "DejaVuSans")
    for wording in range(NUM_WORDINGS[3]):
        caption = word(three, wording, Draws("w"))
        assert ("from bottom" in caption) == (caption.index("digit") < caption.index("heart"))


def test_more_than_a_hundred_thousand_captions_and_all_short() -> None:
    pairs = [pair for pair in itertools.product(SHAPES, COLOURS) if not is_unseen_pair(*pair)]
    apart = sum(
        2 for (a, _), (b, _) in itertools.combinations(pairs, 2) if a != b and not is_unseen_company(a, b)
    )
    assert apart > 100_000  # of the first wording alone: "a COLOUR SHAPE left of a COLOUR SHAPE"
    words = [len(text.replace(":", " :").replace(",", " ,").split()) for n in range(300)
             for text in captions(draw_scene(Draws("l", n)), Draws("c", n), 4)]  # fmt: skip
    assert max(words) <= 24


def test_held_out_rules_spare_and_spread() -> None:
    per_colour = Counter(
        colour for _, colour in itertools.product(SHAPES, COLOURS) if is_unseen_pair(_, colour)
    )
    assert set(per_colour.values()) == {len(SHAPES) // len(COLOURS)}
    assert all(sum(is_unseen_pair(shape, colour) for colour in COLOURS) == 1 for shape in SHAPES)
    company = [is_unseen_company(a, b) for a, b in itertools.combinations(SHAPES, 2)]
    assert 0.07 < np.mean(company) < 0.13


@pytest.mark.parametrize("name", [name for name in SETS if name.startswith("zeroshot")])
def test_zero_shot_sets_show_unseen_pairs(scenes: Path, name: str) -> None:
    found = samples(scenes / name / "test")
    classes = (scenes / name / "classnames.txt").read_text().splitlines()
    labels = Counter(int(entry["cls"]) for entry in found)
    assert len(found) == 60
    assert set(labels) == set(range(len(classes)))
    assert len(set(labels.values())) == 1 or name == "zeroshot_colour"
    templates = (scenes / name / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert all("{c}" in template for template in templates)


@pytest.mark.parametrize("name", [name for name in SETS if name.startswith("retrieval")])
def test_retrieval_captions_belong_to_one_image(scenes: Path, name: str) -> None:
    everything: set[str] = set()
    facts: list[set[Any]] = []
    for entry in samples(scenes / name / "test"):
        texts = entry["txt"].decode().split("\n")
        assert len(set(texts)) == 4
        assert not everything & set(texts)
        everything |= set(texts)
        pairs = told(texts[0])
        assert all(Counter(told(text)) == Counter(pairs) for text in texts)
        unseen = any(is_unseen_pair(*pair) for pair in pairs)
        company = any(is_unseen_company(a[0], b[0]) for a, b in itertools.combinations(pairs, 2))
        assert unseen if name == "retrieval_combinations" else company and not unseen
        if name == "retrieval_face":
            assert all(ord(SHAPES[shape]) in coverage(HELD_OUT_FACE) for shape, _ in pairs)
        facts.append({frozenset(both) for both in itertools.combinations(pairs, 2)})
    assert len(facts) == 60


@pytest.mark.parametrize("name", ["compositional_colour", "compositional_order"])
def test_swapped_captions_have_the_same_words_and_are_wrong(scenes: Path, name: str) -> None:
    pairs = compositional_pairs(scenes / name)
    assert len(pairs) == 60
    assert (scenes / name / "dataset_type.txt").read_text() == "compositional\n"
    for pair in pairs:
        assert sorted(re.sub(r"\ban\b", "a", pair.right).split()) == sorted(
            re.sub(r"\ban\b", "a", pair.swapped).split()
        )
        right, swapped = told(pair.right), told(pair.swapped)
        assert right != swapped
        assert not any(is_unseen_pair(*both) for both in right + swapped)
        assert is_unseen_company(right[0][0], right[1][0])
        if name == "compositional_order":
            assert right == swapped[::-1]
        else:
            assert [shape for shape, _ in right] == [shape for shape, _ in swapped]
        assert Image.open(io.BytesIO(pair.image)).size == (48, 48)


def test_every_shape_is_drawn_by_its_own_glyph() -> None:
    own = frozenset.intersection(*(coverage(face) for face in FACES))
    for name, character in SHAPES.items():
        assert ord(character) in coverage("DejaVuSans")
        if name.startswith(("letter", "digit")):
            assert ord(character) in own
    masks = {glyph_mask("DejaVuSans", character, 20).tobytes() for character in SHAPES.values()}
    assert len(masks) == len(SHAPES)
    assert all(face_path(face).is_file() for face in FACES)


def test_backgrounds_differ_and_glyphs_fit() -> None:
    glyphs = (Glyph("heart", "red", "large"),)
    images = {
        name: np.asarray(render(Scene(glyphs, "", "", name, "DejaVuSans"), Draws("f"), 48))
        for name in BACKGROUNDS
    }
    assert len({image.tobytes() for image in images.values()}) == len(BACKGROUNDS)
    assert (images["white"][0] == 255).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_png_is_lossless(mode: str) -> None:
    image = Image.effect_noise((13, 9), 80).convert(mode)
    read = Image.open(io.BytesIO(encode_png(image)))
    assert (read.mode, read.size, read.tobytes()) == (image.mode, image.size, image.tobytes())


def test_characters_have_names_and_a_tenth_is_unseen() -> None:
    names = [character_name(character) for character in common_characters()]
    assert len(names) == len(set(names)) == 2297
    assert len(unseen_characters()) == 230
    pairs = trained_pairs(0, 10_000)
    assert len(pairs) == len(set(pairs)) == 2067 * 11
    assert not {character for character, _ in pairs} & unseen_characters()
    assert HELD_OUT_FACE not in {face for _, face in pairs}


def test_characters_corpus(tmp_path: Path) -> None:
    description = make_characters(tmp_path / "one", num_characters=80, workers=1)
    make_characters(tmp_path / "two", num_characters=80, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    train = samples(tmp_path / "one" / "train")
    assert len(train) == description["train"]
    captions_seen = {entry["txt"].decode() for entry in train}
    names = (tmp_path / "one" / "face" / "classnames.txt").read_text().splitlines()
    assert len(names) == 80
    unseen = set((tmp_path / "one" / "unseen" / "classnames.txt").read_text().splitlines())
    assert captions_seen == set(names) - unseen
    shown = {names[int(entry["cls"])] for entry in samples(tmp_path / "one" / "face" / "test")}
    assert shown == captions_seen
    all_names = {names[int(entry["cls"])] for entry in samples(tmp_path / "one" / "unseen_all" / "test")}
    assert all_names == unseen


def test_groups_are_exactly_the_equal_images(tmp_path: Path) -> None:
    characters = [c for c in common_characters() if "letter" in character_name(c)][:600]
    groups = identical_groups(HELD_OUT_FACE, characters)
    position = {character_name(character): number for number, character in enumerate(characters)}
    together = {position["latin capital letter a"], position["greek capital letter alpha"]}
    assert any(together <= set(group) for group in groups)
    drawn = [draw_character_image(HELD_OUT_FACE, character).tobytes() for character in characters]
    pairs = {(a, b) for group in groups for a, b in itertools.combinations(group, 2)}
    assert pairs == {(a, b) for a, b in itertools.combinations(range(600), 2) if drawn[a] == drawn[b]}
    assert read_groups(tmp_path) == []
