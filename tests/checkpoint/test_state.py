"""Optimizer state and weights by name: a resumed run takes bit for bit the steps of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clipkit.checkpoint import load_module_tensors, load_optimizer_tensors, optimizer_tensors
from clipkit.types import ClipkitError
from tests.checkpoint.children import save, single

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.98), weight_decay=0.2),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "plain": lambda groups: torch.optim.SGD(groups, lr=0.1),
}


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2)).to(dtype)
    net.register_parameter("log_scale", nn.Parameter(torch.tensor([2.0], dtype=dtype)))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def groups(net: nn.Module, *, turned: bool) -> list[dict[str, Any]]:
    parameters = list(net.parameters())
    if turned:
        return [{"params": parameters[::-1]}]
    return [{"params": parameters[:3]}, {"params": parameters[3:]}]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        data = torch.randn(6, 3, 4, 4, dtype=next(net.parameters()).dtype)
        optimizer.zero_grad()
        (net(data).square().mean() * net.log_scale.exp()).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_takes_the_same_steps(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    net = network(0, dtype)
    optimizer = OPTIMIZERS[name](groups(net, turned=False))
    train(net, optimizer, range(3))
    state = optimizer_tensors(optimizer, net.named_parameters())
    save(single(tmp_path), 3, tensors={"model": net.state_dict(), "optimizer": state})
    train(net, optimizer, range(3, 6))

    found = single(tmp_path).newest()
    assert found is not None
    other = network(1, dtype)
    # Another order of parameters and groups: indices would mix up the moments.
    resumed = OPTIMIZERS[name](groups(other, turned=True))
    train(other, resumed, range(1))
    load_module_tensors(other, found.tensors("model"))
    load_optimizer_tensors(resumed, dict(other.named_parameters()), found.tensors("optimizer"))
    train(other, resumed, range(3, 6))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in other.state_dict().items())
    again = optimizer_tensors(resumed, other.named_parameters())
    wanted = optimizer_tensors(optimizer, net.named_parameters())
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)


def test_state_is_named_and_belongs_to_the_optimizer_afterwards() -> None:
    net = network(0)
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    assert optimizer_tensors(optimizer, net.named_parameters()) == {}
    train(net, optimizer, range(1))
    state = {
        key: value.clone() for key, value in optimizer_tensors(optimizer, net.named_parameters()).items()
    }
    assert {"0.weight.exp_avg", "log_scale.exp_avg_sq", "3.bias.step"} <= state.keys()
    kept = {key: value.clone() for key, value in state.items()}
    load_optimizer_tensors(optimizer, net.named_parameters(), state)
    train(net, optimizer, range(1, 3))
    assert all(torch.equal(state[key], kept[key]) for key in kept), "the caller's tensors are not trained on"


def test_a_parameter_that_had_no_state_has_none_after_loading() -> None:
    net = network(0)
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    train(net, optimizer, range(1))
    state = optimizer_tensors(optimizer, net.named_parameters())
    load_optimizer_tensors(
        optimizer,
        net.named_parameters(),
        {key: v for key, v in state.items() if not key.startswith("3.bias.")},
    )
    assert net[3].bias not in optimizer.state
    assert net[3].weight in optimizer.state


def test_state_that_does_not_fit_is_named_and_nothing_is_changed() -> None:
    net = network(0)
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    train(net, optimizer, range(2))
    before = {
        key: value.clone() for key, value in optimizer_tensors(optimizer, net.named_parameters()).items()
    }
    wrong = {key: torch.zeros_like(value) for key, value in before.items()}
    wrong["2.weight.exp_avg"] = torch.zeros(3, 3)
    wrong |= {f"gone.{number}.exp_avg": torch.zeros(1) for number in range(20)}
    with pytest.raises(ClipkitError, match=r"2\.weight\.exp_avg \(3, 3\).*gone\.0.*; and 11 more"):
        load_optimizer_tensors(optimizer, net.named_parameters(), wrong)
    after = optimizer_tensors(optimizer, net.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_state_that_is_no_tensor_is_refused() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.state[net.weight]["momentum_buffer"] = "text"
    with pytest.raises(TypeError, match="momentum_buffer"):
        optimizer_tensors(optimizer, net.named_parameters())


def test_weights_of_another_model_are_named_and_nothing_is_changed() -> None:
    net, before = network(0), network(0).state_dict()
    wrong = {key: torch.zeros_like(value) for key, value in before.items()}
    wrong["2.weight"] = torch.zeros(7, 16)
    wrong["extra"] = torch.zeros(1)
    del wrong["log_scale"]
    with pytest.raises(ClipkitError) as refused:
        load_module_tensors(net, wrong)
    assert "log_scale is missing in the checkpoint" in refused.value.cause
    assert "extra is not in this model" in refused.value.cause
    assert "2.weight is (7, 16) in the checkpoint and (5, 16) in this model" in refused.value.cause
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
