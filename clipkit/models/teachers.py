"""Towers that are read and never trained: moving averages of the trained ones, and fixed models."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.dist import own_rows
from clipkit.models.towers import Towers
from clipkit.types import Teacher

PART = {"image": "visual", "text": "text"}


def moving_copy(source: Towers, parts: set[str]) -> Towers:
    """Returns a frozen copy of `source` in evaluation mode; towers outside `parts` are left out of it."""
    towers = copy.deepcopy(source).requires_grad_(False)
    towers.frozen = {"image": "", "text": ""}
    for part, name in PART.items():
        if part not in parts:
            setattr(towers.clip, name, nn.Identity())
    return towers.eval()


class Teachers(nn.Module):
    """All teachers of a run, always in evaluation mode and without gradient; BatchNorm buffers are copied.

    Moving averages are part of the state dict. Fixed models are not: every checkpoint would carry them again.
    """

    def __init__(self, described: Sequence[tuple[Teacher, Towers]]) -> None:
        super().__init__()
        self.described = {teacher.name: teacher for teacher, _ in described}
        self.moving = nn.ModuleDict(
            {teacher.name: towers for teacher, towers in described if teacher.momentum is not None}
        )
        fixed = {teacher.name: towers for teacher, towers in described if teacher.momentum is None}
        for towers in fixed.values():
            towers.requires_grad_(False)
        # Around nn.Module.__setattr__: registered, they would enter state dict, wrapper and averages.
        self.__dict__["fixed"] = fixed
        self.train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for towers in self.__dict__["fixed"].values():
            towers._apply(fn)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Teachers:
        """Stays in evaluation mode, whatever `mode` says."""
        super().train(False)
        for towers in self.__dict__.get("fixed", {}).values():
            towers.train(False)
        return self

    def towers_of(self, name: str) -> Towers:
        """Returns the towers of one teacher."""
        if name in self.moving:
            towers = self.moving[name]
            assert isinstance(towers, Towers)
            return towers
        found: Towers = self.__dict__["fixed"][name]
        return found

    @property
    def fixed_towers(self) -> dict[str, Towers]:
        """Returns name -> towers of the fixed models."""
        return dict(self.__dict__["fixed"])

    def scales(self) -> dict[str, Tensor]:
        """Returns the exponentiated temperature of every teacher, (1,)."""
        return {name: self.towers_of(name).logit_scale.detach().exp() for name in self.described}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Name of every fixed model -> SHA-256 of its weights: what a continued run must find again."""
        found = {}
        for name, towers in self.fixed_towers.items():
            digest = hashlib.sha256()
            for key, x in sorted(towers.state_dict().items()):
                digest.update(key.encode())
                digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            found[name] = digest.hexdigest()
        return found

    @torch.no_grad()
    def embed(self, images: dict[str, Tensor], texts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns {"teacher.<name>.trunk.<view>": (B, F), "teacher.<name>.joint.<view>": (B, D)}.

        A view `image@<name>`, in the teacher's own size or vocabulary, takes the place of `image`.
        """
        found: dict[str, Tensor] = {}
        for name, teacher in self.described.items():
            own = [
                {view: x.get(f"{view}@{name}", x.get(view)) for view in teacher.views}
                for x in (images, texts)
            ]
            present = [{view: x for view, x in part.items() if x is not None} for part in own]
            embedded = self.towers_of(name).embed(*present)
            found |= {f"teacher.{name}.{key}": x for key, x in embedded.items()}
        return found

    @torch.no_grad()
    def follow(self, source: Towers, progress: float) -> None:
        """Moves every average towards `source`, with the momentum of its schedule at `progress` 0..1."""
        trained, buffers = dict(source.named_parameters()), dict(source.named_buffers())
        for name in self.moving:
            teacher, towers = self.described[name], self.towers_of(name)
            assert teacher.momentum is not None
            averaged = dict(towers.named_parameters())
            torch._foreach_lerp_(
                [own_rows(x) for x in averaged.values()],
                [own_rows(trained[key]) for key in averaged],
                1 - teacher.momentum_at(progress),
            )
            for key, buffer in towers.named_buffers():
                buffer.copy_(buffers[key])
