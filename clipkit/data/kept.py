"""Which samples of an index are trained on: all of them, or those that are not held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from clipkit.data.order import Ids
from clipkit.data.tar_index import Index


@dataclass(frozen=True, eq=False)
class Kept:
    """The samples of an index without those held out, numbered 0..num_samples-1 in its order: their ranks.

    held  ids of the samples that are left out, ascending; a look-up is a binary search in them
    """

    index: Index
    held: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @cached_property
    def counts(self) -> Ids:
        """(S,), kept samples of each shard."""
        if not len(self.held):
            return self.index.counts
        found: Ids = np.diff(self.first_rank)
        return found

    @cached_property
    def num_samples(self) -> int:
        return self.index.num_samples - len(self.held)

    @cached_property
    def first_rank(self) -> Ids:
        """(S + 1,), rank of the first kept sample of each shard."""
        found: Ids = self.index.first_id - np.searchsorted(self.held, self.index.first_id)
        return found

    @cached_property
    def _kept_before(self) -> Ids:
        """(H,), kept samples before each one that is held out."""
        return self.held - np.arange(len(self.held))

    def ids(self, ranks: Ids) -> Ids:
        """Returns the ids of the samples of these ranks, in an array of the same shape."""
        if not len(self.held):
            return ranks
        found: Ids = ranks + np.searchsorted(self._kept_before, ranks, side="right")
        return found

    def rank(self, sample: int) -> int:
        """Returns the rank of a kept sample, or of the first kept one after it."""
        return sample - int(np.searchsorted(self.held, sample))

    @cached_property
    def sha(self) -> str | None:
        """The identity of the samples that are held out, None for none."""
        if not len(self.held):
            return None
        return hashlib.blake2b(self.held.astype("<i8").tobytes(), digest_size=16).hexdigest()
