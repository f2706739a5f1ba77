"""Finite differences of a loss part of which is a constant on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What leaves the graph where gradients are on.
STOPS = frozenset(
    {Tensor.detach, Tensor.detach_, Tensor.data.__get__, Tensor.item, Tensor.tolist, Tensor.__float__}  # type: ignore[attr-defined]
)


class Held(TorchFunctionMode):
    """Remembers, in the order of the calls, what a computation detaches or computes under `no_grad`.

    The first computation under the mode is remembered; after `hold()` every further one gets the
    remembered values again, whatever its own inputs are. Backward computes the derivative of exactly that
    function. Raises RuntimeError when a further computation stops gradients in other places.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Any, Any]] = []
        self._next: int | None = None
        self._stopped = False

    def hold(self) -> None:
        """Starts a further computation with the remembered constants."""
        self._next = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Not torch.is_grad_enabled(): gradients are off inside an autograd.Function too, which has one.
        if func is torch._C._set_grad_enabled:
            self._stopped = not args[0]
            return func(*args)
        if not self._stopped and func not in STOPS:
            return func(*args, **(kwargs or {}))
        if self._next is None:
            value = func(*args, **(kwargs or {}))
            self._kept.append((func, value))
        else:
            known, value = self._kept[self._next] if self._next < len(self._kept) else (None, None)
            if known != func:
                raise RuntimeError("gradients stop in other places when the embeddings move a little")
            self._next += 1
        # A detached tensor may be written to later, with gradient; inside no_grad identity keeps writes.
        return value.clone() if isinstance(value, Tensor) and not self._stopped else value
