"""Scores and embeddings of training samples, shard by shard: what clipkit.data.curation asks a model for.

A sample that cannot be used gets NaN and does not end the job: training shards hold some.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipkit.data.curation.survey import Rows, rows_of
from clipkit.data.engine import Engine
from clipkit.data.sample import RawSample, Unusable, caption, decode_image, image_bytes
from clipkit.data.walked import walked_samples
from clipkit.evaluation.embed import Encoder, embed_images
from clipkit.evaluation.images import Images


@dataclass(frozen=True)
class Scorer:
    """A model over shards. The batches depend on the shard alone, so that scores do not on who computes them.

    caption   field of the caption that is compared with the image
    engine    decodes the images; the model runs in this process
    """

    model: Encoder
    caption: str = "txt"
    batch_size: int = 64
    engine: Engine = field(default_factory=Engine)

    def scores(self, shard: str) -> dict[str, Rows]:
        """Returns the rows of one shard: key, and score, the cosine of image and caption (float64)."""
        keys: list[str] = []
        scores = []
        for prepared in self._prepared(shard, self.caption):
            keys += prepared.keys
            image = _unit(self.model.encode_image(torch.from_numpy(prepared.pixels)))
            text = _unit(self.model.encode_text(self.model.tokenize(prepared.captions)))
            scores.append(np.where(prepared.usable, (image * text).sum(1).numpy(), np.nan))
        return {"samples": rows_of(keys, score=np.concatenate(scores) if scores else np.zeros(0))}

    def vectors(self, shard: str) -> dict[str, Rows]:
        """Returns the rows of one shard: key; and as `vectors` the unit embeddings of the images (n, D)."""
        keys: list[str] = []
        found = []
        for prepared in self._prepared(shard, None):
            keys += prepared.keys
            vectors = _unit(self.model.encode_image(torch.from_numpy(prepared.pixels))).float().numpy()
            vectors[~prepared.usable] = np.nan
            found.append(vectors)
        vectors = np.concatenate(found) if found else np.zeros((0, 1), np.float32)
        return {"samples": rows_of(keys), "vectors": vectors}

    def picture_vectors(self, images: Images) -> NDArray[np.float32]:
        """Returns the unit embeddings of evaluation images, float32 (E, D)."""
        return _unit(embed_images(self.model, images, batch_size=self.batch_size)).float().numpy()

    def _prepared(self, shard: str, caption_field: str | None) -> Iterator[Prepared]:
        samples = walked_samples(shard)

        def parts() -> Iterator[tuple[list[RawSample], Callable[[Image.Image], Tensor], str | None]]:
            while part := list(islice(samples, self.batch_size)):
                yield part, self.model.preprocess, caption_field

        yield from self.engine.map(prepare, parts())


@dataclass(frozen=True)
class Prepared:
    """A batch as the towers read it: uint8 (n, 3, H, V), captions, and which samples could be used."""

    keys: list[str]
    pixels: NDArray[np.uint8]
    captions: list[str]
    usable: NDArray[np.bool_]


def prepare(
    samples: list[RawSample], preprocess: Callable[[Image.Image], Tensor], caption_field: str | None
) -> Prepared:
    """Returns the batch of these samples; what cannot be used is a white picture with an empty caption."""
    if multiprocessing.parent_process() is not None:
        # A forked worker has no threads of the parent's pool, and would wait for them.
        torch.set_num_threads(1)
    pixels, captions, usable = [], [], []
    blank = Image.new("RGB", (8, 8), (255, 255, 255))
    for sample in samples:
        image, text, good = blank, "", True
        try:
            text = "" if caption_field is None else caption(sample, caption_field)
            image = decode_image(image_bytes(sample))
        except Unusable:
            text, good = "", False  # its score is NaN
        pixels.append(preprocess(image).numpy())
        captions.append(text)
        usable.append(good)
    return Prepared(
        [sample.key for sample in samples], np.stack(pixels), captions, np.array(usable, dtype=np.bool_)
    )


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.detach().double().cpu(), dim=1)
