"""GlobalBatchNorm against nn.BatchNorm on one process and on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from clipkit.models import GlobalBatchNorm, build, convert_batchnorm
from clipkit.types import ConfigError
from tests.models.test_towers import IMAGE_TOWERS, model_cfg, pixels_for

ROWS = 6
SHAPES = {"heads": (ROWS, 5), "towers": (ROWS, 5, 3, 4)}


def layer_for(shape: tuple[int, ...], momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    layer = kind(5, momentum=momentum).double()
    nn.init.uniform_(layer.weight, 0.5, 2.0)
    nn.init.normal_(layer.bias)
    return layer


def full_batch(shape: tuple[int, ...]) -> Tensor:
    # A mean far from zero: the difference of squares would lose its digits here.
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 100


def two_steps(layer: nn.Module, x: Tensor, rank: int, world: int) -> dict[str, Any]:
    """Two training steps on this rank's rows, then evaluation; the loss is the mean over ranks."""
    rows = len(x) // world
    outputs = []
    mine = x[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    for step in range(2):
        y = layer(mine + step)
        (y.pow(3).sum() / len(x) * world).backward()
        outputs.append(y.detach())
    grads = [p.grad / world for p in layer.parameters()]
    layer.eval()
    with torch.no_grad():
        outputs.append(layer(mine))
    return {
        "outputs": outputs,
        "input_grad": mine.grad / world,
        "grads": grads,
        "buffers": {n: b.clone() for n, b in layer.named_buffers()},
    }


def on_rank(rank: int, world: int, shape: tuple[int, ...], momentum: float | None) -> dict[str, Any]:
    holder = nn.Sequential(layer_for(shape, momentum))
    assert convert_batchnorm(holder) == 1
    assert isinstance(holder[0], GlobalBatchNorm)
    return two_steps(holder[0], full_batch(shape), rank, world)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", SHAPES)
def test_one_process_equals_batchnorm_bit_for_bit(kind: str, momentum: float | None) -> None:
    ours = on_rank(0, 1, SHAPES[kind], momentum)
    theirs = two_steps(layer_for(SHAPES[kind], momentum), full_batch(SHAPES[kind]), 0, 1)
    for name in ("outputs", "grads"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))
    assert torch.equal(ours["input_grad"], theirs["input_grad"])
    assert all(torch.equal(ours["buffers"][n], b) for n, b in theirs["buffers"].items())


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_ranks_equal_the_whole_batch_in_value_gradient_and_statistics(
    run_ranks: Callable[..., list[Any]], kind: str, world: int
) -> None:
    whole = two_steps(layer_for(SHAPES[kind]), full_batch(SHAPES[kind]), 0, 1)
    ranks = run_ranks(world, on_rank, SHAPES[kind], 0.1)
    close = {"rtol": 1e-10, "atol": 1e-10}
    for step in range(3):
        joined = torch.cat([rank["outputs"][step] for rank in ranks])
        torch.testing.assert_close(joined, whole["outputs"][step], **close)
    torch.testing.assert_close(
        torch.cat([rank["input_grad"] for rank in ranks]), whole["input_grad"], **close
    )
    for number, expected in enumerate(whole["grads"]):
        torch.testing.assert_close(sum(rank["grads"][number] for rank in ranks), expected, **close)
    for name, expected in whole["buffers"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["buffers"][name], expected, **close)


def resnet_on_rank(rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(0)
    towers = build(model_cfg(IMAGE_TOWERS["timm_resnet"][0])).double().train()
    pixels = pixels_for(towers, 4)
    rows = len(pixels) // world
    joint = towers.image(pixels[rank * rows : (rank + 1) * rows])[1]
    target = torch.linspace(-1, 1, 4 * 16, dtype=torch.float64).view(4, 16)[rank * rows : (rank + 1) * rows]
    ((joint - target).square().sum() / 4).backward()
    named = [p.grad for p in towers.clip.visual.parameters()]
    return [joint.detach(), *(g for g in named if g is not None)]


def test_a_timm_resnet_tower_at_two_ranks_equals_the_whole_batch(run_ranks: Callable[..., list[Any]]) -> None:
    whole = resnet_on_rank(0, 1)
    ranks = run_ranks(2, resnet_on_rank)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), whole[0], rtol=1e-10, atol=1e-10)
    assert len(whole) > 40
    for number in range(1, len(whole)):
        summed = ranks[0][number] + ranks[1][number]
        torch.testing.assert_close(summed, whole[number], rtol=1e-8, atol=1e-10)


def test_a_converted_timm_layer_keeps_activation_and_state() -> None:
    torch.manual_seed(0)
    holder = nn.Sequential(BatchNormAct2d(5, act_layer=nn.PReLU), nn.ReLU())
    twin = copy.deepcopy(holder)
    assert convert_batchnorm(twin) == 1
    assert convert_batchnorm(twin) == 0
    assert list(twin.state_dict()) == list(holder.state_dict())
    x = torch.randn(4, 5, 3, 3)
    for mode in (True, False):
        assert torch.equal(twin.train(mode)(x), holder.train(mode)(x))


def test_under_autocast_the_type_of_the_input_is_kept() -> None:
    layer = GlobalBatchNorm(5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(4, 5, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_unknown_batchnorm_is_refused() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(ConfigError, match="Odd"):
        convert_batchnorm(nn.Sequential(Odd(3)))
