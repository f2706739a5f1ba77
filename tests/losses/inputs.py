"""Inputs of the loss tests, and one batch run as several ranks in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Collective = Callable[[Tensor], Tensor]
# (rows of this rank, place of the first of them, gather, mean over ranks) -> ()
Loss = Callable[[Mapping[str, Tensor], int, Collective, Collective], Tensor]


def unit_rows(count: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    """Unit vectors in float64."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


def pairs(count: int = 7, width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sets of unit vectors in float64."""
    both = unit_rows(2 * count, width, seed)
    return both[:count], both[count:]


def rotation(width: int, seed: int = 9) -> Tensor:
    """An orthogonal matrix in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


class _NotYetReached(Exception):
    """A rank asked for a collective of which the other ranks' part is not known yet."""


class _Rank:
    """Answers the collectives that are known, and stops at the first that is not."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.answers, self.asked = iter(known), ("", torch.empty(0))

    def _ask(self, kind: str, x: Tensor) -> Tensor:
        for answer in self.answers:
            return answer
        self.asked = (kind, x)
        raise _NotYetReached

    def gather(self, x: Tensor) -> Tensor:
        return self._ask("gather", x)

    def mean(self, x: Tensor) -> Tensor:
        return self._ask("mean", x)


def over_ranks(world: int | Sequence[int], rows: Mapping[str, Tensor], loss: Loss) -> Tensor:
    """Returns the mean over ranks of what each computes from its share of the rows, counted by its rows.

    world: the number of ranks with equal shares, or the rows of each. Ranks run one after the other and
    again from the start, each time one collective further. Autograd runs through the collectives, so the
    gradient in `rows` is that of the mean.
    """
    total = len(next(iter(rows.values())))
    shares = [total // world] * world if isinstance(world, int) else list(world)
    known: list[Tensor] = []

    def mean(parts: list[Tensor]) -> Tensor:
        weighted = [part * share for part, share in zip(parts, shares, strict=True)]
        return torch.stack(weighted).sum(0) / total

    while True:
        asked: list[tuple[str, Tensor]] = []
        values: list[Tensor] = []
        for number in range(len(shares)):
            rank = _Rank(known)
            share = {name: x.split(shares)[number] for name, x in rows.items()}
            try:
                values.append(loss(share, sum(shares[:number]), rank.gather, rank.mean))
            except _NotYetReached:
                asked.append(rank.asked)
        if not asked:
            return mean(values)
        kinds = {kind for kind, _ in asked}
        assert len(asked) == len(shares), "some ranks end before others: real ones would wait for ever"
        assert len(kinds) == 1, "ranks ask for different collectives"
        parts = [x for _, x in asked]
        known.append(torch.cat(parts) if kinds == {"gather"} else mean(parts))
