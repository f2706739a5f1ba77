"""Class names and templates: where they come from, and what makes a file of them unusable."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipkit.types import ConfigError, DataError

DEFAULT_TEMPLATE = "a photo of a {}."
PLACEHOLDER = re.compile(r"\{c?\}")
WORDNET_ID = re.compile(r"n\d{8}")

ClassNames = str | Path | Sequence[str] | None
Templates = str | Path | Sequence[str] | Mapping[str, Sequence[str]] | None


@dataclass(frozen=True)
class Prompts:
    """The prompts of each class, and a word on where the templates came from."""

    texts: tuple[tuple[str, ...], ...]
    origin: str

    @property
    def per_class(self) -> str:
        """Returns how many prompts a class has, in words."""
        lengths = sorted({len(prompts) for prompts in self.texts})
        number = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        return f"{number} template{'' if lengths == [1] else 's'}"


@functools.cache
def imagenet_classnames() -> tuple[str, ...]:
    """Returns open_clip's 1,000 ImageNet class names, in the order of the sorted WordNet ids."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


@functools.cache
def openai_templates() -> tuple[str, ...]:
    """Returns open_clip's 80 ImageNet templates as format strings with `{c}`."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{c}") for template in OPENAI_IMAGENET_TEMPLATES)


@functools.cache
def simple_templates() -> tuple[str, ...]:
    """Returns open_clip's 7 best ImageNet templates as format strings with `{c}`."""
    from open_clip import SIMPLE_IMAGENET_TEMPLATES

    return tuple(template("{c}") for template in SIMPLE_IMAGENET_TEMPLATES)


@functools.cache
def wordnet_names() -> dict[str, str]:
    """Returns WordNet id -> class name for the 1,000 ImageNet classes."""
    from timm.data.imagenet_info import ImageNetInfo

    ids = ImageNetInfo("imagenet-1k").label_names()
    # The two lists come from two packages; the cure is for a release of either that reorders its own.
    if len(ids) != len(imagenet_classnames()) or list(ids) != sorted(ids):
        raise ConfigError(
            "timm and open_clip no longer list the same 1,000 ImageNet classes",
            "name the classes with --classnames FILE, or install the pinned versions",
        )
    return dict(zip(ids, imagenet_classnames(), strict=True))


def _read(path: Path, what: str) -> Any:
    """Returns the parsed JSON of a .json file, the lines of any other."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such {what} file", f"check the path of the {what} file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: the {what} file cannot be read ({error})", "make it a readable UTF-8 text file"
        ) from error
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error})", "correct the file") from error
    lines = [line.strip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _strings(value: Any, path: Path | str, what: str) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{path}: {what} must be a list of texts", "give one per line, or a JSON list")
    if not value:
        raise ConfigError(f"{path}: no {what} in it", "give one per line, or a JSON list")
    for position, entry in enumerate(value, 1):
        if not isinstance(entry, str) or not entry.strip():
            raise ConfigError(
                f"{path}: entry {position} of the {what} is empty or no text", "remove or fill that entry"
            )
    return tuple(entry.strip() for entry in value)


def read_classnames(path: Path, folders: Sequence[str] | None = None) -> tuple[str, ...]:
    """Returns the class names of a file: one per line, a JSON list, or a JSON object folder -> name.

    folders: the class folders in order, what the keys of a JSON object must be.
    Raises ConfigError for an unreadable file, DataError for an object that does not name every folder.
    """
    value = _read(path, "class-name")
    if isinstance(value, dict):
        if folders is None:
            raise ConfigError(
                f"{path}: an object of names needs class folders as keys",
                "give a list in label order",
            )
        missing = [folder for folder in folders if folder not in value]
        if missing:
            raise DataError(
                f"{path}: no name for {len(missing)} class folders (first: {missing[0]})",
                "add them to the file",
            )
        value = [value[folder] for folder in folders]
    return _strings(value, path, "class names")


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def check_order(given: Sequence[str], known: Sequence[str], source: str) -> None:
    """Raises DataError when `given` holds the `known` names in another order.

    A line counts as misplaced when its name belongs to other classes only and the name of its own class
    stands on another line: rewordings pass, permutations do not.
    """
    own = [_plain(name) for name in known]
    new = [_plain(name) for name in given]
    known_set, given_set = set(own), set(new)
    for position, (name, expected) in enumerate(zip(new, own, strict=True)):
        if name != expected and name in known_set and expected in given_set:
            raise DataError(
                f"{source}: the order does not match the data: entry {position + 1} is {given[position]!r}, "
                f"class {position} is {known[position]!r}",
                "put the names into the order of the labels (sorted folder names for folders)",
            )


def check_count(given: Sequence[str], wanted: int, source: str, data: str) -> None:
    """Raises DataError when the number of class names is not the number of classes."""
    if len(given) != wanted:
        raise DataError(
            f"{source}: {len(given)} class names, but {data} has {wanted} classes",
            "give exactly one name per class, in label order",
        )


def load_classnames(given: ClassNames, folders: Sequence[str] | None) -> tuple[tuple[str, ...], str] | None:
    """Returns (names, what to call their source) for a --classnames value, None when there is none.

    given: a file, a list, or "imagenet" for open_clip's 1,000 names.
    """
    if given is None:
        return None
    if not isinstance(given, str | Path):
        return _strings(list(given), "classnames", "class names"), "classnames"
    if str(given) == "imagenet" and not Path(given).exists():
        return imagenet_classnames(), "imagenet"
    return read_classnames(Path(given), folders), str(given)


def _checked_templates(templates: Sequence[str], source: Path | str) -> tuple[str, ...]:
    for template in templates:
        if len(PLACEHOLDER.findall(template)) < 1 or set("{}") & set(PLACEHOLDER.sub("", template)):
            raise ConfigError(
                f"{source}: template {template!r} needs {{}} or {{c}} for the class name and no other braces",
                "write templates like: a photo of a {}.",
            )
    return tuple(templates)


def read_templates(path: Path) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
    """Returns the templates of a file: one per line, a JSON list, or a JSON object class name -> prompts."""
    value = _read(path, "template")
    if isinstance(value, dict):
        return {name: _strings(prompts, f"{path}: {name}", "prompts") for name, prompts in value.items()}
    return _checked_templates(_strings(value, path, "templates"), path)


def _load_templates(given: Templates) -> tuple[Sequence[str] | Mapping[str, Sequence[str]], str] | None:
    if given is None:
        return None
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.exists() and str(given) == "openai":
            return openai_templates(), "openai"
        if not path.exists() and str(given) == "simple":
            return simple_templates(), "simple"
        return read_templates(path), path.name
    if isinstance(given, Mapping):
        return {name: _strings(list(texts), name, "prompts") for name, texts in given.items()}, "given"
    return _checked_templates(_strings(list(given), "templates", "templates"), "templates"), "given"


def build_prompts(
    classnames: Sequence[str], given: Templates, own: Sequence[str] | None, wordnet: bool
) -> Prompts:
    """Returns the prompts of every class.

    given  what the user asked for: a file, a list, a mapping class name -> whole prompts, "openai" (the 80 of
           the CLIP paper) or "simple" (the 7 best of them)
    own    the templates that lie beside the data; used when nothing is given. WordNet-id folders default to
           "openai", anything else to "a photo of a {}."
    """
    loaded = _load_templates(given)
    if loaded is None:
        if own is not None:
            loaded = own, "data"
        elif wordnet:
            loaded = openai_templates(), "openai"
        else:
            loaded = (DEFAULT_TEMPLATE,), "default"
    templates, origin = loaded
    if isinstance(templates, Mapping):
        missing = [name for name in classnames if name not in templates]
        if missing:
            raise ConfigError(
                f"{origin}: no prompts for {len(missing)} classes (first: {missing[0]!r})",
                "add them, spelled exactly as in the class names",
            )
        texts = tuple(tuple(templates[name]) for name in classnames)
    else:
        texts = tuple(
            tuple(PLACEHOLDER.sub(lambda _, name=name: name, template) for template in templates)  # type: ignore[misc]
            for name in classnames
        )
    return Prompts(texts, origin)
