"""Weights and optimizer state by parameter name: checked as a whole before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.checkpoint.rows import Stored, rows_for
from clipkit.dist import own_rows
from clipkit.types import ClipkitError

Source = Tensor | Stored
Named = Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
SHOWN = 10


def _by_name(named: Named) -> dict[str, nn.Parameter]:
    return dict(named.items() if isinstance(named, Mapping) else named)


def optimizer_tensors(optimizer: Any, named_parameters: Named) -> dict[str, Tensor]:
    """Returns the optimizer's state as `parameter_name.state_key` -> tensor (`...weight.exp_avg`).

    Names survive what indices do not (another freeze, another order of groups). Learning rates and the
    like are functions of the step and are not part of it. `named_parameters` must name every parameter
    of the optimizer that has state; names of others do no harm.
    """
    names = {parameter: name for name, parameter in _by_name(named_parameters).items()}
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if value is None:
                    continue
                if not isinstance(value, Tensor):
                    raise TypeError(f"optimizer state {key!r} is a {type(value).__name__}, not a tensor")
                tensors[f"{names[parameter]}.{key}"] = value.detach()
    return tensors


def load_optimizer_tensors(optimizer: Any, named_parameters: Named, tensors: Mapping[str, Source]) -> None:
    """Sets the optimizer's state to `tensors` of `optimizer_tensors`, by name.

    A parameter without entries gets no state, as it had none when it was saved. Raises ClipkitError naming
    the first entries that fit no parameter of this optimizer; then nothing has been changed.
    """
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: p for name, p in _by_name(named_parameters).items() if p in groups}
    states: dict[nn.Parameter, dict[str, Tensor]] = {}
    problems: list[str] = []
    for entry, value in tensors.items():
        name, _, key = entry.rpartition(".")
        parameter = named.get(name)
        if parameter is None:
            problems.append(f"{entry} (no such parameter is trained)")
        elif len(value.shape) > 0 and tuple(value.shape) != tuple(parameter.shape):
            problems.append(f"{entry} {tuple(value.shape)} (the parameter is {tuple(parameter.shape)})")
        else:
            states.setdefault(parameter, {})[key] = _placed(value, key, parameter, groups[parameter])
    _refuse(problems, "the optimizer state of the checkpoint does not fit")
    for parameter in groups:
        optimizer.state.pop(parameter, None)
        if parameter in states:
            optimizer.state[parameter] = states[parameter]


def _placed(source: Source, key: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    if key == "step" or len(source.shape) == 0:
        value = source if isinstance(source, Tensor) else source.read()
        # torch keeps step counts on the CPU unless the kernel itself reads them.
        on_device = bool(group.get("capturable") or group.get("fused"))
        return value.to(parameter.device if on_device else "cpu", copy=True)
    rows = rows_for(source, parameter)
    placed = torch.empty_like(parameter, dtype=rows.dtype, requires_grad=False)
    own_rows(placed).copy_(rows)
    return placed


def load_module_tensors(module: nn.Module, tensors: Mapping[str, Source]) -> None:
    """Copies `tensors` into the module's parameters and buffers, of sharded ones the rows of this rank.

    Raises ClipkitError naming the first missing, unexpected and differently shaped names; then nothing has
    been changed (torch's own strict loading changes what fits before it raises).
    """
    own = module.state_dict()
    problems = [f"{name} is missing in the checkpoint" for name in own if name not in tensors]
    problems += [f"{name} is not in this model" for name in tensors if name not in own]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} in the checkpoint and {tuple(value.shape)} in this model"
        for name, value in own.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(value.shape)
    ]
    _refuse(problems, "the checkpoint is of another model")
    for name, value in own.items():
        own_rows(value).copy_(rows_for(tensors[name], value))


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ClipkitError(
            f"{what}: {'; '.join(problems[:SHOWN])}{more}",
            "use the config that wrote the checkpoint, or another run.dir",
        )
