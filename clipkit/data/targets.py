"""What a sample carries for objectives besides image and caption: integer labels and stored vectors."""

from __future__ import annotations

import io
import re
import tokenize
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.order import hash_key
from clipkit.data.sample import Absent, RawSample, Unusable, field_value
from clipkit.types import DataError

MAX_WIDTH = 1 << 16
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,18})")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What NumPy's parser of a header, Python's own underneath, raises on damaged ones.
_HEADER_ERRORS = (
    ValueError, LookupError, TypeError, SyntaxError, AttributeError, MemoryError, RecursionError,
    OverflowError, tokenize.TokenError,
)  # fmt: skip

Vector = NDArray[np.float32]


def caption_label(text: str) -> int:
    """Returns 63 bits that are equal for captions equal up to case, white space and Unicode form (NFKC)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return hash_key("caption", " ".join(folded.split())) >> 1


def field_label(sample: RawSample, field: str) -> int:
    """Returns the label at `field`: a member ("cls") or a path into a JSON member ("json.category").

    Integers, written as a number or as text, are themselves; other text is hashed to 63 bits, exactly as
    written. Raises Unusable ("missing label", "bad label").
    """
    try:
        value: Any = field_value(sample, field, "label")
    except Absent as absent:
        raise Unusable("missing label", absent.detail) from None
    except Unusable as problem:
        raise Unusable("bad label", f"{problem.reason}: {problem.detail}") from None
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable("missing label", f"{field} is empty")
    if isinstance(value, str):
        value = value.strip()
        if not _INTEGER.fullmatch(value):
            return _hashed(value, field)
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        raise Unusable("bad label", f"{field} holds {type(value).__name__}, not an integer or text")
    if not -(1 << 63) <= value < 1 << 63:
        raise Unusable("bad label", f"{field} holds {value:.3g}, beyond 64 bits")
    return int(value)


def _hashed(text: str, field: str) -> int:
    try:
        return hash_key("label", text) >> 1
    except UnicodeEncodeError as error:
        raise Unusable("bad label", f"{field}: {error}") from None


def stored_vector(sample: RawSample, name: str, width: int | None = None) -> Vector:
    """Returns the vector of a .npy member, for example "teacher_image.npy": float32 (Dn,).

    Raises Unusable ("missing stored vector", "bad stored vector") unless it is one-dimensional, floating,
    finite and, if `width` is given, of this width. Never unpickles.
    """
    data = sample.member(name.lower())
    if data is None:
        raise Unusable("missing stored vector", f"no .{name}; members: {', '.join(sample.members)}"[:200])
    stored = npy_vector(data, f".{name}")
    if width is not None and len(stored) != width:
        raise _bad(f".{name}", f"{len(stored)} wide, others are {width}")
    with np.errstate(over="ignore"):
        vector = stored.astype(np.float32)
    if not np.isfinite(vector).all():
        raise _bad(f".{name}", "holds NaN or infinity")
    return vector


def npy_vector(data: bytes, name: str, kinds: str = "f") -> NDArray[Any]:
    """Returns the vector in the bytes of a .npy file, its type among `kinds` of numpy. Never unpickles.

    Raises Unusable ("bad stored vector"), with `name` in its detail.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        # np.load would allocate what the header claims before it looks at what there is.
        shape, _, dtype = _HEADERS[version](stream)
    except _HEADER_ERRORS as error:
        raise _bad(name, f"no .npy file of format 1 or 2 ({type(error).__name__})") from None
    if len(shape) != 1 or not 0 < shape[0] <= MAX_WIDTH or dtype.kind not in kinds:
        raise _bad(
            name, f"{dtype} of shape {shape}, not a vector of {'floats' if kinds == 'f' else 'numbers'}"
        )
    if len(data) - stream.tell() != shape[0] * dtype.itemsize:
        raise _bad(name, f"{len(data) - stream.tell()} bytes of values for {shape[0]} x {dtype}")
    found: NDArray[Any] = np.frombuffer(data, dtype, offset=stream.tell())
    return found


def stored_widths(samples: Iterable[RawSample], names: Sequence[str], limit: int) -> tuple[int, ...]:
    """Returns the width of each stored vector: that of the first usable one among `limit` samples.

    The same for every rank and worker, whatever they read first. Raises DataError when there is none.
    """
    widths: dict[str, int] = {}
    first: dict[str, str] = {}
    for sample in islice(samples, limit if names else 0):
        for name in names:
            if name in widths:
                continue
            try:
                widths[name] = len(stored_vector(sample, name))
            except Unusable as problem:
                first.setdefault(name, f"{sample.key}: {problem.reason}, {problem.detail}")
        if len(widths) == len(names):
            break
    for name in names:
        if name not in widths:
            raise DataError(
                f"none of the first samples holds a usable .{name} ({first.get(name, 'no sample')})",
                "write the stored vectors into the shards, or take out the objective that reads them",
            )
    return tuple(widths[name] for name in names)


def _bad(name: str, why: str) -> Unusable:
    return Unusable("bad stored vector", f"{name}: {why}"[:200])
