"""Caption files of well-known sets: COCO and Karpathy JSON, token files of Flickr8k and Flickr30k."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from clipkit.data.making.collection import Entry, Found, Images, Reading, refuse_splits
from clipkit.data.making.tables import checked
from clipkit.data.tables import UNREADABLE_TABLE, ImageRoot, find_root, jsonable, open_table
from clipkit.types import ConfigError, DataError

_LOOKED_AT = 20  # images looked for to find their folder
_TOKEN = re.compile(r"^([^\t]*?)#\d+\t(.*)$")
_COMMA = re.compile(r"^(.*?\.(?:jpe?g|png|webp|gif|bmp)),(.*)$", re.IGNORECASE)
# Where the images of these sets lie when they are unpacked beside their captions.
_FOLDERS = (
    "images", "Images", "train2017", "val2017", "train2014", "val2014", "Flicker8k_Dataset",
    "Flickr8k_Dataset", "flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images",
)  # fmt: skip


def read_annotations(path: Path, reading: Reading) -> Found:
    """Returns the images of a COCO captions file or of a Karpathy file, each with all its captions.

    Fields are those of the images in the file. The file is read into memory as a whole (COCO: about 1 GB).
    """
    document = _document(path)
    images = document.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(entry, dict) for entry in images):
        raise DataError(f"{path}: no list of images in it", "give a COCO captions file or a Karpathy file")
    fields = tuple(images[0])
    for name in (reading.image_key, *reading.captions):
        if name is not None:
            raise ConfigError(f"{path}: a JSON file of captions has no columns", f"leave {name!r} out")
    for name in reading.keep or ():
        if name not in fields:
            raise DataError(f"{path}: no field '{name}' (found: {', '.join(fields)})", "correct --keep")
    if "sentences" in images[0]:
        return _karpathy(path, images, fields, reading)
    return _coco(path, images, document.get("annotations"), fields, reading)


def choose_splits(source: str, found: Sequence[str], reading: Reading) -> tuple[str, ...]:
    """Returns the splits to read of those found; ConfigError when that is left open or one is not there.

    Reading all of them by default would train on what is meant for testing.
    """
    chosen = reading.splits or ((reading.usual_split,) if reading.usual_split in found else ())
    if not chosen and len(found) == 1:
        return tuple(found)
    listed = ", ".join(found)
    if not chosen:
        raise ConfigError(f"{source}: has the splits {listed}", "say which: --split NAME, repeatable")
    for name in chosen:
        if name not in found:
            raise ConfigError(f"{source}: no split '{name}' (found: {listed})", "correct --split")
    return tuple(str(name) for name in chosen)


def _document(path: Path) -> Mapping[str, Any]:
    try:
        with open_table(path) as stream:
            document = json.load(stream)
    except (*UNREADABLE_TABLE, ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a whole JSON file ({detail})", "fetch the file again") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: not a JSON object", "give a COCO captions file or a Karpathy file")
    return document


def _kept(image: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    try:
        return {name: jsonable(image.get(name)) for name in reading.keep or ()}
    except RecursionError:
        raise DataError("a field that is kept is nested too deep", "leave it out of --keep") from None


def _karpathy(path: Path, images: list[Any], fields: tuple[str, ...], reading: Reading) -> Found:
    found = tuple(dict.fromkeys(str(image.get("split", "")) for image in images))
    splits = choose_splits(str(path), found, reading)

    def entries() -> Iterator[Entry]:
        for number, image in enumerate(images):
            if str(image.get("split", "")) not in splits:
                continue
            name = "/".join(str(image[part]) for part in ("filepath", "filename") if image.get(part))
            sentences = image.get("sentences")
            sentences = sentences if isinstance(sentences, list) else []
            texts = tuple(str(one["raw"]) for one in sentences if isinstance(one, dict) and "raw" in one)
            yield checked(Entry(number, name, texts, None, _kept(image, reading)))

    used = f"splits {', '.join(splits)}"
    kept = reading.keep or ()
    return Found("karpathy", _root(path, reading.images, entries), entries, fields, kept, used)


def _coco(path: Path, images: list[Any], notes: Any, fields: tuple[str, ...], reading: Reading) -> Found:
    refuse_splits(path, reading)
    if not isinstance(notes, list) or not any(isinstance(note, dict) and "caption" in note for note in notes):
        raise DataError(
            f"{path}: no captions in its annotations", "give the file of captions, not of instances"
        )
    captions: dict[Any, list[str]] = {}
    for note in notes:
        if isinstance(note, dict) and note.get("caption") is not None:
            captions.setdefault(note.get("image_id"), []).append(str(note["caption"]))

    def entries() -> Iterator[Entry]:
        seen: set[Any] = set()
        for number, image in enumerate(images):
            name, key = str(image.get("file_name") or ""), image.get("id")
            texts = tuple(captions.get(key, ()))
            entry = checked(Entry(number, name, texts, None, _kept(image, reading)))
            yield entry._replace(problem=("image id twice", str(key))) if key in seen else entry
            seen.add(key)
        for number, key in enumerate((key for key in captions if key not in seen), len(images)):
            yield Entry(number, str(key), (), None, {}, ("caption without image", f"image_id {key}"))

    kept = reading.keep or ()
    used = "all captions of each image"
    return Found("coco", _root(path, reading.images, entries), entries, fields, kept, used)


def _root(path: Path, given: Path | None, entries: Callable[[], Iterable[Entry]]) -> Images:
    """Returns where the images lie: where one of the first is found, at `given` or near the captions."""
    first = [entry.image for entry in islice((e for e in entries() if e.problem is None), _LOOKED_AT)]
    if given is not None:
        root = find_root(path, given, "")
        places = [given, *(given / name for name in _FOLDERS)] if given.is_dir() else []
    else:
        root = find_root(path, None, first[0] if first else "")
        bases = (path.parent, path.parent.parent)
        places = [base / name for base in bases for name in (".", *_FOLDERS)]
    for place in [] if root.path.is_file() else places:
        if any((place / name).is_file() for name in first):
            return ImageRoot(place)
    return root


def read_flickr(path: Path, reading: Reading) -> Found:
    """Returns the images of a caption file of Flickr8k or Flickr30k, one entry a line.

    Lines are `NAME#0<tab>caption`, `NAME| 0| caption` or `NAME,caption`; a first line of column names is
    passed over.
    """
    refuse_splits(path, reading)
    if reading.image_key or reading.captions or reading.keep:
        raise ConfigError(
            f"{path}: a token file has no columns", "leave --image-key, --caption-key and --keep out"
        )

    def entries() -> Iterator[Entry]:
        number = 0
        try:
            with open_table(path) as stream:
                for at, line in enumerate(stream):
                    line = line.rstrip("\r\n")
                    if not line.strip() or (at == 0 and is_header(line)):
                        continue
                    yield _flickr_line(number, line)
                    number += 1
        except UNREADABLE_TABLE as error:
            raise DataError(f"{path}: cannot be read ({error})", "save it as UTF-8 text") from error

    images = _root(path, reading.images, entries)
    return Found("flickr", images, entries, used="a caption per line", grouped=True)


def is_header(line: str) -> bool:
    """Returns whether a line names the columns of a Flickr caption file."""
    names = [name.strip().lower() for name in re.split(r"[|,]", line)]
    return names[0] in ("image", "image_name") and names[-1] in ("caption", "comment")


def is_flickr(line: str) -> bool:
    """Returns whether the first line of a file is one of a Flickr caption file that is no ordinary table."""
    return bool(_TOKEN.match(line)) or (is_header(line) and "|" in line)


def _flickr_line(number: int, line: str) -> Entry:
    token = _TOKEN.match(line)
    parts = line.split("|", 2)
    comma = _COMMA.match(line)
    if token:
        name, caption = token.groups()
    elif len(parts) == 3:
        name, caption = parts[0], parts[2]
    elif comma:
        name, caption = comma.groups()
        if len(caption) > 1 and caption[0] == caption[-1] == '"':
            caption = caption[1:-1].replace('""', '"')
    else:
        return Entry(number, line[:80], (), None, {}, ("line not understood", line[:80]))
    return checked(Entry(number, name.strip(), (caption,)))
