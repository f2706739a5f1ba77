"""Hashes of samples: exact ones of bytes, pixels and captions, and a perceptual one of pictures."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipkit.data.curation.rules import uid_at
from clipkit.data.curation.survey import Rows, rows_of
from clipkit.data.sample import RawSample, Unusable, caption, decode_image, image_bytes
from clipkit.data.shards import normalize_caption
from clipkit.data.walked import walked_samples

EXACT = ("image", "pixels", "caption", "pair")
PHASH = "phash"
DIGEST = 16  # bytes: two of 10^12 samples share one by chance with probability 1e-15

_SIDE = 32  # pixels of the reduced picture
_LOW = 8  # of its lowest frequencies along each axis
# Standard deviation of the reduced picture, in grey levels, below which its frequencies are rounding noise.
_FLAT = 1.0


def exact_digest(sample: RawSample, by: str, field: str) -> bytes:
    """Returns 16 bytes that two samples share when they are duplicates by `by`. Raises Unusable.

    image    the bytes of the image member       pixels  the decoded picture, whatever its format
    caption  the caption, white space collapsed  pair    image bytes and caption
    """
    state = hashlib.blake2b(digest_size=DIGEST, person=by.encode())
    if by == "pixels":
        picture = decode_image(image_bytes(sample))
        state.update(f"{picture.width} {picture.height} ".encode())
        state.update(picture.tobytes())
    if by in ("image", "pair"):
        data = image_bytes(sample)
        state.update(f"{len(data)} ".encode())
        state.update(data)
    if by in ("caption", "pair"):
        state.update(normalize_caption(caption(sample, field)).encode())
    return state.digest()


def perceptual_hash(image: Image.Image) -> int | None:
    """Returns the 64-bit DCT hash of a picture, None for one without structure (a single colour).

    Grey, 32 x 32 (Lanczos), two-dimensional DCT-II, the 8 x 8 lowest frequencies, one bit each: above their
    median (Zauner 2010, as in the package ImageHash). Bit 63 is the constant frequency, then row by row.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64)
    if grey.std() < _FLAT:
        return None
    waves = _cosines()
    low = waves @ grey @ waves.T
    bits = low > np.median(low)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines() -> NDArray[np.float64]:
    """The first 8 rows of the DCT-II of length 32, unnormalised as scipy has it."""
    places = np.arange(_SIDE) + 0.5
    return 2 * np.cos(np.pi / _SIDE * np.arange(_LOW)[:, None] * places)


def fingerprint_shard(
    shard: str, kinds: Sequence[str], field: str, uid_field: str | None = None
) -> dict[str, Rows]:
    """Returns the rows of one shard: key, `reason` why a sample cannot be used, per kind its hash, and `uid`
    when its field is given.

    Exact kinds: 16 bytes each; phash: uint64 with `flat` where a picture has none.
    """
    keys: list[str] = []
    reasons: list[bytes] = []
    digests: dict[str, list[Any]] = {kind: [] for kind in kinds}
    flat: list[bool] = []
    uids = []
    for sample in walked_samples(shard):
        keys.append(sample.key)
        if uid_field is not None:
            uids.append(uid_at(sample, uid_field))
        row: dict[str, Any] = {}
        reason = b""
        try:
            for kind in kinds:
                if kind == PHASH:
                    row[kind] = perceptual_hash(decode_image(image_bytes(sample)))
                else:
                    row[kind] = exact_digest(sample, kind, field)
        except Unusable as error:
            reason, row = error.reason.encode()[:40], {}
        reasons.append(reason)
        flat.append(row.get(PHASH) is None)
        for kind in kinds:
            digests[kind].append(row.get(kind) or (0 if kind == PHASH else b""))
    columns: dict[str, NDArray[Any]] = {"reason": np.array(reasons, "S40")}
    if uid_field is not None:
        columns["uid"] = np.array(uids, np.uint64).reshape(-1, 2)
    for kind in kinds:
        if kind == PHASH:
            columns[kind] = np.array(digests[kind], np.uint64)
            columns["flat"] = np.array(flat, np.bool_)
        else:
            columns[kind] = np.array(digests[kind], f"S{DIGEST}").view(f"V{DIGEST}")
    return {"samples": rows_of(keys, **columns)}
