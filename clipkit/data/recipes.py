"""Augmentation recipes by name: what a view of an image looks like, and users' own in a configuration.

A recipe is a tuple of looks: view `index` of it takes look `index`, views beyond the last take the last.
Loads no torch, so that a configuration can be checked without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from clipkit.types import ConfigError

WHERE = "data.recipes"
DEFAULT_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augment:
    """Changes after the crop, at the view's size, in the order of the fields; p is a probability.

    flip      p of a mirror image (left and right change sides)
    rotation  largest angle in degrees, either way; corners show the mirrored image, not black
    jitter    largest relative change of brightness, contrast and saturation, and shift of hue (in circles,
              at most 0.5), in random order; jitter_p is the p that the four happen
    grey      p of grey
    blur      p of a Gaussian blur; sigma is its range in pixels of a view of 224 pixels
    solarise  p that values from 128 on are inverted
    """

    flip: float = 0.0
    rotation: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.0


@dataclass(frozen=True)
class Look:
    """One view of a recipe.

    crop        range of areas of the random crop; None: the default crop (data.crop_scale)
    ratio       range of its aspect ratios
    size        share of the tower's size, in pixels a multiple of 8
    evaluation  the evaluation transform instead of a random crop
    """

    crop: tuple[float, float] | None = None
    ratio: tuple[float, float] = DEFAULT_RATIO
    size: float = 1.0
    evaluation: bool = False
    augment: Augment = Augment()


Looks = tuple[Look, ...]

# arXiv:2002.05709 appendix A, strength 1.
_SIMCLR = Augment(flip=0.5, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey=0.2, blur=0.5)
# arXiv:2006.07733 table 6; the second view solarises. Barlow Twins (arXiv:2103.03230) takes both.
_BYOL = Augment(flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey=0.2, blur=1.0)
_ASYMMETRIC = (
    Look(crop=(0.08, 1.0), augment=_BYOL),
    Look(crop=(0.08, 1.0), augment=replace(_BYOL, blur=0.1, solarise=0.2)),
)

RECIPES: dict[str, Looks] = {
    "none": (Look(evaluation=True),),
    "weak": (Look(),),
    "simclr": (Look(crop=(0.08, 1.0), augment=_SIMCLR),),
    # facebookresearch/moco main_moco.py: arXiv:1911.05722, and --aug-plus of arXiv:2003.04297.
    "moco_v1": (Look(crop=(0.2, 1.0), augment=Augment(flip=0.5, jitter=(0.4, 0.4, 0.4, 0.4), grey=0.2)),),
    "moco_v2": (
        Look(
            crop=(0.2, 1.0),
            augment=Augment(flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2, blur=0.5),
        ),
    ),
    "byol": _ASYMMETRIC,
    "barlow": _ASYMMETRIC,
    # arXiv:2006.09882 and its repository: two global crops, then local ones, 96 pixels to their 224.
    "swav": (
        Look(crop=(0.14, 1.0), augment=_SIMCLR),
        Look(crop=(0.14, 1.0), augment=_SIMCLR),
        Look(crop=(0.05, 0.14), size=96 / 224, augment=_SIMCLR),
    ),
}


def read_recipes(own: Mapping[str, Any] | None = None) -> dict[str, Looks]:
    """Returns the built-in recipes and a user's own ones: name -> values.

    Values are the fields of `Look` (but `evaluation`) and of `Augment`, `extends` (a recipe to start from,
    `weak` without it; a recipe may extend the built-in one of its own name) and `views` (a list of values
    for view 0, 1, ... alone). Raises ConfigError naming the recipe, the key and the nearest known one.
    """
    own = own or {}
    return {**RECIPES, **{name: _resolve(name, own, ()) for name in own}}


def find_looks(recipe: str, known: Mapping[str, Looks], user: str) -> Looks:
    """Returns a recipe by name ("" is weak). Raises ConfigError naming `user`, who asked, and the nearest."""
    looks = known.get(recipe or "weak")
    if looks is None:
        raise ConfigError(
            f"{user}: no augmentation recipe is called {recipe!r}", suggestion(recipe, known, WHERE)
        )
    return looks


def suggestion(word: str, known: Iterable[str], place: str = "") -> str:
    """Returns a cure: the nearest known word, and all of them."""
    known = sorted(name for name in known if name)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    first = f"did you mean {close[0]!r}? " if close else ""
    return f"{first}known: {', '.join(known)}" + (f" (own ones: {place})" if place else "")


def _resolve(name: str, own: Mapping[str, Any], path: tuple[str, ...]) -> Looks:
    where = f"{WHERE}.{name}"
    values = own[name]
    if not isinstance(values, Mapping) or not isinstance(values.get("extends", ""), str):
        raise ConfigError(f"{where} is {values!r}", "write keys and values, for example {extends: simclr}")
    base = values.get("extends", "weak")
    if base in path or (base == name and name not in RECIPES):
        raise ConfigError(
            f"{where} extends itself by way of {base!r}", f"extend one of {', '.join(sorted(RECIPES))}"
        )
    if base in own and base != name:
        looks = _resolve(base, own, (*path, name))
    elif base in RECIPES:
        looks = RECIPES[base]
    else:
        raise ConfigError(f"{where}.extends is {base!r}", suggestion(base, [*RECIPES, *own]))
    shared = {key: value for key, value in values.items() if key not in ("extends", "views")}
    looks = tuple(_changed(look, shared, where, (*_CHECKS, "extends", "views")) for look in looks)
    single = values.get("views", ())
    if not isinstance(single, list | tuple) or not all(isinstance(entry, Mapping) for entry in single):
        raise ConfigError(
            f"{where}.views is {single!r}", "write a list of keys and values, one entry per view"
        )
    for at, entry in enumerate(single):
        look = _changed(looks[min(at, len(looks) - 1)], entry, f"{where}.views.{at}", tuple(_CHECKS))
        looks = (*looks[:at], look, *looks[at + 1 :])
    return looks


def _changed(look: Look, values: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> Look:
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _CHECKS:
            raise ConfigError(f"{where}: unknown key {key!r}", suggestion(key, keys))
        checked[key] = _CHECKS[key](f"{where}.{key}", value)
    ops = {key: value for key, value in checked.items() if key in _OPS}
    rest = {key: value for key, value in checked.items() if key not in _OPS}
    return replace(look, **rest, augment=replace(look.augment, **ops))


def _number(where: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{where} is {value!r}", f"give a number between {low:g} and {high:g}")
    return float(value)


def _numbers(where: str, value: Any, bounds: tuple[tuple[float, float], ...]) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(bounds):
        raise ConfigError(f"{where} is {value!r}", f"give a list of {len(bounds)} numbers")
    return tuple(_number(f"{where}.{at}", number, *bounds[at]) for at, number in enumerate(value))


def _probability(where: str, value: Any) -> float:
    return _number(where, value, 0.0, 1.0)


def _range(low: float, high: float, optional: bool = False) -> Callable[[str, Any], Any]:
    def check(where: str, value: Any) -> tuple[float, ...] | None:
        if optional and value is None:
            return None
        first, last = _numbers(where, value, ((low, high),) * 2)
        if first > last:
            raise ConfigError(f"{where} is {value!r}", "give [low, high] with low <= high")
        return first, last

    return check


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "crop": _range(1e-4, 1.0, optional=True),
    "ratio": _range(0.01, 100.0),
    "size": lambda where, value: _number(where, value, 0.01, 1.0),
    "flip": _probability,
    "rotation": lambda where, value: _number(where, value, 0.0, 180.0),
    "jitter": lambda where, value: _numbers(where, value, ((0.0, 10.0),) * 3 + ((0.0, 0.5),)),
    "jitter_p": _probability,
    "grey": _probability,
    "blur": _probability,
    "sigma": _range(0.0, 100.0),
    "solarise": _probability,
}
_OPS = {entry.name for entry in fields(Augment)}
