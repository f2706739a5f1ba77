"""Copies training shards and stores a teacher's embeddings in every sample (reinforced data).

    python examples/store_teacher.py MODEL SHARDS OUT

MODEL is what `clipkit zeroshot` takes; SHARDS a folder of tars with pictures and .txt captions. Adds the
members KEY.teacher_image.npy and KEY.teacher_text.npy (float16), which configs/reinforced.yaml distils from:
the teacher is paid for once, however many students and epochs follow (arXiv:2311.17049).
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import clipkit

BATCH = 64
PICTURES = ("jpg", "jpeg", "png", "webp")
Member = tuple[tarfile.TarInfo, bytes]


def samples(shard: Path) -> Iterator[dict[str, Member]]:
    """Yields extension -> member of every sample: consecutive members with one name up to the first dot."""
    with tarfile.open(shard) as tar:
        found = ((member, tar.extractfile(member)) for member in tar if member.isfile())
        members = ((member, stream.read()) for member, stream in found if stream is not None)
        for _, group in groupby(members, key=lambda member: member[0].name.partition(".")[0]):
            yield {member.name.partition(".")[2]: (member, content) for member, content in group}


def embedded(model: Any, batch: list[dict[str, Member]]) -> Iterator[dict[str, Member]]:
    """Yields the samples with the two members added."""
    pictures = [next(sample[kind][1] for kind in PICTURES if kind in sample) for sample in batch]
    sides = {
        "image": model.encode_image([Image.open(io.BytesIO(picture)) for picture in pictures]),
        "text": model.encode_text([sample["txt"][1].decode() for sample in batch]),
    }
    for row, sample in enumerate(batch):
        for side, rows in sides.items():
            buffer = io.BytesIO()
            np.save(buffer, rows[row].cpu().numpy().astype(np.float16))
            info = tarfile.TarInfo(sample["txt"][0].name.removesuffix("txt") + f"teacher_{side}.npy")
            info.size = len(buffer.getvalue())
            sample[f"teacher_{side}.npy"] = (info, buffer.getvalue())
        yield sample


def main(name: str, shards: Path, out: Path) -> int:
    """Writes the shards and returns the number of samples."""
    model, count = clipkit.load(name), 0
    out.mkdir(parents=True, exist_ok=True)
    for shard in sorted(shards.glob("*.tar")):
        half = out / f"{shard.name}.part"
        stream = samples(shard)
        with tarfile.open(half, "w") as tar:
            while batch := list(islice(stream, BATCH)):
                for sample in embedded(model, batch):
                    count += 1
                    for info, content in sample.values():
                        tar.addfile(info, io.BytesIO(content))
        half.rename(out / shard.name)  # a shard is whole or absent
    return count


if __name__ == "__main__":
    print(f"{main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])):,} samples")
