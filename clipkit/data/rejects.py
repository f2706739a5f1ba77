"""Unusable samples: how each is recorded, and how many a run tolerates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipkit.data.sample import Unusable
from clipkit.redaction import redact
from clipkit.types import DataError, Reject

SAMPLES_BEFORE_FRACTION = 1000
LOST_CHUNK = "lost chunk"


def reject(key: str, shard: str, problem: Unusable, slot: int, substitute: str) -> Reject:
    """Returns the record of a sample that could not be used, in text that every file can hold."""
    # Names of members and folders need not be UTF-8; a strict writer would end the run at every resume.
    key, shard, reason, detail, substitute = (
        text.encode("utf-8", "backslashreplace").decode()
        for text in (key, redact(shard), problem.reason, redact(problem.detail), substitute)
    )
    return Reject(key, shard, reason, detail, slot, substitute)


class RejectBudget:
    """Counts the rejects of all ranks and raises DataError when there are too many.

    The fraction is compared once 1,000 samples were seen and at every epoch end, so that one bad file does
    not stop a small set at its first batch; rejects in a row are compared always. Chunks that could not be
    read have a limit of their own, and their samples count for neither of these.
    """

    def __init__(self, max_fraction: float, max_consecutive: int, max_lost_chunks: int = 0) -> None:
        self.max_fraction = max_fraction
        self.max_consecutive = max_consecutive
        self.max_lost_chunks = max_lost_chunks
        self.lost_chunks: set[tuple[str, str]] = set()
        self.rejected = 0
        self.samples = 0
        self._run = 0
        self._run_end = -1
        self._first = ""

    def add(self, rejects: Sequence[Reject], samples: int) -> None:
        """Counts one global batch: its rejects over all ranks and its number of samples."""
        self.samples += samples
        self.lost_chunks |= {(lost.shard, lost.detail) for lost in rejects if lost.reason == LOST_CHUNK}
        if len(self.lost_chunks) > self.max_lost_chunks:
            raise DataError(
                f"{len(self.lost_chunks)} chunks are lost, data.max_lost_chunks={self.max_lost_chunks} "
                f"allowed; one of them: {': '.join(min(self.lost_chunks))}",
                "check the storage, then start the same command again; or raise data.max_lost_chunks",
            )
        rejects = [reject for reject in rejects if reject.reason != LOST_CHUNK]
        self.rejected += len(rejects)
        for reject in sorted(rejects, key=lambda entry: entry.slot):
            self._first = self._first or f"{reject.key} in {reject.shard} ({reject.reason}: {reject.detail})"
            self._run = self._run + 1 if reject.slot in (self._run_end, self._run_end - 1) else 1
            self._run_end = reject.slot + 1
            if self._run >= self.max_consecutive:
                raise self._error(f"{self._run} unusable samples in a row", "data.max_consecutive")
        if self.samples >= SAMPLES_BEFORE_FRACTION:
            self._check_fraction()

    def end_of_epoch(self) -> None:
        """Compares the fraction, however few samples there were."""
        self._run_end = -1
        self._check_fraction()

    def _check_fraction(self) -> None:
        if self.rejected > self.max_fraction * self.samples:
            raise self._error(
                f"{self.rejected} of {self.samples} samples are unusable "
                f"({self.rejected / self.samples:.2%}, allowed {self.max_fraction:.2%})",
                "data.max_reject_fraction",
            )

    def _error(self, problem: str, key: str) -> DataError:
        return DataError(
            f"{problem}; the first: {self._first}",
            f"all are listed in rejects.jsonl in the run directory: repair or remove them, or raise {key}",
        )

    def state(self) -> dict[str, Any]:
        """Returns the JSON-able counts for a checkpoint."""
        return {
            "rejected": self.rejected,
            "samples": self.samples,
            "run": self._run,
            "run_end": self._run_end,
            "first": self._first,
            "lost_chunks": sorted(map(list, self.lost_chunks)),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the counts of a checkpoint."""
        self.rejected, self.samples = int(state["rejected"]), int(state["samples"])
        self._run, self._run_end = int(state["run"]), int(state["run_end"])
        self._first = str(state["first"])
        # Checkpoints of 0.1 hold no such list.
        self.lost_chunks = {(str(shard), str(detail)) for shard, detail in state.get("lost_chunks", ())}
