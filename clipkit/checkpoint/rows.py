"""Tensors of which every rank writes its own rows, and of which any number of ranks reads what it needs.

rows-rank0.safetensors        the rows of rank 0, named "model/<parameter>", "optimizer/<parameter>.exp_avg"
../rows-<hash>.safetensors    those of its rows that never change in the run
rows-rank0.json               {file: {name: {"first": number of its first row, "shape": of the whole}}}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, cat

from clipkit.checkpoint.manifest import fixed_stem
from clipkit.dist import first_own_row, is_sharded, own_rows
from clipkit.types import ClipkitError


@dataclass(frozen=True)
class Piece:
    """Rows `first`, `first` + 1, ... of a tensor of `shape`."""

    rows: Tensor
    first: int
    shape: tuple[int, ...]


def part_rows(stem: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Piece]]:
    """Returns (the whole tensors, the pieces of the sharded ones that this rank has, as "<stem>/<name>").

    Nothing is copied; a rank that has no row of a tensor has no piece of it.
    """
    plain = {name: x for name, x in tensors.items() if not is_sharded(x)}
    pieces = {
        f"{stem}/{name}": Piece(own_rows(x), first_own_row(x), tuple(x.shape))
        for name, x in tensors.items()
        if name not in plain and len(own_rows(x))
    }
    return plain, pieces


def rows_of(pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Returns the rows alone, by name."""
    return {name: piece.rows for name, piece in pieces.items()}


def places_of(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Returns what `rows-rank<n>.json` says of the pieces in one file."""
    return {name: {"first": piece.first, "shape": piece.shape} for name, piece in pieces.items()}


def rows_file(rank: int, ending: str) -> str:
    """Returns the name of the file with the rows of one rank ("safetensors"), or their places ("json")."""
    return f"rows-rank{rank}.{ending}"


class Part(NamedTuple):
    """Rows `first` to `last` (exclusive) of a tensor, under `name` in an open file."""

    first: int
    last: int
    file: Any
    name: str


@dataclass(frozen=True)
class Stored:
    """A tensor of `shape` in the files of a checkpoint; its rows are read when asked for."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    source: str
    cure: str

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Returns the rows `first` to `last` (exclusive), by default the whole, on the CPU; touches no other.

        Raises ClipkitError when they cannot be read.
        """
        rows = self.shape[0] if self.shape else 1
        last = rows if last is None else last
        try:
            if len(self.parts) == 1 and (first, last) == (0, rows):
                whole: Tensor = self.parts[0].file.get_tensor(self.parts[0].name)
                return whole
            if first >= last:
                return self.read(0, 1)[:0]  # for its dtype and shape
            found = []
            for part in self.parts:
                low, high = max(first, part.first) - part.first, min(last, part.last) - part.first
                if low < high:
                    found.append(part.file.get_slice(part.name)[low:high])
            return cat(found)
        except (OSError, SafetensorError) as error:
            raise ClipkitError(f"{self.source} cannot be read: {error}", self.cure) from error


def rows_for(source: Tensor | Stored, target: Tensor) -> Tensor:
    """Returns the rows of `source` that `target`, a tensor of its shape, holds on this rank."""
    if not is_sharded(target):
        return source if isinstance(source, Tensor) else source.read()
    first, last = first_own_row(target), first_own_row(target) + len(own_rows(target))
    return source[first:last] if isinstance(source, Tensor) else source.read(first, last)


def stored(folder: Path, stem: str, files: Collection[str], cure: str) -> dict[str, Stored]:
    """Returns the tensors that the checkpoint in `folder` holds under `stem`.

    files: those that its manifest names. Raises ClipkitError when one cannot be read, or rows are missing.
    """
    found: dict[str, Stored] = {}
    for name in [f"{stem}.safetensors", *(name for name in files if fixed_stem(name) == stem)]:
        file = _opened(folder / name, cure)
        for key in file.keys():  # noqa: SIM118 (a file of tensors is no mapping)
            shape = tuple(file.get_slice(key).get_shape())
            found[key] = Stored(shape, (Part(0, shape[0] if shape else 1, file, key),), str(folder), cure)
    rank = 0
    while rows_file(rank, "json") in files:
        for name, places in _places(folder / rows_file(rank, "json"), files, cure).items():
            file = _opened(folder / name, cure)
            for key, place in places.items():
                if key.startswith(f"{stem}/"):
                    part = Part(
                        place["first"], place["first"] + file.get_slice(key).get_shape()[0], file, key
                    )
                    whole = key.removeprefix(f"{stem}/")
                    before = found[whole].parts if whole in found else ()
                    found[whole] = Stored(tuple(place["shape"]), (*before, part), str(folder), cure)
        rank += 1
    for name, x in found.items():
        # Ranks cut in rank order, so the parts are in the order of their rows.
        if x.shape and [0, *(part.last for part in x.parts)] != [
            *(part.first for part in x.parts),
            x.shape[0],
        ]:
            raise ClipkitError(f"{folder} lacks rows of {name}", cure)
    return found


def _opened(path: Path, cure: str) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ClipkitError(f"{path} cannot be read: {error}", cure) from error


def _places(path: Path, files: Collection[str], cure: str) -> dict[str, Any]:
    try:
        places = dict(json.loads(path.read_bytes()))
        if places.keys() <= set(files):
            return places
        raise ValueError("it names files of another checkpoint")
    except (OSError, ValueError) as error:
        raise ClipkitError(f"{path} cannot be read: {error}", cure) from error
