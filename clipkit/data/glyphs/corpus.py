"""Draws the scenes corpus: training shards and its evaluation sets in CLIP_benchmark layout."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipkit.data.engine import Engine
from clipkit.data.glyphs.faces import HELD_OUT_FACE, Draws
from clipkit.data.glyphs.scenes import (
    COLOURS,
    COUNTS,
    HELD_OUT_BACKGROUND,
    NUM_WORDINGS,
    PICTOGRAMS,
    SHAPES,
    TRAIN_BACKGROUNDS,
    Scene,
    captions,
    count_caption,
    draw_png,
    draw_scene,
    has_unseen_company,
    has_unseen_pair,
    is_trained,
    is_unseen_company,
    is_unseen_pair,
    shapes_of,
    with_article,
    word,
)
from clipkit.data.shards import (
    EvaluationItem,
    Progress,
    Sample,
    write_evaluation_set,
    write_text,
    write_train_parts,
)
from clipkit.types import ConfigError, DataError

VERSION = 3  # of the drawing: raise it whenever the same seed would give other bytes
CAPTIONS_PER_SCENE = 4
COUNT_CAPTION_EVERY = 24  # one sample in so many is trained on its number of glyphs alone
SAMPLES_PER_SHARD = 2_000


@dataclass(frozen=True)
class CompositionalPair:
    """An image with its caption and the same words swapped, so that the second caption is wrong."""

    image: bytes
    right: str
    swapped: str


def scene_part(seed: int, size: int, start: int, stop: int) -> Iterator[Sample]:
    """Yields training samples start..stop-1, each a function of (seed, its number) alone."""
    for number in range(start, stop):
        yield train_scene(seed, number, size)


def train_scene(seed: int, number: int, size: int) -> Sample:
    """Returns training sample `number`: `txt` is one caption, `json` holds all of them and what is
    drawn.
    """
    draws = Draws("train", seed, number)
    scene = draw_scene(draws)
    while not is_trained(scene):
        scene = draw_scene(draws)
    fields: dict[str, Any] = {
        "shapes": [glyph.shape for glyph in scene.glyphs],
        "colours": [glyph.colour for glyph in scene.glyphs],
        "arrangement": scene.arrangement,
        "background": scene.background,
        "face": scene.face,
    }
    image = draw_png(scene, draws, size)
    # The draws of the caption again, so that a hard one has its words and nothing but the exchange tells.
    fields["hard"] = hard_captions(scene, copy.copy(draws))
    texts = captions(scene, draws, CAPTIONS_PER_SCENE)
    if draws.below(COUNT_CAPTION_EVERY) == 0:
        texts = (count_caption(scene, draws), *texts[1:])
        fields["hard"] = []
    return Sample(f"{number:07d}", image, "png", texts, fields)


def hard_captions(scene: Scene, draws: Draws) -> list[str]:
    """Returns two captions that are wrong for the scene: colours exchanged, and order exchanged.

    Empty unless there are two glyphs that differ in shape and colour, and the exchange names no held-out
    pair. With the draws of a caption the two have its wording.
    """
    if len(scene.glyphs) != 2:
        return []
    recoloured, reordered = exchanged(scene)
    first, second = scene.glyphs
    if first.colour == second.colour or first.shape == second.shape:
        return []
    if any(is_unseen_pair(shape, colour) for shape, colour in _pairs(recoloured)):
        return []
    return [captions(other, copy.copy(draws), 1)[0] for other in (recoloured, reordered)]


def exchanged(scene: Scene) -> tuple[Scene, Scene]:
    """Returns a scene of two glyphs with their colours exchanged, and with their places exchanged."""
    first, second = scene.glyphs
    recoloured = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    return replace(scene, glyphs=recoloured), replace(scene, glyphs=(second, first))


def make_scenes(
    out: Path,
    *,
    train: int = 40_000,
    evaluation: int = 1_000,
    seed: int = 0,
    size: int = 48,
    workers: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes the scenes corpus into `out` and returns its description (also out/scenes.json).

    out/train holds `train` scenes of size x size pixels, every other folder one evaluation set of
    `evaluation` images: description["sets"][name] = {"task", "path" (relative to out), "images", "chance"
    (of the top-1 metric)}. A corpus of the same settings that is already there is left as it is; one of
    other settings is a ConfigError.
    """
    out = Path(out)
    settings = {
        "corpus": "scenes", "version": VERSION,
        "train": train, "evaluation": evaluation, "seed": seed, "size": size,
    }  # fmt: skip
    done = finished_corpus(out / "scenes.json", settings)
    if done is not None:
        return done
    parts = [
        functools.partial(scene_part, seed, size, start, min(train, start + SAMPLES_PER_SHARD))
        for start in range(0, train, SAMPLES_PER_SHARD)
    ]
    write_train_parts(parts, out / "train", workers=workers, progress=progress)
    jobs = [(name, out, evaluation, seed, size) for name in SETS]
    on_set = None if progress is None else lambda entry: progress(int(entry["images"]))
    written = list(Engine(workers).map(_write_set, jobs, on_set))
    description = {
        **settings,
        "train_path": "train",
        "held_out": {"face": HELD_OUT_FACE, "background": HELD_OUT_BACKGROUND},
        "sets": dict(zip(SETS, written, strict=True)),
    }
    write_text(out / "scenes.json", json.dumps(description, indent=1) + "\n")
    return description


def finished_corpus(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the description in `path` if it was made with `settings`, None if there is none.

    ConfigError when the folder holds a corpus of other settings.
    """
    if not path.exists():
        return None
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name, value in settings.items() if description.get(name) != value]
    if differing:
        name = differing[0]
        raise ConfigError(
            f"{path.parent} holds a corpus made with {name} = {description.get(name)}, not {settings[name]}",
            "choose another folder, or delete this one",
        )
    return description


def compositional_pairs(folder: Path) -> list[CompositionalPair]:
    """Returns the pairs of a compositional set; accuracy is the share with score(right) > score(swapped),
    chance 50 %.

    The set is in CLIP_benchmark layout with dataset_type.txt = compositional, and its member `txt` holds
    two lines: the right caption, then the swapped one.
    """
    pairs = []
    for path in sorted((Path(folder) / "test").glob("*.tar"), key=lambda path: int(path.stem)):
        members: dict[str, bytes] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                members[Path(member.name).suffix] = stream.read() if stream is not None else b""
                if len(members) == 2:
                    lines = members[".txt"].decode().split("\n")
                    pairs.append(CompositionalPair(members[".png"], lines[0], lines[1]))
                    members = {}
    if not pairs:
        raise DataError(f"{folder}: no compositional pairs", "give the folder that holds dataset_type.txt")
    return pairs


def _until(draws: Draws, wanted: Callable[[Scene], bool], num_glyphs: int, change: dict[str, str]) -> Scene:
    while True:
        scene = replace(draw_scene(draws, num_glyphs), **change)  # type: ignore[arg-type]
        if wanted(scene):
            return scene


def _classify(name: str, count: int, seed: int, size: int) -> Iterator[EvaluationItem]:
    """Scenes in which a shape has the colour it never had in training, equally many per class.

    One glyph, except in the count set, where the class is the number of glyphs.
    """
    classes = _CLASSES[name]
    for number in range(count):
        draws = Draws(name, seed, number)
        label = number % len(classes)
        scene = draw_scene(draws, label + 1 if name == "zeroshot_count" else 1)
        first = scene.glyphs[0]
        pair = draws.choice(_unseen_pairs(name, classes[label], first.shape))
        scene = replace(scene, glyphs=(replace(first, shape=pair[0], colour=pair[1]), *scene.glyphs[1:]))
        yield EvaluationItem(draw_png(scene, draws, size), "png", label=label)


@functools.cache
def _unseen_pairs(name: str, wanted: str, shape: str) -> tuple[tuple[str, str], ...]:
    """Returns the unseen pairs of class `wanted`: of that pictogram, of that colour, or of `shape`."""
    pairs = [pair for pair in itertools.product(SHAPES, COLOURS) if is_unseen_pair(*pair)]
    if name == "zeroshot_colour":
        return tuple(pair for pair in pairs if pair[1] == wanted)
    return tuple(pair for pair in pairs if pair[0] == (wanted if name == "zeroshot_pictogram" else shape))


def _retrieve(name: str, count: int, seed: int, size: int) -> Iterator[EvaluationItem]:
    """Scenes of two and three glyphs; no caption is true of another scene of the set."""
    change, wanted = {
        "retrieval_combinations": ({}, has_unseen_pair),
        "retrieval_face": ({"face": HELD_OUT_FACE}, _in_face_alone),
        "retrieval_background": ({"background": HELD_OUT_BACKGROUND}, _only_company_is_new),
    }[name]
    told: set[tuple[Any, ...]] = set()
    draws = Draws(name, seed)
    for number in range(count):
        while True:
            scene = _until(draws, wanted, 3 if number % 4 == 3 else 2, change)
            facts = _facts(scene)
            if not told & facts:
                break
        told |= facts
        own = Draws(name, seed, number)
        yield EvaluationItem(
            draw_png(scene, own, size), "png", captions=captions(scene, own, CAPTIONS_PER_SCENE)
        )


def _facts(scene: Scene) -> set[tuple[Any, ...]]:
    """Every statement "this glyph stands before that one" that holds: captions are made of these."""
    names = [glyph.pair for glyph in scene.glyphs]
    return {(scene.arrangement, first, second) for first, second in itertools.combinations(names, 2)}


def _only_company_is_new(scene: Scene) -> bool:
    return has_unseen_company(scene) and not has_unseen_pair(scene)


def _in_face_alone(scene: Scene) -> bool:
    own = shapes_of(HELD_OUT_FACE)
    return all(glyph.shape in own for glyph in scene.glyphs) and _only_company_is_new(scene)


def _compose(name: str, count: int, seed: int, size: int) -> Iterator[EvaluationItem]:
    """Two shapes that never met in training; all four shape-colour pairs in play are trained ones."""
    for number in range(count):
        draws = Draws(name, seed, number)
        scene = _until(draws, _can_be_swapped, 2, {})
        other = exchanged(scene)[name != "compositional_colour"]
        wording = draws.below(NUM_WORDINGS[2])
        # The same draws for both captions: they differ in the swap and in nothing else.
        lines = [word(told, wording, Draws(name, seed, number, "words")) for told in (scene, other)]
        yield EvaluationItem(draw_png(scene, draws, size), "png", captions=tuple(lines))


def _can_be_swapped(scene: Scene) -> bool:
    first, second = scene.glyphs
    return (
        not first.size  # a size would move along with its glyph or stay behind: two changes at once
        and first.colour != second.colour
        and is_unseen_company(first.shape, second.shape)
        and not any(
            is_unseen_pair(shape, colour) for shape, _ in _pairs(scene) for _, colour in _pairs(scene)
        )
    )


def _pairs(scene: Scene) -> list[tuple[str, str]]:
    return [glyph.pair for glyph in scene.glyphs]


_CLASSES: dict[str, tuple[str, ...]] = {
    "zeroshot_pictogram": tuple(PICTOGRAMS),
    "zeroshot_colour": tuple(COLOURS),
    "zeroshot_count": COUNTS,
}
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "zeroshot_pictogram": tuple(f"{with_article(colour)} {{c}}" for colour in COLOURS),
    "zeroshot_colour": tuple(f"a {{c}} {shape}" for shape in SHAPES),
    "zeroshot_count": (
        "{c}",
        "a picture of {c}",
        *(f"{{c}} on a {ground} background" for ground in TRAIN_BACKGROUNDS),
    ),
}
SETS: dict[str, Callable[[str, int, int, int], Iterator[EvaluationItem]]] = {
    **dict.fromkeys(_CLASSES, _classify),
    **dict.fromkeys(("retrieval_combinations", "retrieval_face", "retrieval_background"), _retrieve),
    **dict.fromkeys(("compositional_colour", "compositional_order"), _compose),
}


def _write_set(name: str, out: Path, count: int, seed: int, size: int) -> dict[str, Any]:
    """Writes evaluation set `name` and returns its entry of the description."""
    items = SETS[name](name, count, seed, size)
    classes = _CLASSES.get(name)
    task = {"zeroshot": "zeroshot", "retrieval": "retrieval", "compositional": "compositional"}[
        name.split("_")[0]
    ]
    kind = "compositional" if task == "compositional" else None
    write_evaluation_set(items, out / name, classnames=classes, templates=_TEMPLATES.get(name), kind=kind)
    chance = 1 / len(classes) if classes is not None else 0.5 if kind else 1 / count
    return {"task": task, "path": name, "images": count, "chance": chance}
