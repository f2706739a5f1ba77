"""Embeddings of a whole evaluation set: every row once, the work shared by all ranks, bad input an error.

The rows are cut into batches of `batch_size` that do not depend on the number of ranks; rank r encodes a
contiguous run of whole batches, the last one padded, ranks without work padded with empty batches. Forward
counts and shapes are therefore equal on every rank (FSDP needs it), and every row is computed in the same
batch at the same place for every W, which makes results independent of W to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from clipkit.dist import World, agree, gather, gather_objects
from clipkit.evaluation.images import Images
from clipkit.types import ClipkitError

# progress(stage, rows done, rows in all), stage "images" or "texts"
Progress = Callable[[str, int, int], None]

# Root mean square distance of unit rows from their mean below which they count as one point. Untrained towers
# lie around 1e-1 to 1e-2, rounding of float32 rows around 1e-7.
COLLAPSED = 1e-5

T = TypeVar("T")


class UnusableEmbeddings(ClipkitError):
    """Embeddings that are not finite, zero or collapsed: their score would be chance, in silence."""


class Encoder(Protocol):
    """What evaluation needs of a model. Encoding may return any float dtype on any device.

    image_size  (height, width) in pixels of what `preprocess` returns: uint8 (3, H, V)
    precision   "fp32", "bf16" or "fp16": what the towers compute in; recorded, not set here
    """

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]: ...
    def tokenize(self, captions: list[str], /) -> Tensor: ...
    def encode_image(self, images: Tensor, /) -> Tensor: ...
    def encode_text(self, tokens: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Share:
    """The run of whole batches that one rank encodes: `start .. start + num_batches - 1`."""

    rows: int
    batch_size: int
    start: int
    num_batches: int

    @classmethod
    def of(cls, rows: int, batch_size: int, world: World) -> Share:
        """Returns the share of this rank; every rank gets equally many batches."""
        batches = -(-rows // batch_size)
        num_batches = -(-batches // world.size)
        return cls(rows, batch_size, world.rank * num_batches, num_batches)

    def batch(self, index: int) -> range:
        """Returns the rows of this rank's batch `index`; shorter than batch_size, or empty, at the end."""
        first = (self.start + index) * self.batch_size
        return range(min(first, self.rows), min(first + self.batch_size, self.rows))


class _ImageBatches(Dataset[tuple[Tensor, ClipkitError | None]]):
    """Padded uint8 batches by number. An unreadable image is returned as an error: ranks fail together."""

    def __init__(
        self,
        images: Images,
        preprocess: Callable[[Image.Image], Tensor],
        size: tuple[int, int],
        share: Share,
    ) -> None:
        self.images, self.preprocess, self.size, self.share = images, preprocess, size, share

    def __len__(self) -> int:
        return self.share.num_batches

    def __getitem__(self, index: int) -> tuple[Tensor, ClipkitError | None]:
        pixels = torch.zeros((self.share.batch_size, 3, *self.size), dtype=torch.uint8)
        for slot, row in enumerate(self.share.batch(index)):
            try:
                pixels[slot] = self.preprocess(self.images.load(row))
            except ClipkitError as error:
                return pixels, error
        return pixels, None


def _as_is(item: Any) -> Any:
    return item


def _fail_together(error: ClipkitError | None, world: World) -> None:
    """Raises the first error of any rank on every rank: nobody is left waiting in a collective."""
    if world.size == 1:
        if error is not None:
            raise error
    elif agree([float(error is not None)])[0] > 0:
        raise next(found for found in gather_objects(error) if found is not None)


def together(work: Callable[[], T], world: World) -> T:
    """Returns what `work` returns on this rank; an error of one rank is raised on every rank.

    All ranks must call it. A file that one machine lacks would otherwise leave the others in a collective.
    """
    value: T | None = None
    failure: ClipkitError | None = None
    try:
        value = work()
    except ClipkitError as error:
        failure = error
    _fail_together(failure, world)
    return value  # type: ignore[return-value]


def gather_rows(x: Tensor) -> Tensor:
    """Returns the rows of all ranks in rank order, (B, ...) -> (N, ...), wherever the tensor lies."""
    if World.current().size > 1 and torch.distributed.get_backend() == "nccl" and not x.is_cuda:
        x = x.cuda()  # nccl moves nothing else
    return gather(x)


def _collect(parts: list[Tensor], rows: int, world: World) -> Tensor:
    local = torch.cat(parts)
    if world.size > 1:
        local = gather_rows(local)
    # Scores, ranks and probes are computed in float64, which Metal does not have.
    return local[:rows].cpu() if local.device.type == "mps" else local[:rows]


def _at_least_fp32(embeddings: Tensor) -> Tensor:
    kept = embeddings.detach()
    return kept if kept.dtype == torch.float64 else kept.float()


@torch.no_grad()
def embed_images(
    model: Encoder,
    images: Images,
    *,
    batch_size: int = 64,
    workers: int = 0,
    world: World | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Returns the embeddings of all images in order, (N, D), at least fp32, the same on every rank.

    They lie where the model puts them, those of an Apple GPU on the CPU.
    workers: decoding processes per rank. Raises DataError, on every rank, naming an unreadable image.
    """
    world = world or World()
    share = Share.of(len(images), batch_size, world)
    loader = DataLoader(
        _ImageBatches(images, model.preprocess, model.image_size, share),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        generator=torch.Generator(),  # the default one would advance the caller's random state
    )
    parts = []
    for index, (pixels, error) in enumerate(loader):
        _fail_together(error, world)
        parts.append(_at_least_fp32(model.encode_image(pixels)))
        if progress is not None:
            progress("images", min((index + 1) * batch_size * world.size, len(images)), len(images))
    return _collect(parts, len(images), world)


@torch.no_grad()
def embed_texts(
    model: Encoder,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    world: World | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Returns the embeddings of all texts in order, (M, D), at least fp32, the same on every rank."""
    world = world or World()
    share = Share.of(len(texts), batch_size, world)
    parts = []
    for index in range(share.num_batches):
        rows = [texts[row] for row in share.batch(index)]
        rows += [texts[0]] * (batch_size - len(rows))
        parts.append(_at_least_fp32(model.encode_text(model.tokenize(rows))))
        if progress is not None:
            progress("texts", min((index + 1) * batch_size * world.size, len(texts)), len(texts))
    return _collect(parts, len(texts), world)


def distinct(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """Returns the distinct texts in order of first appearance, and for each text its place among them."""
    places: dict[str, int] = {}
    index = [places.setdefault(text, len(places)) for text in texts]
    return list(places), torch.tensor(index, dtype=torch.int64)


def _names(rows: Tensor, name: Callable[[int], str]) -> Iterator[str]:
    return (name(int(row)) for row in rows.nonzero()[:1, 0])


def _spread(embeddings: Tensor) -> float:
    """Returns the root mean square distance of the unit rows from their mean: sqrt(1 - |mean|^2)."""
    total = sum(functional.normalize(rows.cpu().double(), dim=1).sum(0) for rows in embeddings.split(8192))
    squared = (torch.as_tensor(total) / len(embeddings)).square().sum()
    return math.sqrt(max(0.0, 1.0 - float(squared)))


def check_embeddings(embeddings: Tensor, what: str, name: Callable[[int], str]) -> None:
    """Raises UnusableEmbeddings for embeddings that would score chance level in silence.

    embeddings (N, D); what: "image" or "text"; name: row -> how to call it in the message.
    Refused: entries that are not finite, zero rows, and N >= 2 rows that are all the same point.
    """
    bad = ~embeddings.isfinite().all(1)
    for first in _names(bad, name):
        raise UnusableEmbeddings(
            f"{int(bad.sum())} of {len(bad)} {what} embeddings are not finite (first: {first})",
            "the weights or the precision overflow: evaluate in fp32, or use an earlier checkpoint",
        )
    zero = (embeddings == 0).all(1)
    for first in _names(zero, name):
        raise UnusableEmbeddings(
            f"{int(zero.sum())} of {len(zero)} {what} embeddings are zero vectors (first: {first})",
            f"the {what} tower puts out nothing: check that its weights were loaded and trained",
        )
    if len(embeddings) < 2:
        return
    spread = _spread(embeddings)
    if spread < COLLAPSED:
        raise UnusableEmbeddings(
            f"all {len(embeddings)} {what} embeddings are one point (spread {spread:.1e}): collapsed",
            f"check that the {what}s differ; then lower the learning rate or use an earlier checkpoint",
        )
