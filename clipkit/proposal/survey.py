"""What can be said of the sample: captions, images, and which fields hold what."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from clipkit.data.describing.scripts import script_of
from clipkit.data.sample import RawSample, Unusable, decode_image, image_bytes
from clipkit.data.tables import CAPTION_COLUMNS
from clipkit.data.walked import walked_samples
from clipkit.proposal.sampling import Sampled
from clipkit.types import DataError

COUNTED = 512  # tokens of a caption that are counted at most
_DECODED = 256  # images that are decoded, not only their headers
TEXT = "txt"


@dataclass
class FieldFacts:
    """The captions of one field: samples that have it, words and tokens of each caption, their scripts."""

    present: int = 0
    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def words(self) -> list[int]:
        """Words of every caption."""
        return [len(text.split()) for text in self.texts]

    def longer(self, tokens: int) -> float:
        """Returns the share of captions with more than so many tokens, start and end included."""
        return sum(count > tokens for count in self.tokens) / max(1, len(self.tokens))

    def scripts(self) -> Counter[str]:
        """Returns the captions by the script of most of their letters."""
        return Counter(map(script_of, self.texts))


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data.

    pairs     how many there are; exact: counted, otherwise an estimate
    looked    how many of them were looked at; unusable: how many of those have a fault, by reason
    captions  the fields that hold the captions
    fields    every field of text that was found, in order of presence
    distinct  (distinct captions, captions compared)
    sides     shorter side of every image in pixels
    """

    pairs: int
    exact: bool
    looked: int
    unusable: Counter[str]
    captions: tuple[str, ...]
    fields: dict[str, FieldFacts]
    distinct: tuple[int, int]
    sides: list[int]
    formats: Counter[str]


def at(values: Sequence[int], share: float) -> int:
    """Returns the value that so large a share does not exceed, 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def survey(folder: Path, sampled: Sampled, source: str) -> DataFacts:
    """Returns what the shards in `folder` hold. Raises DataError when they hold no captioned images."""
    fields: dict[str, FieldFacts] = {}
    sides: list[int] = []
    formats: Counter[str] = Counter()
    unusable = Counter(sampled.rejected)
    looked = 0
    members: Counter[str] = Counter()
    for looked, sample in enumerate(_samples(folder), 1):
        members.update(sample.members.keys())
        for name, texts in _texts(sample).items():
            facts = fields.setdefault(name, FieldFacts())
            facts.present += 1
            facts.texts += texts
        try:
            kind, side = _looked_at(image_bytes(sample), decode=looked <= _DECODED)
        except Unusable as error:
            unusable[error.reason] += 1
            continue
        formats[kind] += 1
        sides.append(side)
    fields = dict(sorted(fields.items(), key=lambda item: -item[1].present))
    captions = sampled.captions or _chosen(fields, looked)
    if not captions or not sides:
        raise DataError(
            f"{source}: no {'captions' if sides else 'images'} in {looked:,} samples (members: "
            f"{', '.join(f'.{name} in {count:,}' for name, count in members.most_common(6))})",
            "samples are KEY.jpg (png, webp, gif, bmp) with KEY.txt or a text in KEY.json",
        )
    _count_tokens(fields)
    first = fields.get(captions[0], FieldFacts()).texts
    return DataFacts(
        pairs=sampled.pairs,
        exact=sampled.exact,
        looked=looked + sampled.rejected.total(),
        unusable=unusable,
        captions=captions,
        fields=fields,
        distinct=sampled.distinct or (len(set(first)), len(first)),
        sides=sides,
        formats=formats,
    )


def _samples(folder: Path) -> Iterator[RawSample]:
    for shard in sorted(folder.glob("*.tar")):
        yield from walked_samples(str(shard))


def _texts(sample: RawSample) -> dict[str, list[str]]:
    """The texts of a sample by field: its text member, and what its JSON holds under one name."""
    found: dict[str, list[str]] = {}
    plain = sample.member(TEXT)
    if plain is not None and plain.strip():
        found[TEXT] = [plain.decode("utf-8", "replace")]
    try:
        document = json.loads(sample.member("json") or b"null")
    except (ValueError, RecursionError):
        document = None  # training rejects such a sample only where a field of it is asked for
    for name, value in document.items() if isinstance(document, dict) else ():
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if any(text.strip() for text in texts):
            found[f"json.{name}"] = texts
    return found


def _chosen(fields: dict[str, FieldFacts], looked: int) -> tuple[str, ...]:
    """The field of captions: the text members, or what has a caption's name in JSON."""
    known = [TEXT, *(f"json.{name}" for name in CAPTION_COLUMNS)]
    for name in known:
        if name in fields and fields[name].present * 2 > looked:
            return (name,)
    return tuple(name for name in known if name in fields)[:1]


def _looked_at(content: bytes, decode: bool) -> tuple[str, int]:
    """Returns format and shorter side of an image. Raises Unusable."""
    if decode:
        decode_image(content)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return str(image.format), min(image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unusable("bad image", type(error).__name__) from None


def _count_tokens(fields: dict[str, FieldFacts]) -> None:
    from clipkit.models.tokenizer import BytePairTokenizer

    tokenizer = BytePairTokenizer(COUNTED)
    for facts in fields.values():
        if facts.texts:
            facts.tokens = tokenizer(facts.texts).ne(tokenizer.pad_id).sum(1).tolist()
