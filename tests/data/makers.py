"""Small shards, a tokenizer and streams for the tests of this folder."""

from __future__ import annotations

import io
import multiprocessing
import random
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipkit.data.loader import LoaderOptions, Source, TrainStream, open_train
from clipkit.data.sample import RawSample
from clipkit.data.text import TextView
from clipkit.data.views import ImageView
from clipkit.dist import World
from clipkit.types import Batch

Members = list[tuple[str, bytes]]


def png(number: int, size: int = 8) -> bytes:
    """A PNG of noise that differs from number to number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def good(number: int) -> Members:
    """The members of a whole sample."""
    return [(f"{number:06d}.png", png(number)), (f"{number:06d}.txt", f"caption {number}".encode())]


def npy(values: NDArray[Any]) -> bytes:
    """An array in the .npy format."""
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()


def write_tar(path: Path, samples: Iterable[Members], mode: str = "w") -> Path:
    """Writes samples (lists of name and bytes) into one tar."""
    with tarfile.open(path, mode) as tar:
        for members in samples:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: Sequence[int], changed: dict[int, Members] | None = None) -> Path:
    """Writes one tar per count; sample ids run on; `changed` replaces the members of some."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        write_tar(folder / f"{shard:05d}.tar", ((changed or {}).get(n) or good(n) for n in numbers))
        first += count
    return folder


class ByteTokenizer:
    """Bytes as ids, then the largest id 300, then zeros."""

    def __init__(self, context_length: int = 24) -> None:
        self.context_length = context_length

    def __call__(self, captions: list[str]) -> Tensor:
        tokens = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, text in enumerate(captions):
            ids = [*text.encode()[: self.context_length - 1], 300]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens


class NoisyView(ImageView):
    """A view that draws from all three global generators; stands for any third-party augmentation."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = super().__call__(image).clone()
        pixels[0, 0, 0] = random.randrange(256)
        pixels[0, 0, 1] = int(np.random.randint(256))
        return pixels


def stream(
    shards: Path | str | Sequence[str],
    batch_size: int,
    world: World | None = None,
    saved: Any = None,
    **options: Any,
) -> TrainStream:
    """Opens a stream of 8 x 8 images and captions."""
    spec = str(shards) if isinstance(shards, Path) else shards if isinstance(shards, str) else tuple(shards)
    settings: dict[str, Any] = {"seed": 5, **options}
    return open_train(
        LoaderOptions(Source(spec), batch_size, **settings),
        [NoisyView(size=(8, 8), scale=(0.3, 1.0))],
        [TextView(tokenizer=ByteTokenizer(), context_length=24, trim="argmax")],
        world or World(),
        saved=saved,
    )


def take(opened: TrainStream, start: int, stop: int) -> list[Batch]:
    """The batches start..stop, workers ended afterwards."""
    batches = list(opened.batches(start, stop))
    opened.close()
    return batches


def same(left: Sequence[Batch], right: Sequence[Batch]) -> bool:
    """Whether two runs of batches are equal in every tensor, key and reject."""
    return len(left) == len(right) and all(
        a.keys == b.keys
        and a.rejects == b.rejects
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.slots, b.slots)
        and all(
            mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
            for mine, other in zip(_parts(a), _parts(b), strict=True)
        )
        for a, b in zip(left, right, strict=True)
    )


def _parts(batch: Batch) -> list[dict[str, Tensor]]:
    return [batch.images, batch.texts, batch.labels, batch.stored, batch.present]


def global_batches(parts: list[list[Batch]]) -> list[Batch]:
    """The batches of all ranks, joined row by row in rank order; texts padded back to one length."""

    def joined(batches: tuple[Batch, ...]) -> Batch:
        width = max(batch.texts["text"].shape[1] for batch in batches)
        texts = [
            torch.nn.functional.pad(batch.texts["text"], (0, width - batch.texts["text"].shape[1]))
            for batch in batches
        ]
        return replace(
            batches[0],
            images={"image": torch.cat([batch.images["image"] for batch in batches])},
            texts={"text": torch.cat(texts)},
            ids=torch.cat([batch.ids for batch in batches]),
            slots=torch.cat([batch.slots for batch in batches]),
            keys=sum((batch.keys for batch in batches), ()),
            rejects=sum((batch.rejects for batch in batches), ()),
        )

    return [joined(batches) for batches in zip(*parts, strict=True)]


def global_run(
    shards: Path, batch_size: int, size: int, start: int, stop: int, **options: Any
) -> list[Batch]:
    """The global batches as `size` ranks build them, one after the other in this process."""
    return global_batches(
        [take(stream(shards, batch_size, World(rank, size), **options), start, stop) for rank in range(size)]
    )


def raw(**members: bytes) -> RawSample:
    """A sample whose members are given by extension."""
    spans, chunk = {}, b""
    for extension, data in members.items():
        spans[extension] = (len(chunk), len(chunk) + len(data))
        chunk += data
    return RawSample("key", spans, chunk)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image in a format, as bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def worker_pids() -> list[int]:
    """The live children that multiprocessing has started from this process."""
    return [process.pid or 0 for process in multiprocessing.active_children()]
