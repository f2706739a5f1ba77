"""From pictures in memory to a model that answers questions, with clipkit's Python names alone.

    python examples/python_api.py [FOLDER]

Draws flags of three stripes, packs them into one ordinary tar, trains two small towers for half a minute
on a CPU, and asks the exported model which words fit a flag it has never seen.
"""

from __future__ import annotations

import io
import itertools
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

import clipkit

COLOURS = {"red": (200, 20, 30), "white": (245, 245, 245), "blue": (20, 40, 160), "green": (0, 130, 60)}
UNSEEN = ("blue", "white", "red")


def flag(stripes: tuple[str, ...], size: int = 32) -> Image.Image:
    """Returns a flag of equal horizontal stripes."""
    image = Image.new("RGB", (size, size))
    for row, name in enumerate(stripes):
        top, bottom = row * size // len(stripes), (row + 1) * size // len(stripes)
        image.paste(COLOURS[name], (0, top, size, bottom))
    return image


def write_shard(path: Path, copies: int = 8) -> None:
    """Writes flag/caption pairs as members KEY.png and KEY.txt, which is all a shard is."""
    flags = [stripes for stripes in itertools.product(COLOURS, repeat=3) if stripes != UNSEEN]
    with tarfile.open(path, "w") as tar:
        for number, stripes in enumerate(flags * copies):
            picture = io.BytesIO()
            flag(stripes).save(picture, "png")
            caption = f"{stripes[0]} over {stripes[1]} over {stripes[2]}".encode()
            for extension, content in (("png", picture.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"{number:05d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main(folder: Path) -> str:
    """Returns the caption that the trained model finds for the unseen flag."""
    write_shard(folder / "flags.tar")
    run = clipkit.pretrain(
        {
            "model": {
                "embed_dim": 32,
                "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
                "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
            },
            "data": {
                "train": str(folder / "flags.tar"),
                "batch_size": 63,
                "workers": 0,
                "crop_scale": [1.0, 1.0],
            },
            "optim": {"lr": 2e-3, "warmup": 10},
            "run": {"dir": str(folder / "run"), "steps": 120, "log_every": 20, "weight_ema": False},
        }
    )
    model = clipkit.load(run["export"])
    captions = [" over ".join(order) for order in itertools.permutations(UNSEEN)]
    scores = model.encode_image([flag(UNSEEN)]) @ model.encode_text(captions).T
    for caption, score in zip(captions, scores[0].tolist(), strict=True):
        print(f"{score:6.3f}  {caption}")
    return captions[int(scores[0].argmax())]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print("best:", main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch)))
