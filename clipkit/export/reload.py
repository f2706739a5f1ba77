"""The other side of `verify`: a fresh process that knows open_clip and nothing of clipkit.

Usage: python -P reload.py DIRECTORY WORK THREADS
Reads pictures.npz and captions.json in WORK, writes embeddings.npz there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image


def main(directory: str, work: str, threads: str) -> None:
    """Writes what open_clip makes of the pictures and captions."""
    torch.set_num_threads(int(threads))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{directory}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{directory}")
    model.eval()
    folder = Path(work)
    tokens = tokenizer(json.loads((folder / "captions.json").read_text(encoding="utf-8")))
    with np.load(folder / "pictures.npz", allow_pickle=False) as arrays:
        pictures = [Image.fromarray(arrays[name]) for name in arrays.files]
    with torch.no_grad():
        results = {
            "image": model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True),
            "text": model.encode_text(tokens, normalize=True),
            "tokens": tokens,
            "logit_scale": model.logit_scale,
        }
        if model.logit_bias is not None:
            results["logit_bias"] = model.logit_bias
        arrays = {name: x.numpy() for name, x in results.items()}
    np.savez(folder / "embeddings.npz", version=np.array(open_clip.__version__), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
