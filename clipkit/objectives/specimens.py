"""Objectives on random embeddings: what the suite feeds them, and a few steps of plain descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit import dist
from clipkit.objectives.base import Objective, Widths
from clipkit.types import Embeddings, TeacherEmbeddings

ROWS = 12  # divides by 1, 2 and 3 ranks
STEPS = 3
WIDTHS = Widths({"image": 10, "text": 8}, 6, frozenset({"image", "text"}))
STORED_WIDTH = 6
Maker = Callable[[], Objective]


def make(maker: Maker) -> Objective:
    """Returns the objective in float64 and training mode, built for WIDTHS; the same on every rank."""
    torch.manual_seed(3)
    objective = maker()
    objective.build(WIDTHS)
    return objective.double().train()


def warmed(maker: Maker) -> Objective:
    """Returns the objective after STEPS steps: queues hold rows and prototypes exist, as in a run."""
    objective = make(maker)
    for number in range(STEPS):
        descend(objective, number, 0, 1)
    return objective


def in_single(maker: Maker, wide: Objective) -> Objective:
    """Returns the objective in fp32 with the state of `wide`."""
    objective = make(maker).float()
    objective.load_state_dict(wide.state_dict())
    return objective


def specimen(objective: Objective, number: int, rows: int = ROWS) -> dict[str, Tensor]:
    """Returns random leaves, one per thing that the objective may read, (rows, ...) each, in float64.

    Only these are there: an objective that reads what it does not declare fails with a KeyError.
    """
    generator = torch.Generator().manual_seed(1000 + number)

    def draw(width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    leaves: dict[str, Tensor] = {}
    needs = objective.needs
    towers = {view.name: view.tower for view in needs.views}
    for view in needs.views:
        leaves[f"trunk.{view.name}"] = draw(WIDTHS.trunk[view.tower])
        leaves[f"joint.{view.name}"] = draw(WIDTHS.joint)
        if view.optional:
            leaves[f"present.{view.name}"] = torch.rand(rows, generator=generator) < 0.7
    for teacher in needs.teachers:
        for name in teacher.views:
            leaves[f"teacher.{teacher.name}.trunk.{name}"] = draw(WIDTHS.trunk[towers[name]])
            leaves[f"teacher.{teacher.name}.joint.{name}"] = draw(WIDTHS.joint)
    for name in needs.stored:
        leaves[f"stored.{name}"] = draw(STORED_WIDTH)
    for name in needs.labels:
        # Every label twice and far apart, so that equal labels meet across ranks.
        leaves[f"labels.{name}"] = torch.arange(rows) % (rows // 2)
    return leaves


def trained(name: str) -> bool:
    """Returns whether gradients flow into the leaf `name`."""
    return name.startswith(("trunk.", "joint."))


def normalised(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the leaves with joint embeddings on the sphere, as the towers put them."""
    return {name: normalize(x, dim=-1) if "joint." in name else x for name, x in leaves.items()}


def embeddings_of(objective: Objective, leaves: Mapping[str, Tensor], progress: float) -> Embeddings:
    """Returns what the Learner would hand over of these leaves, which it takes as they are."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: x for name, x in leaves.items() if name.startswith(prefix)}

    scale = objective.scale
    some = next(x for x in leaves.values() if x.is_floating_point())
    return Embeddings(
        trunk=part("trunk."),
        joint=part("joint."),
        stored=part("stored."),
        labels=part("labels."),
        present=part("present."),
        teachers={
            teacher.name: TeacherEmbeddings(
                part(f"teacher.{teacher.name}.trunk."),
                part(f"teacher.{teacher.name}.joint."),
                some.new_full((1,), 20.0),
            )
            for teacher in objective.needs.teachers
        },
        logit_scale=some.new_full((1,), math.exp(scale.log_scale if scale else 2.0)),
        logit_bias=None if scale is None or scale.bias is None else some.new_full((1,), scale.bias),
        progress=progress,
    )


def score(objective: Objective, leaves: Mapping[str, Tensor], progress: float = 0.5) -> Tensor:
    """Returns the loss () of leaves that are taken as they are."""
    found = objective(embeddings_of(objective, leaves, progress))
    loss: Tensor = found["loss"] if isinstance(found, dict) else found
    return loss


def loss_of(objective: Objective, leaves: Mapping[str, Tensor], progress: float = 0.5) -> Tensor:
    """Returns the loss () of leaves whose joint embeddings are normalised first."""
    return score(objective, normalised(leaves), progress)


def descend(
    objective: Objective, number: int, rank: int, world: int, shares: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Takes one step of plain descent on rows of specimen `number`; returns its loss and gradients.

    The value is the mean over ranks; gradients of embeddings are those of the whole batch, as the gather
    and DDP's mean give them. shares: rows of every rank, () for equally many.
    """
    whole = specimen(objective, number)
    rows = shares or (ROWS // world,) * world
    mine = {name: x.split(rows)[rank].clone() for name, x in whole.items()}
    for name, x in mine.items():
        x.requires_grad_(trained(name))
    with dist.uneven(shares):
        loss = dist.row_weight() * loss_of(objective, mine, number / (2 * STEPS))
    if loss.requires_grad:
        loss.backward()
    found = {"loss": dist.all_reduce_mean(loss.detach())}
    for name, x in mine.items():
        if trained(name):
            gradient = torch.zeros_like(x) if x.grad is None else x.grad
            with dist.uneven(shares):
                found[name] = dist.gather(gradient) / world
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if parameter.grad is not None:
                found[name] = dist.all_reduce_mean(parameter.grad)
                parameter.sub_(0.05 * found[name])
                parameter.grad = None
        objective.after_step()
    return found
