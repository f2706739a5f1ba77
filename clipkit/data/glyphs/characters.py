"""Characters: every named character common to the twelve faces, captioned with its Unicode name.

Never trained on, whatever the seed: the face `faces.HELD_OUT_FACE` and a tenth of the characters. Many
characters of different scripts are drawn alike (Latin A, Greek Alpha, Cyrillic A): groups.json lists the
classes whose images are equal to the pixel, so that a hit anywhere in the group can be counted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from clipkit.data.engine import Engine
from clipkit.data.glyphs.corpus import finished_corpus
from clipkit.data.glyphs.faces import FACES, HELD_OUT_FACE, TRAIN_FACES, Draws, coverage, encode_png, font
from clipkit.data.shards import (
    EvaluationItem,
    Progress,
    Sample,
    write_evaluation_set,
    write_text,
    write_train_parts,
)

VERSION = 1  # of the drawing: raise it whenever the same seed would give other bytes
SAMPLES_PER_SHARD = 2_000
UNSEEN_FACE = "DejaVuSans-Bold"  # a trained face: shows the unseen characters
_EM = 22 / 32  # em of the font over the side of the image
_NO_INK = ("Mn", "Zs", "Cf")  # combining marks, spaces, format controls


@functools.cache
def common_characters() -> tuple[str, ...]:
    """Returns the named characters that every face draws, by code point (2,297 with matplotlib's DejaVu
    2.37).
    """
    common = frozenset.intersection(*(coverage(face) for face in FACES))
    characters = (chr(point) for point in sorted(common))
    return tuple(c for c in characters if unicodedata.name(c, "") and unicodedata.category(c) not in _NO_INK)


def character_name(character: str) -> str:
    """Returns the caption and class name: the Unicode name in lower case."""
    return unicodedata.name(character).lower()


@functools.cache
def unseen_characters() -> frozenset[str]:
    """Returns the tenth of the characters that is never trained on, chosen by a hash of the name."""
    ranked = sorted(common_characters(), key=lambda c: hashlib.blake2b(character_name(c).encode()).digest())
    return frozenset(ranked[: round(len(ranked) / 10)])


def draw_character_image(face: str, character: str, size: int = 32) -> Image.Image:
    """Returns the character in black on white, L mode, size x size pixels.

    Centred on the line, not on its ink: a full stop stays at the foot and a ring at the head of the line.
    """
    image = Image.new("L", (size, size), 255)
    used = font(face, round(_EM * size, 2))
    ImageDraw.Draw(image).text((size / 2, size / 2), character, fill=0, font=used, anchor="mm")
    return image


def character_part(seed: int, size: int, num_characters: int, start: int, stop: int) -> Iterator[Sample]:
    """Yields training samples start..stop-1 of all trained (character, face) pairs in an order shuffled by
    `seed`.
    """
    pairs = trained_pairs(seed, num_characters)[start:stop]
    for number, (character, face) in enumerate(pairs, start):
        image = encode_png(draw_character_image(face, character, size))
        fields = {"face": face, "code_point": f"U+{ord(character):04X}"}
        yield Sample(f"{number:07d}", image, "png", (character_name(character),), fields)


@functools.lru_cache(maxsize=2)
def trained_pairs(seed: int, num_characters: int) -> tuple[tuple[str, str], ...]:
    """Returns the (character, face) pairs of the training set in shard order."""
    pairs = [(c, face) for c in seen_characters(num_characters) for face in TRAIN_FACES]
    draws = Draws("characters", seed)
    for last in range(len(pairs) - 1, 0, -1):
        other = draws.below(last + 1)
        pairs[last], pairs[other] = pairs[other], pairs[last]
    return tuple(pairs)


def seen_characters(num_characters: int) -> tuple[str, ...]:
    """Returns the trained ones among the first `num_characters` common characters."""
    return tuple(c for c in common_characters()[:num_characters] if c not in unseen_characters())


def make_characters(
    out: Path,
    *,
    num_characters: int | None = None,
    seed: int = 0,
    size: int = 32,
    workers: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the characters corpus into `out` and returns its description (also out/characters.json).

    out/train: 11 faces of every seen character. face: the held-out face, seen characters against all names.
    unseen: unseen characters on a trained face against the unseen names; unseen_all: the same against all
    names. Each set has a groups.json. `num_characters` takes the first ones only. A finished corpus of the
    same settings is kept, one of other settings is a ConfigError.
    """
    out = Path(out)
    count = min(num_characters or len(common_characters()), len(common_characters()))
    settings = {"corpus": "characters", "version": VERSION, "characters": count, "seed": seed, "size": size}
    done = finished_corpus(out / "characters.json", settings)
    if done is not None:
        return done
    num_pairs = len(seen_characters(count)) * len(TRAIN_FACES)
    parts = [
        functools.partial(character_part, seed, size, count, start, min(num_pairs, start + SAMPLES_PER_SHARD))
        for start in range(0, num_pairs, SAMPLES_PER_SHARD)
    ]
    write_train_parts(parts, out / "train", workers=workers, progress=progress)
    jobs = [(name, out, count, size) for name in SETS]
    on_set = None if progress is None else lambda entry: progress(int(entry["images"]))
    written = list(Engine(workers).map(_write_set, jobs, on_set))
    description = {
        **settings,
        "train": num_pairs,
        "train_path": "train",
        "held_out": {"face": HELD_OUT_FACE, "characters": count - len(seen_characters(count))},
        "sets": dict(zip(SETS, written, strict=True)),
    }
    write_text(out / "characters.json", json.dumps(description, indent=1) + "\n")
    return description


def identical_groups(face: str, characters: Sequence[str], size: int = 32) -> list[list[int]]:
    """Returns the groups of positions in `characters` whose images in `face` are equal to the pixel.

    Only groups of two and more, each in rising order.
    """
    groups: dict[bytes, list[int]] = {}
    for position, character in enumerate(characters):
        groups.setdefault(draw_character_image(face, character, size).tobytes(), []).append(position)
    return [group for group in groups.values() if len(group) > 1]


def read_groups(folder: Path) -> list[list[int]]:
    """Returns the groups of class indices in folder/groups.json, or none where there is no such file."""
    path = Path(folder) / "groups.json"
    if not path.exists():
        return []
    groups: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))["groups"]
    return groups


SETS = ("face", "unseen", "unseen_all")


def _write_set(name: str, out: Path, num_characters: int, size: int) -> dict[str, Any]:
    """Writes evaluation set `name` and returns its entry of the description."""
    everything = common_characters()[:num_characters]
    unseen = tuple(c for c in everything if c in unseen_characters())
    classes = unseen if name == "unseen" else everything
    face, shown = (
        (HELD_OUT_FACE, seen_characters(num_characters)) if name == "face" else (UNSEEN_FACE, unseen)
    )
    index = {character: number for number, character in enumerate(classes)}
    items = (
        EvaluationItem(encode_png(draw_character_image(face, character, size)), "png", label=index[character])
        for character in shown
    )
    names = [character_name(character) for character in classes]
    write_evaluation_set(items, out / name, classnames=names, templates=("{c}",))
    groups = identical_groups(face, classes, size)
    write_text(out / name / "groups.json", json.dumps({"face": face, "groups": groups}) + "\n")
    return {"task": "zeroshot", "path": name, "images": len(shown), "chance": 1 / len(classes)}
