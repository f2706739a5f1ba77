"""Sharded training, `run.sharding: fsdp2`: each rank keeps its rows of every weight, gradient and moment.

torch's own `fully_shard`, not Accelerate's FullyShardedDataParallelPlugin: Accelerate 1.15 reads the plugin
on GPUs only (accelerate/state.py) and builds DDP on CPU ranks without a word, so no test without a GPU would
see it; and it shards in `prepare`, after the trial batch, for which the whole model had to fit on one device.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from clipkit.dist import World
from clipkit.learner import Learner
from clipkit.models.towers import Towers


def repeated(module: nn.Module) -> list[nn.Module]:
    """Returns the outermost repeated blocks inside a tower: transformer layers, or stages of a CNN."""
    found: list[nn.Module] = []
    for child in module.children():
        members = [member for member in child.children() if any(True for _ in member.parameters())]
        alike = len({type(member) for member in members}) == 1 < len(members)
        # Two linear maps in a row are alike too, but no blocks.
        blocks = alike and any(True for _ in members[0].children())
        found += members if blocks and isinstance(child, nn.ModuleList | nn.Sequential) else repeated(child)
    return found


def shard(learner: Learner, device: torch.device) -> None:
    """Moves a learner to `device` and leaves this rank's rows of its parameters there; all ranks call it.

    Before an optimizer is made of them. A unit, whose rows are gathered when it computes and dropped after,
    is a block of a tower; the rest of the averaged weights; and the rest of all. Buffers and fixed teachers
    stay whole on every rank. Weights are fp32 and autocast casts them, as under DDP: the same numbers, for
    gathers of twice the bytes of bf16 rows, and casts of the gathered weights that live until the backward.
    """
    mesh = init_device_mesh(device.type, (World.current().size,))

    def unit(module: nn.Module) -> None:
        # The root as well: it would stay gathered after an evaluation, while its averages are updated.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)

    for towers in [module for module in learner.modules() if isinstance(module, Towers)]:
        for part in (towers.clip.visual, towers.clip.text):
            for block in repeated(part):
                unit(block)
    if learner.ema is not None:
        # Gathered for evaluations only; `Towers` are entered by this method.
        unit(learner.ema.towers)
        register_fsdp_forward_method(learner.ema.towers, "embed")
    unit(learner)
    if learner.teachers is not None:
        for name in learner.teachers.described.keys() - learner.teachers.moving.keys():
            learner.teachers.towers_of(name).to(device)
