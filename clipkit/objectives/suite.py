"""Properties that every objective must have, checked on embeddings alone; what `clipkit test-objective` runs.

Nothing here knows an objective: random embeddings stand in for towers, and the answers of one process with
the whole batch are the oracle for several processes with parts of it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit import dist
from clipkit.objectives.base import Objective, Widths
from clipkit.types import ConfigError, Embeddings, TeacherEmbeddings

ROWS = 12  # divides by 1, 2 and 3 ranks
STEPS = 3
WIDTHS = Widths({"image": 10, "text": 8}, 6, frozenset({"image", "text"}))
STORED_WIDTH = 6
TOLERANCE = 1e-10
Maker = Callable[[], Objective]


@dataclass(frozen=True)
class Finding:
    """One property of one objective: whether it holds, and the numbers behind the answer."""

    check: str
    holds: bool
    detail: str


def make(maker: Maker) -> Objective:
    """Returns the objective in float64 and training mode, built for WIDTHS; the same on every rank."""
    torch.manual_seed(3)
    objective = maker()
    objective.build(WIDTHS)
    return objective.double().train()


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


def embeddings_of(objective: Objective, leaves: Mapping[str, Tensor], progress: float) -> Embeddings:
    """Returns what the Learner would hand over; joint embeddings are normalised here, as it does."""

    def part(prefix: str) -> dict[str, Tensor]:
        found = {name[len(prefix) :]: x for name, x in leaves.items() if name.startswith(prefix)}
        return {name: normalize(x, dim=-1) for name, x in found.items()} if "joint." in prefix else found

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


def loss_of(objective: Objective, leaves: Mapping[str, Tensor], progress: float = 0.5) -> Tensor:
    """Returns the loss ()."""
    found = objective(embeddings_of(objective, leaves, progress))
    loss: Tensor = found["loss"] if isinstance(found, dict) else found
    return loss


def steps(
    rank: int, world: int, maker: Maker, numbers: range = range(STEPS), start: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Returns losses, gradients and final state of some steps of plain descent on `world` ranks.

    Values are means over ranks; gradients of embeddings are those of the whole batch, as the gather and
    DDP's mean give them. `start` is a state to begin from.
    """
    objective = make(maker)
    if start is not None:
        objective.load_state_dict(start)
    found: dict[str, Tensor] = {}
    share = ROWS // world
    for number in numbers:
        whole = specimen(objective, number)
        mine = {name: x[rank * share : (rank + 1) * share].clone() for name, x in whole.items()}
        for name, x in mine.items():
            x.requires_grad_(trained(name))
        loss = loss_of(objective, mine, number / (2 * STEPS))
        loss.backward()
        found[f"{number}.loss"] = dist.all_reduce_mean(loss.detach())
        for name, x in mine.items():
            if trained(name):
                gradient = torch.zeros_like(x) if x.grad is None else x.grad
                found[f"{number}.{name}"] = dist.gather(gradient) / world
        with torch.no_grad():
            for name, parameter in objective.named_parameters():
                if parameter.grad is not None:
                    gradient = dist.all_reduce_mean(parameter.grad)
                    found[f"{number}.{name}"] = gradient
                    parameter.sub_(0.05 * gradient)
                    parameter.grad = None
            objective.after_step()
    for name, x in objective.state_dict().items():
        found[f"state.{name}"] = x.clone()
    return found


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """Returns (largest error relative to the largest entry of its step and kind, where)."""
    if found.keys() != expected.keys():
        return math.inf, ", ".join(sorted(found.keys() ^ expected.keys())[:3])
    worst = (0.0, "")
    for name, x in expected.items():
        if not x.numel():
            continue
        step = name.split(".")[0]
        size = max(float(y.double().abs().max()) for key, y in expected.items() if key.startswith(f"{step}."))
        error = float((found[name].double() - x.double()).abs().max()) / max(size, 1e-12)
        worst = max(worst, (error, name))
    return worst


def check_value(maker: Maker) -> Finding:
    """The loss is one finite number; fp32 agrees with float64 to 1e-5, rows rounded to bf16 to 1e-2."""
    objective = make(maker)
    leaves = specimen(objective, 0)
    wide = loss_of(objective, leaves).detach()
    halved = {name: x.float() if x.is_floating_point() else x for name, x in leaves.items()}
    narrow = loss_of(make(maker).float(), halved).detach()
    # The Learner hands out fp32 whatever the precision of the towers: only the embeddings are rounded.
    rounded = {name: x.bfloat16().float() if x.is_floating_point() else x for name, x in halved.items()}
    coarse = loss_of(make(maker).float(), rounded).detach()
    shape_right = wide.shape == () and bool(torch.isfinite(wide))
    size = max(abs(float(wide.sum())), 1e-3)
    errors = [abs(float(x.sum()) - float(wide.sum())) / size for x in (narrow, coarse)]
    detail = f"loss {float(wide.sum()):.4g}, fp32 differs by {errors[0]:.1e}, bf16 towers by {errors[1]:.1e}"
    holds = shape_right and errors[0] < 1e-5 and errors[1] < 1e-2
    return Finding("one finite number, fp32 = float64", holds, detail)


def check_gradient(maker: Maker) -> Finding:
    """Gradients equal finite differences in float64, unless the objective stops gradients on purpose."""
    objective = make(maker)
    leaves = specimen(objective, 0, rows=6)
    names = [name for name in leaves if trained(name)]
    if objective.stops_gradient:
        return Finding("gradients = finite differences", True, "not asked: it stops gradients by design")

    def function(*values: Tensor) -> Tensor:
        return loss_of(objective, {**leaves, **dict(zip(names, values, strict=True))})

    inputs = tuple(leaves[name].clone().requires_grad_() for name in names)
    try:
        good = torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)
        detail = f"{len(inputs)} inputs"
    except (RuntimeError, AssertionError) as error:
        good, detail = False, str(error).strip().splitlines()[0]
    return Finding("gradients = finite differences", bool(good), detail)


def check_permutation(maker: Maker) -> Finding:
    """Another order of the rows changes neither the loss nor any row's gradient."""
    objective = make(maker)
    leaves = specimen(objective, 0)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    outcomes = []
    for rows in (torch.arange(ROWS), order):
        given = {name: x[rows].clone().requires_grad_(trained(name)) for name, x in leaves.items()}
        loss = loss_of(make(maker), given)
        loss.backward()
        back = torch.argsort(rows)
        gradients = {name: x.grad[back] for name, x in given.items() if x.grad is not None}
        outcomes.append({"0.loss": loss.detach(), **{f"0.{name}": x for name, x in gradients.items()}})
    error, where = difference(outcomes[1], outcomes[0])
    return Finding("order of rows does not matter", error < TOLERANCE, f"{error:.1e} {where}")


def check_state(maker: Maker) -> Finding:
    """Saved after some steps and loaded into a fresh objective, training continues with the same bits."""
    whole = steps(0, 1, maker, range(2 * STEPS))
    first = steps(0, 1, maker)
    saved = {name[len("state.") :]: x for name, x in first.items() if name.startswith("state.")}
    second = steps(0, 1, maker, range(STEPS, 2 * STEPS), saved)
    different = [name for name, x in second.items() if not torch.equal(x, whole[name])]
    detail = f"{len(saved)} tensors" + (f"; {', '.join(different[:3])} differ" if different else "")
    return Finding("saved state continues bit for bit", not different, detail)


def check_ranks(maker: Maker, world: int, run: Callable[..., list[dict[str, Tensor]]]) -> Finding:
    """Values, gradients and state on `world` ranks equal those of one process with the whole batch.

    run(world, function, *arguments) returns function(rank, world, *arguments) of every rank.
    """
    expected = steps(0, 1, maker)
    found = run(world, steps, maker)
    error, where = max(difference(part, expected) for part in found)
    return Finding(f"{world} ranks = one process", error < TOLERANCE, f"{error:.1e} {where}")


def check_all(maker: Maker, run: Callable[..., list[dict[str, Tensor]]] | None = None) -> list[Finding]:
    """Returns the findings of every check; `run` starts ranks (default: spawned processes with gloo)."""
    findings = [check(maker) for check in (check_value, check_gradient, check_permutation, check_state)]
    return findings + [check_ranks(maker, world, run or spawn) for world in (2, 3)]


def spawn(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Returns function(rank, world, *arguments) of each of `world` fresh processes joined by gloo."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "rendezvous")
        results = context.Queue()
        processes = [
            context.Process(target=_join, args=(rank, world, meeting, results, function, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        found = dict(pickle.loads(results.get(timeout=300)) for _ in processes)
        for process in processes:
            process.join()
    failures = [value for value in found.values() if isinstance(value, str)]
    if failures:
        raise ConfigError(f"a rank failed: {failures[0]}", "correct the objective; --traceback shows more")
    return [found[rank] for rank in range(world)]


def _join(rank: int, world: int, meeting: str, results: Any, function: Any, arguments: Any) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        value: Any = function(rank, world, *arguments)
    except Exception as error:  # reported by the parent, whatever it is: the code under test is the user's
        value = f"{type(error).__name__}: {error}"
    # Plain pickle: torch's own way through queues shares memory that ends with this process.
    results.put(pickle.dumps((rank, value)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class FromEntry:
    """A picklable maker: builds one objective from an entry of a configuration."""

    entry: dict[str, Any]

    def __call__(self) -> Objective:
        from clipkit.objectives import OBJECTIVES, build_objectives

        ((objective, _),) = build_objectives([self.entry], OBJECTIVES).values()
        return objective
