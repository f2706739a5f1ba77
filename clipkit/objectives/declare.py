"""How options of an objective become the views it declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipkit.types import IMAGE, TEXT, ConfigError, View

TOWERS = ("image", "text")
# The same caption again: dropout in the tower makes it another view (SimCSE). "eda" edits the words.
TEXT_RECIPES = ("dropout", "eda")


def check_tower(tower: Any) -> str:
    """Returns `tower`; raises ConfigError unless it is "image" or "text"."""
    if not isinstance(tower, str) or tower not in TOWERS:
        raise ConfigError(f"tower is {tower!r}", "use image or text")
    return tower


def one_view(tower: str, recipe: str, index: int = 0) -> View:
    """Returns the view that an option names.

    image or text   the view that image-text pairs use
    image tower     an augmentation recipe: simclr, moco_v2, byol, swav, weak, none, or one of data.recipes
    text tower      dropout, eda, or a caption field such as json.caption2
    """
    if recipe == tower:
        return IMAGE if tower == "image" else TEXT
    name = f"{recipe}:{index}"
    if tower == "image":
        return View(name, "image", recipe, index)
    if recipe in TEXT_RECIPES:
        return View(name, "text", recipe, index)
    return View(name, "text", "", 0, field=recipe)


def views_of(
    tower: str, recipes: str | Sequence[str] | None, default: str, count: int = 2
) -> tuple[View, ...]:
    """Returns `count` views of one tower: all of one recipe, or one recipe each; raises ConfigError."""
    wanted = default if recipes is None else recipes
    listed = [wanted] * count if isinstance(wanted, str) else wanted
    if (
        not isinstance(listed, list | tuple)
        or len(listed) != count
        or not all(isinstance(recipe, str) and recipe for recipe in listed)
    ):
        raise ConfigError(f"views is {recipes!r}", f"name one recipe, or a list of {count}")
    views = tuple(one_view(check_tower(tower), recipe, index) for index, recipe in enumerate(listed))
    if len(set(views)) < count:
        raise ConfigError(f"views is {recipes!r}: the same picture or caption twice", "name different views")
    return views
