"""State that outlives a step: a queue of past embeddings, and a head that follows another one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from clipkit import dist


class FeatureQueue(nn.Module):
    """The last Q embeddings of all ranks, oldest overwritten first; persistent, equal on every rank.

    rows (Q, D), filled () and next () are buffers: a resumed run continues with the same queue. Slots that
    were never written are not shown, so that early negatives are not noise (arXiv:1911.05722 fills them at
    random).
    """

    rows: Tensor
    filled: Tensor
    next: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))
        self._stash: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """bool (Q,), True for slots that hold an embedding."""
        return torch.arange(len(self.rows), device=self.rows.device) < self.filled

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Returns {"queue_filled": share of the slots in use, "queue_age": age of the oldest in steps}, ().

        Called between `stash` and `push`: every step pushes as many rows as are stashed.
        """
        pushed = 0 if self._stash is None else len(self._stash)
        filled = self.filled.to(self.rows.dtype)
        return {"queue_filled": filled / len(self.rows), "queue_age": (filled / max(pushed, 1)).ceil()}

    @torch.no_grad()
    def stash(self, rows: Tensor) -> None:
        """Keeps this rank's rows (B, D) until `push`; a later stash replaces an earlier one."""
        self._stash = dist.gather(rows.detach())

    @torch.no_grad()
    def push(self) -> None:
        """Writes what was stashed behind the newest rows; without a stash does nothing."""
        if self._stash is None:
            return
        new, self._stash = self._stash[-len(self.rows) :], None
        at = (torch.arange(len(new), device=new.device) + self.next) % len(self.rows)
        self.rows[at] = new.to(self.rows.dtype)
        self.next.copy_((self.next + len(new)) % len(self.rows))
        self.filled.copy_(torch.clamp(self.filled + len(new), max=len(self.rows)))


class MomentumHead(nn.Module):
    """A frozen copy of a head that follows it: w <- m w + (1 - m) w_trained. Buffers are copied.

    Its BatchNorm layers use the statistics of the batch, as the head it follows does.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.copy = copy.deepcopy(head).requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Returns the head's output without gradient."""
        out: Tensor = self.copy(x)
        return out

    @torch.no_grad()
    def follow(self, head: nn.Module, momentum: float) -> None:
        """Moves this head towards `head`."""
        trained = dict(head.named_parameters())
        for name, parameter in self.copy.named_parameters():
            dist.own_rows(parameter).lerp_(dist.own_rows(trained[name]), 1 - momentum)
        buffers = dict(head.named_buffers())
        for name, buffer in self.copy.named_buffers():
            buffer.copy_(buffers[name])
