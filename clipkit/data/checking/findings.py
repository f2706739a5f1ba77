"""One thing that is wrong with a shard, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ERROR = "error"
NOTE = "note"

_WRITE_AGAIN = "download or write the shard again; --repair keeps what is whole"
_ONE_SAMPLE = "mend or remove this sample; --repair leaves it out"
_NAMES = "write one run of members per key, without dots in the key; --repair does"

# Kind of finding -> cure. Kinds of sample.Unusable are among them: the same words as in rejects.jsonl.
_CURES = {
    "unreadable": "bring the shard back, or correct the list",
    "empty file": "download or write the shard again",
    "not a tar": "download the shard again; gunzip it if it is compressed",
    "cut tar": _WRITE_AGAIN,
    "zeros": _WRITE_AGAIN,
    "bad header": _WRITE_AGAIN,
    "bad extended header": _WRITE_AGAIN,
    "size beyond the file": _WRITE_AGAIN,
    "torn member": _WRITE_AGAIN,
    "uncertain name": _WRITE_AGAIN,
    "changed": "check the shard while nothing writes to it",
    "not a file": "write the shard again with plain files only; --repair leaves this member out",
    "unsafe name": "write the shard again with names inside its folder; --repair leaves this member out",
    "no sample": "take the shard out of the list",
    "key used twice": _NAMES,
    "member twice": _NAMES,
    "dots in names": _NAMES,
    "missing image": "store the image as KEY.jpg, .png, .webp, .gif or .bmp; --repair leaves the sample out",
    "missing caption": "store the caption as KEY.txt, or name its field by --caption; --repair leaves it out",
    "too many pixels": "make the image smaller, or raise --max-pixels and data.max_pixels",
    "several frames": "training uses the first frame; store one if that is not meant",
    "much metadata": "re-encode the image without its EXIF, which costs storage and reading",
    "byte-order mark": "training removes it; write plain UTF-8",
    "upper-case extension": "training reads it as lower case; other readers may not",
    "phantom captions": "replace line separators inside captions by blanks: CLIP_benchmark splits there",
    "unread members": "training passes over them; remove what nobody reads",
    "bytes changed": "bring back the bytes that the manifest lists, or write the set and its manifest again",
    "wrong count": "correct the file that states the count, or bring the samples back",
    "changed after indexing": "if that was meant, run `clipkit index --verify` on the same shards",
    "missing shard": "bring the shard back, or write the list again",
    "number left out": "none needed after failed downloads; name the shards by a folder or glob",
    "key in several shards": "none needed to train; joins by key need keys of their own",
    "wrong label": "correct the label or classnames.txt; --repair leaves the sample out",
    "more findings": "mend these first, then check again",
}


@dataclass(frozen=True)
class Finding:
    """One finding: `shard` and, where it has one, the member concerned (of a header that cannot be read the
    last member before it) and the byte of the header where it was met.
    """

    shard: str
    kind: str
    detail: str
    member: str = ""
    byte: int | None = None
    severity: str = ERROR

    @property
    def cure(self) -> str:
        """What to do about it."""
        return cure_of(self.kind)

    def record(self) -> dict[str, Any]:
        """Returns the finding as JSON-able text that every file can hold."""
        values = {**asdict(self), "cure": self.cure}
        return {name: writable(value) if isinstance(value, str) else value for name, value in values.items()}


def writable(text: str) -> str:
    """Returns the text with what is no UTF-8 (names of files and members need not be) as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def of_record(record: dict[str, Any]) -> Finding:
    """Returns the finding of a record."""
    return Finding(**{name: value for name, value in record.items() if name != "cure"})


def cure_of(kind: str) -> str:
    """Returns what to do about findings of a kind."""
    return _CURES.get(kind, _ONE_SAMPLE)
