"""Duplicates: exact ones, near ones, and samples whose picture is in an evaluation set.

Of every group the first sample, in the order of the shards, stays. Near duplicates are connected components:
a chain of similar pictures is one group, even where its ends differ by more than the bound. Each kind looks
at every sample, so one goes too when what it duplicates goes for another kind; what an evaluation set holds
goes first and is in no group.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipkit.data.curation.evaluation import Evaluation
from clipkit.data.curation.groups import Components, Numbers, repeated, similar_pairs, similar_to
from clipkit.data.curation.hashes import PHASH
from clipkit.data.curation.selection import (
    UNUSABLE,
    unusable_rows,
)
from clipkit.data.curation.similar import (
    join_similar,
    open_vectors,
    similar_rows,
    unit_rows,
)
from clipkit.data.curation.survey import Survey, key_of
from clipkit.data.curation.tables import shard_labels, written_lines
from clipkit.data.tar_index import replacing

_TOGETHER = 1 << 20  # samples, about
HASHES, VECTORS = "hashes", "vectors"
EMBEDDING, EVALUATION = "embedding", "evaluation"


@dataclass(frozen=True)
class Likeness:
    """What counts as a duplicate.

    exact       kinds of exact duplicates: image, pixels, caption, pair
    phash       whether perceptual hashes are compared: at most `distance` of 64 bits differ
    cosine      of embeddings at least this; None: no embeddings. neighbours: the nearest that are looked at
    """

    exact: tuple[str, ...]
    phash: bool = False
    distance: int = 4
    cosine: float | None = None
    neighbours: int = 32

    @property
    def hashes(self) -> tuple[str, ...]:
        """The hashes that the survey takes of every sample."""
        return (*self.exact, *((PHASH,) if self.phash else ()))


class DuplicateVerdicts:
    """Which samples are duplicates, and of which. What is known of each sample lies in files, 10 bytes each;
    near duplicates hold some 50 bytes per sample in memory, and embeddings the index.
    """

    def __init__(
        self,
        survey: Survey,
        likeness: Likeness,
        *,
        within: Sequence[str],
        evaluation: Evaluation | None = None,
        embeddings: Path | None = None,
    ) -> None:
        """within: the kinds by which the set is compared with itself; evaluation: what it is compared with
        besides; embeddings: a .npy file in place of surveyed vectors.
        """
        self._survey, self._likeness = survey, likeness
        self._keys = functools.lru_cache(maxsize=64)(lambda number: survey.rows(HASHES, number)["key"])
        self.rules = (
            *likeness.exact,
            *(kind for kind in (PHASH, EMBEDDING) if kind in within),
            *((EVALUATION,) if evaluation is not None else ()),
            UNUSABLE,
        )
        self.largest: dict[str, int] = {}  # samples of the largest group, by kind of near duplicates
        counts = survey.counts(HASHES)
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._labels = shard_labels(survey.shards)
        total = int(self._starts[-1])
        self._given = None if embeddings is None else open_vectors(embeddings, total)
        self._bits = self._table("bits", np.uint16, total)
        self._owner = self._table("owner", np.int64, total)
        self._owner[:] = -1
        self._gone = np.uint16(0)  # rules whose samples are in no group
        self.matches = 0
        if evaluation is not None:
            self._evaluation_file = survey.work.place("evaluation.jsonl")
            self.matches = self._mark_evaluation(evaluation)
            # What goes for that must not be what another sample of its group goes for.
            self._gone = np.uint16(1 << self.rules.index(EVALUATION))
        for kind in likeness.exact:
            for numbers, firsts in repeated(self._digests(kind), total, survey.work.place("buckets").parent):
                self._mark(kind, numbers, firsts)
        if PHASH in within:
            self._mark_similar_hashes()
        if EMBEDDING in within:
            assert likeness.cosine is not None
            components = Components(total)
            join_similar(components, self.vectors, likeness.cosine, likeness.neighbours)
            self._mark_components(EMBEDDING, np.arange(total), components.lowest())
        for number in range(len(survey.shards)):
            unusable = np.flatnonzero(unusable_rows(survey.rows(HASHES, number)))
            self._bits[unusable + self._starts[number]] = 1 << (len(self.rules) - 1)

    def _table(self, name: str, dtype: Any, size: int) -> NDArray[Any]:
        if not size:
            return np.zeros(0, dtype)
        path = self._survey.work.place(f"{name}.npy")
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(size,))

    def _usable(self, number: int) -> tuple[Numbers, Any]:
        places = np.flatnonzero(self._compared(number))
        return places + self._starts[number], self._survey.rows(HASHES, number)[places]

    def _compared(self, number: int) -> NDArray[np.bool_]:
        """Which samples of a shard may be the duplicate of another, bool (n,)."""
        gone = self._bits[self._starts[number] : self._starts[number + 1]] & self._gone
        return ~unusable_rows(self._survey.rows(HASHES, number)) & (gone == 0)

    def _digests(self, kind: str) -> Iterator[tuple[Numbers, NDArray[Any]]]:
        for number in range(len(self._survey.shards)):
            numbers, rows = self._usable(number)
            yield numbers, np.ascontiguousarray(rows[kind])

    def _mark(self, rule: str, numbers: Numbers, owners: Numbers) -> None:
        self._bits[numbers] |= np.uint16(1 << self.rules.index(rule))
        known = self._owner[numbers]
        self._owner[numbers] = np.where(known < 0, owners, known)

    def _mark_components(self, rule: str, numbers: Numbers, firsts: Numbers) -> None:
        later = np.flatnonzero(numbers != firsts)
        if len(later):
            self.largest[rule] = 1 + int(np.unique(firsts[later], return_counts=True)[1].max())
        self._mark(rule, numbers[later], firsts[later])

    def _hashed(self, number: int) -> tuple[Numbers, NDArray[np.uint64]]:
        numbers, rows = self._usable(number)
        structured = np.flatnonzero(~rows["flat"])
        return numbers[structured], np.asarray(rows[PHASH][structured])

    def _mark_similar_hashes(self) -> None:
        parts = [self._hashed(number) for number in range(len(self._survey.shards))]
        numbers = np.concatenate([part[0] for part in parts])
        hashes, first, place = np.unique(
            np.concatenate([part[1] for part in parts]), return_index=True, return_inverse=True
        )
        # By first appearance, so that the lowest of a component is its first sample.
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        components = Components(len(hashes))
        for left, right in similar_pairs(hashes[order], self._likeness.distance):
            components.join(left, right)
        firsts = numbers[first[order]][components.lowest()] if len(numbers) else numbers
        self._mark_components(PHASH, numbers, firsts[rank[place]])

    def vectors(self) -> Iterator[tuple[Numbers, NDArray[np.float32]]]:
        """Yields sample numbers and unit vectors, float32 (n, D), shard by shard, without unusable ones."""
        for number in range(len(self._survey.shards)):
            if self._given is None:
                vectors = self._survey.rows(VECTORS, number, "vectors")
            else:
                vectors = self._given[self._starts[number] : self._starts[number + 1]]
            unit = unit_rows(np.asarray(vectors))
            places = np.flatnonzero(self._compared(number) & np.isfinite(unit).all(axis=1))
            yield places + self._starts[number], unit[places]

    def _batches(self) -> list[list[int]]:
        """Shards that are compared together: each comparison sorts all that it is made with."""
        changes = np.flatnonzero(np.diff(self._starts[:-1] // _TOGETHER)) + 1
        return [batch.tolist() for batch in np.split(np.arange(len(self._survey.shards)), changes)]

    def _mark_evaluation(self, evaluation: Evaluation) -> int:
        """Marks what is in an evaluation set and writes every matching pair; returns their number."""
        likeness = self._likeness
        pictures = np.flatnonzero(evaluation.hashed)
        count = 0
        found: list[tuple[Numbers, Numbers, str, list[float]]]
        vectors = iter(()) if evaluation.vectors is None else self.vectors()
        with written_lines(self._evaluation_file) as write:
            for batch in self._batches():
                found = []
                if likeness.phash:
                    parts = [self._hashed(number) for number in batch]
                    numbers, hashes = (np.concatenate(each) for each in zip(*parts, strict=True))
                    mine, theirs = similar_to(hashes, evaluation.hashes[pictures], likeness.distance)
                    bits = np.bitwise_count(hashes[mine] ^ evaluation.hashes[pictures[theirs]])
                    found.append((numbers[mine], pictures[theirs], "distance", bits.tolist()))
                for numbers, own in islice(vectors, len(batch)):
                    assert evaluation.vectors is not None
                    assert likeness.cosine is not None
                    mine, theirs, cosines = similar_rows(own, evaluation.vectors, likeness.cosine)
                    found.append((numbers[mine], theirs, "cosine", cosines.tolist()))
                # A pair may match by both: it is one pair, and one line.
                pairs: dict[tuple[int, int], dict[str, float]] = {}
                for samples, others, name, values in found:
                    self._bits[samples] |= np.uint16(1 << self.rules.index(EVALUATION))
                    for sample, other, value in zip(samples.tolist(), others.tolist(), values, strict=True):
                        pairs.setdefault((sample, other), {})[name] = value
                count += len(pairs)
                for (sample, other), by in pairs.items():
                    write({**self._named(sample), "image": evaluation.name(other), **by})
        return count

    def _named(self, sample: int) -> dict[str, str]:
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        key = self._keys(number)[sample - int(self._starts[number])]
        return {"shard": self._labels[number], "key": key_of(key)}

    def bits(self, number: int) -> NDArray[np.uint16]:
        """Returns the broken rules of the samples of shard `number`, uint16 (n,)."""
        return np.array(self._bits[self._starts[number] : self._starts[number + 1]])

    def details(self, number: int, dropped: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Returns for each of these samples the first sample that it duplicates, if there is one."""
        owners = self._owner[self._starts[number] + dropped].tolist()
        return [{"same_as": self._named(owner)} if owner >= 0 else {} for owner in owners]

    def copy_matches(self, path: Path) -> None:
        """Writes the list of pairs of a sample and an evaluation image."""
        with self._evaluation_file.open("rb") as found, replacing(path) as out:
            shutil.copyfileobj(found, out)
