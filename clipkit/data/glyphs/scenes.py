"""Scenes: one to three coloured glyphs on a background, what may be trained on, and their captions.

Never trained on, whatever the seed: one colour of every shape (`is_unseen_pair`), a tenth of all pairs of
shapes (`is_unseen_company`), the face `faces.HELD_OUT_FACE`, and the background `HELD_OUT_BACKGROUND`.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from clipkit.data.glyphs.faces import HELD_OUT_FACE, TRAIN_FACES, Draws, coverage, encode_png, glyph_mask

PICTOGRAMS = {
    "heart": "♥", "spade": "♠", "club": "♣", "diamond": "♦", "sun": "☀", "smiley": "☻",
    "note": "♪", "house": "⌂", "triangle": "▲", "circle": "●", "square": "■", "umbrella": "☂",
    "airplane": "✈", "scissors": "✂", "snowman": "☃", "cloud": "☁", "star": "★", "moon": "☽",
    "phone": "☎", "envelope": "✉", "pencil": "✏", "anchor": "⚓", "flag": "⚑", "skull": "☠",
    "crown": "♛", "horse": "♞", "flower": "✿", "snowflake": "❄", "cross": "✚", "check": "✔",
}  # fmt: skip
# I and O are left out: they look like the digits 1 and 0.
LETTERS = {f"letter {letter.lower()}": letter for letter in "ABCDEFGHJKLMNPQRSTUVWXYZ"}
DIGITS = {f"digit {digit}": digit for digit in "0123456789"}
SHAPES = {**PICTOGRAMS, **LETTERS, **DIGITS}
COLOURS = {
    "red": (225, 25, 25), "orange": (255, 135, 0), "yellow": (240, 205, 0), "green": (0, 150, 40),
    "turquoise": (0, 200, 205), "blue": (45, 80, 255), "purple": (145, 35, 205), "pink": (255, 110, 190),
}  # fmt: skip
BACKGROUNDS = {
    "white": ((255, 255, 255), (255, 255, 255)), "black": ((0, 0, 0), (0, 0, 0)),
    "gray": ((120, 120, 120), (120, 120, 120)), "striped": ((245, 245, 245), (185, 185, 185)),
    "checkered": ((20, 20, 20), (80, 80, 80)),
}  # fmt: skip
HELD_OUT_BACKGROUND = "checkered"
TRAIN_BACKGROUNDS = tuple(name for name in BACKGROUNDS if name != HELD_OUT_BACKGROUND)
PLACES = tuple(
    f"{vertical} {horizontal}".strip()
    for vertical in ("top", "", "bottom")
    for horizontal in ("left", "", "right")
    if vertical or horizontal
)
_SHAPE_NAMES = tuple(SHAPES)
_COLOUR_NAMES = tuple(COLOURS)
_STAND_IN_FACE = "DejaVuSans"  # draws the pictograms that a serif or oblique monospaced face lacks


@dataclass(frozen=True)
class Glyph:
    """One drawn thing. `size` is "small", "large" or "" (medium, never mentioned)."""

    shape: str
    colour: str
    size: str = ""

    @property
    def pair(self) -> tuple[str, str]:
        """Returns (shape, colour)."""
        return self.shape, self.colour


@dataclass(frozen=True)
class Scene:
    """What an image shows. Glyphs run left to right (`row`) or top to bottom (`column`); `place` belongs to
    one glyph.
    """

    glyphs: tuple[Glyph, ...]
    arrangement: str
    place: str
    background: str
    face: str


@functools.cache
def is_unseen_pair(shape: str, colour: str) -> bool:
    """Returns whether this shape is never drawn in this colour for training (one colour of eight for every
    shape).
    """
    number = _SHAPE_NAMES.index(shape)
    return (5 * number + number // len(COLOURS)) % len(COLOURS) == _COLOUR_NAMES.index(colour)


@functools.cache
def is_unseen_company(first: str, second: str) -> bool:
    """Returns whether these two shapes never stand in one training image (a tenth of all pairs)."""
    low, high = sorted((first, second))
    return Draws("company", low, high).below(10) == 0


def has_unseen_pair(scene: Scene) -> bool:
    """Returns whether a glyph of the scene has a colour it never has in training."""
    return any(is_unseen_pair(*glyph.pair) for glyph in scene.glyphs)


def has_unseen_company(scene: Scene) -> bool:
    """Returns whether two shapes of the scene never meet in training."""
    return any(is_unseen_company(a.shape, b.shape) for a, b in itertools.combinations(scene.glyphs, 2))


def is_trained(scene: Scene) -> bool:
    """Returns whether the scene may occur in the training set."""
    return (
        not has_unseen_pair(scene)
        and not has_unseen_company(scene)
        and scene.face != HELD_OUT_FACE
        and scene.background != HELD_OUT_BACKGROUND
    )


def shapes_of(face: str) -> tuple[str, ...]:
    """Returns the shapes for which `face` has glyphs of its own."""
    return tuple(name for name, character in SHAPES.items() if ord(character) in coverage(face))


def draw_scene(draws: Draws, num_glyphs: int | None = None) -> Scene:
    """Returns a random scene on a trained face and background; its combinations may be held-out ones.

    Two fifths of the scenes have one glyph, two fifths two. Shapes of one scene differ; in a quarter of the
    scenes all glyphs have one colour. Both make shapes worth learning early: with fewer such scenes colours
    and places alone tell most images of a batch apart.
    """
    count = num_glyphs or (1, 1, 2, 2, 3)[draws.below(5)]
    shapes = draws.sample(_SHAPE_NAMES, count)
    colours = [draws.choice(_COLOUR_NAMES) for _ in shapes]
    if draws.below(4) == 0:
        colours = colours[:1] * count
    glyphs = [Glyph(shape, colour) for shape, colour in zip(shapes, colours, strict=True)]
    place = ""
    if count == 1:
        glyphs[0] = replace(glyphs[0], size=("small", "large")[draws.below(2)])
        place = draws.choice(PLACES) if glyphs[0].size == "small" else ""
    elif count == 2 and draws.below(2):
        sizes = ("small", "large") if draws.below(2) else ("large", "small")
        glyphs = [replace(glyph, size=size) for glyph, size in zip(glyphs, sizes, strict=True)]
    return Scene(
        tuple(glyphs),
        ("row", "column")[draws.below(2)] if count > 1 else "",
        place,
        draws.choice(TRAIN_BACKGROUNDS),
        draws.choice(TRAIN_FACES),
    )


_EXTENT = {
    (1, "small"): 0.38,
    (1, "large"): 0.75,
    (2, "small"): 0.30,
    (2, ""): 0.40,
    (2, "large"): 0.46,
    (3, ""): 0.30,
}


def render(scene: Scene, draws: Draws, size: int) -> Image.Image:
    """Returns the scene as an RGB image of size x size pixels; `draws` jitters place and extent."""
    image = _background(scene.background, size)
    count = len(scene.glyphs)
    for index, glyph in enumerate(scene.glyphs):
        extent = round(_EXTENT[count, glyph.size] * size) + draws.below(2) - (count == 3)
        character = SHAPES[glyph.shape]
        face = scene.face if ord(character) in coverage(scene.face) else _STAND_IN_FACE
        mask = glyph_mask(face, character, extent)
        if count == 1:
            centre = _place_centre(scene.place, size, draws)
        else:
            along = size * (2 * index + 1) // (2 * count) + draws.between(-1, 1)
            across = size // 2 + draws.between(-size // 9, size // 9)
            centre = (along, across) if scene.arrangement == "row" else (across, along)
        left = min(max(centre[0] - mask.width // 2, 0), size - mask.width)
        top = min(max(centre[1] - mask.height // 2, 0), size - mask.height)
        image.paste(COLOURS[glyph.colour], (left, top), mask)
    return image


def draw_png(scene: Scene, draws: Draws, size: int) -> bytes:
    """Returns `render` as PNG bytes."""
    return encode_png(render(scene, draws, size))


def captions(scene: Scene, draws: Draws, count: int) -> tuple[str, ...]:
    """Returns `count` different paraphrases of the scene in random order.

    Each names every glyph with its colour, and with two or three glyphs their order; size, place and
    background are mentioned in some.
    """
    found: dict[str, None] = {}
    for _ in range(200):
        if len(found) == count:
            break
        wording = draws.below(NUM_WORDINGS[len(scene.glyphs)])
        found[word(scene, wording, draws)] = None
    return tuple(found)


COUNTS = ("one glyph", "two glyphs", "three glyphs")


def count_caption(scene: Scene, draws: Draws) -> str:
    """Returns a caption that says only how many glyphs there are and, mostly, on what."""
    count = COUNTS[len(scene.glyphs) - 1]
    ground = f"{count} on {with_article(scene.background)} background"
    return (count, f"a picture of {count}", ground, ground)[draws.below(4)]


NUM_WORDINGS = {1: 6, 2: 8, 3: 6}
_OPPOSITE = {"row": ("left of", "right of"), "column": ("above", "below")}
_ENDS = {"row": ("left", "right"), "column": ("top", "bottom")}


def word(scene: Scene, wording: int, draws: Draws) -> str:
    """Returns paraphrase number `wording` (0..NUM_WORDINGS-1), in lower case without a final stop."""
    sizes = draws.below(2) == 1
    names = [_name(glyph, sizes) for glyph in scene.glyphs]
    told = (
        draws.below(4) == 0 and scene.background != HELD_OUT_BACKGROUND
    )  # its name is no trained word either
    ground = f" on {with_article(scene.background)} background" if told else ""
    if len(names) == 1:
        return _word_one(scene, names[0], wording, draws) + ground
    body = _word_two(scene, names, wording) if len(names) == 2 else _word_three(scene, names, wording)
    return body + ground


def _word_one(scene: Scene, name: str, wording: int, draws: Draws) -> str:
    a_name, one = with_article(name), f"one glyph: {name}"
    start = (a_name, a_name, one, f"a picture of {a_name}", name, one)
    if not scene.place or draws.below(3) == 0:
        return start[wording]
    return f"{start[wording]}, {scene.place}" if wording >= 4 else f"{start[wording]} at the {scene.place}"


def _word_two(scene: Scene, names: list[str], wording: int) -> str:
    first, second = names
    a_first, a_second = with_article(first), with_article(second)
    before, after = _OPPOSITE[scene.arrangement]
    start, end = _ENDS[scene.arrangement]
    return (
        f"{a_first} {before} {a_second}",
        f"{a_second} {after} {a_first}",
        f"{a_first} is {before} {a_second}",
        f"{a_second} is {after} {a_first}",
        f"two glyphs: {first} {before} {second}",
        f"two glyphs: {second} {after} {first}",
        f"{a_first} at the {start} and {a_second} at the {end}",
        f"{a_second} at the {end} and {a_first} at the {start}",
    )[wording]


def _word_three(scene: Scene, names: list[str], wording: int) -> str:
    start, end = _ENDS[scene.arrangement]
    first, middle, last = names
    a_first, a_middle, a_last = (with_article(name) for name in names)
    return (
        f"from {start} to {end}: {first}, {middle}, {last}",
        f"from {end} to {start}: {last}, {middle}, {first}",
        f"{a_first}, {a_middle} and {a_last} from {start} to {end}",
        f"{a_last}, {a_middle} and {a_first} from {end} to {start}",
        f"three glyphs: {first}, {middle}, {last} from {start} to {end}",
        f"{a_middle} with {a_first} at the {start} and {a_last} at the {end}",
    )[wording]


def _name(glyph: Glyph, with_size: bool) -> str:
    parts = (glyph.size * with_size, glyph.colour, glyph.shape)
    return " ".join(part for part in parts if part)


def with_article(name: str) -> str:
    """Returns the name with "a" or "an" before it."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _place_centre(place: str, size: int, draws: Draws) -> tuple[int, int]:
    reach = size * 3 // 10
    horizontal = -reach if "left" in place else reach if "right" in place else 0
    vertical = -reach if "top" in place else reach if "bottom" in place else 0
    return size // 2 + horizontal + draws.between(-2, 2), size // 2 + vertical + draws.between(-2, 2)


@functools.cache
def _blank(background: str, size: int) -> Image.Image:
    ground, pattern = BACKGROUNDS[background]
    image = Image.new("RGB", (size, size), ground)
    pen = ImageDraw.Draw(image)
    step = max(2, size // 8)
    for row in range(0, size, step):
        if background == "striped" and row // step % 2:
            pen.rectangle((0, row, size - 1, row + step - 1), fill=pattern)
        if background == "checkered":
            for column in range(row % (2 * step), size, 2 * step):
                pen.rectangle((column, row, column + step - 1, row + step - 1), fill=pattern)
    return image


def _background(background: str, size: int) -> Image.Image:
    return _blank(background, size).copy()
