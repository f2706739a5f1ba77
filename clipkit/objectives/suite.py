"""Properties that every objective must have, checked on embeddings alone; what `clipkit test-objective` runs.

Nothing here knows an objective: random embeddings stand in for towers, and the answers of one process with
the whole batch are the oracle for several processes with parts of it.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipkit.objectives.base import Objective
from clipkit.objectives.held import Held
from clipkit.objectives.specimens import (
    ROWS,
    STEPS,
    WIDTHS,
    Maker,
    descend,
    in_single,
    loss_of,
    make,
    normalised,
    score,
    specimen,
    trained,
    warmed,
)
from clipkit.types import ConfigError

TOLERANCE = 1e-10
UNEVEN = (3, 3, 6)  # rows of each of three ranks, as `data.uneven` shares out four lanes
PIECE = 5  # leaves a last micro-batch of another size
INDIFFERENT = "the loss has no gradient with respect to any embedding"


@dataclass(frozen=True)
class Finding:
    """One property of one objective: whether it holds, and the numbers behind the answer."""

    check: str
    holds: bool
    detail: str


def steps(
    rank: int,
    world: int,
    maker: Maker,
    numbers: range = range(STEPS),
    start: dict[str, Tensor] | None = None,
    shares: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """Returns losses, gradients and final state of some steps of plain descent on `world` ranks.

    start: a state to begin from. shares: rows of every rank, () for equally many.
    """
    objective = make(maker)
    if start is not None:
        objective.load_state_dict(start)
    found: dict[str, Tensor] = {}
    for number in numbers:
        taken = descend(objective, number, rank, world, shares)
        found |= {f"{number}.{name}": x for name, x in taken.items()}
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
    objective = warmed(maker)
    leaves = specimen(objective, STEPS)
    wide = loss_of(objective, leaves).detach()
    halved = {name: x.float() if x.is_floating_point() else x for name, x in leaves.items()}
    narrow = loss_of(in_single(maker, objective), halved).detach()
    # The Learner hands out fp32 whatever the precision of the towers: only the embeddings are rounded.
    rounded = {name: x.bfloat16().float() if x.is_floating_point() else x for name, x in halved.items()}
    coarse = loss_of(in_single(maker, objective), rounded).detach()
    shape_right = wide.shape == () and bool(torch.isfinite(wide))
    size = max(abs(float(wide.sum())), 1e-3)
    errors = [abs(float(x.sum()) - float(wide.sum())) / size for x in (narrow, coarse)]
    detail = f"loss {float(wide.sum()):.4g}, fp32 differs by {errors[0]:.1e}, bf16 towers by {errors[1]:.1e}"
    holds = shape_right and errors[0] < 1e-5 and errors[1] < 1e-2
    return Finding("one finite number, fp32 = float64", holds, detail)


def gradients_of(objective: Objective, leaves: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss () and its gradients with respect to the embeddings that it reads."""
    given = {name: x.clone().requires_grad_(trained(name)) for name, x in leaves.items()}
    loss = loss_of(objective, given)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {name: x.grad for name, x in given.items() if x.grad is not None}


def depends(gradients: Mapping[str, Tensor]) -> bool:
    """Returns whether any gradient has an entry other than 0: without one every comparison holds."""
    return any(bool((x != 0).any()) for x in gradients.values())


def check_gradient(maker: Maker) -> Finding:
    """Gradients equal finite differences in float64, and are not all 0.

    Of an objective that says so (`stops_gradient`) the parts that it detaches are held where they are.
    """
    objective = warmed(maker)
    leaves = specimen(objective, STEPS, rows=6)
    title = "gradients = finite differences"
    if not depends(gradients_of(objective, leaves)[1]):
        return Finding(title, False, INDIFFERENT)
    names = [name for name in leaves if trained(name)]
    held = Held() if objective.stops_gradient else None

    # The first call is at the very place where the gradient is asked for: that is what is held.
    def function(*values: Tensor) -> Tensor:
        with torch.enable_grad(), held or contextlib.nullcontext():
            loss = loss_of(objective, {**leaves, **dict(zip(names, values, strict=True))})
        if held is not None:
            held.hold()
        return loss

    inputs = tuple(leaves[name].clone().requires_grad_() for name in names)
    try:
        good = torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)
        detail = f"{len(inputs)} inputs" + ("" if held is None else ", what is detached held constant")
    except (RuntimeError, AssertionError) as error:
        good, detail = False, str(error).strip().splitlines()[0]
    return Finding(title, bool(good), detail)


def check_permutation(maker: Maker) -> Finding:
    """Another order of the rows changes neither the loss nor any row's gradient."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    outcomes = []
    for rows in (torch.arange(ROWS), order):
        objective = warmed(maker)
        leaves = {name: x[rows] for name, x in specimen(objective, STEPS).items()}
        loss, gradients = gradients_of(objective, leaves)
        back = torch.argsort(rows)
        outcomes.append({"0.loss": loss, **{f"0.{name}": x[back] for name, x in gradients.items()}})
    title = "order of rows does not matter"
    if not depends(gradients):
        return Finding(title, False, INDIFFERENT)
    error, where = difference(outcomes[1], outcomes[0])
    return Finding(title, error < TOLERANCE, f"{error:.1e} {where}")


def embed(
    objective: Objective, leaves: Mapping[str, Tensor], weights: Mapping[str, Tensor], rows: slice
) -> dict[str, Tensor]:
    """Returns what linear towers with these weights make of some rows: trunk and joint of every view."""
    found = {}
    for view in objective.needs.views:
        trunk = leaves[f"trunk.{view.name}"][rows] @ weights[f"towers.{view.tower}"]
        found[f"trunk.{view.name}"] = trunk
        found[f"joint.{view.name}"] = normalize(trunk @ weights[f"projections.{view.tower}"], dim=-1)
    return found


def replayed(objective: Objective, leaves: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """Fills gradients as the training step does with micro-batches; returns the loss ()."""
    pieces = [slice(start, start + PIECE) for start in range(0, ROWS, PIECE)]
    with torch.no_grad():
        parts = [embed(objective, leaves, weights, rows) for rows in pieces]
    cached = {name: torch.cat([part[name] for part in parts]).requires_grad_() for name in parts[0]}
    loss = score(objective, {**leaves, **cached})
    loss.backward()
    for rows in pieces:
        again = embed(objective, leaves, weights, rows)
        cotangents = {name: x.grad[rows] for name, x in cached.items() if x.grad is not None}
        torch.stack([(again[name] * x).sum() for name, x in cotangents.items()]).sum().backward()
    return loss.detach()


def check_caching(maker: Maker) -> Finding:
    """Micro-batches change nothing: same loss, same gradients of towers, heads and temperature.

    Both ways meet the same objective, one after the other and without `after_step`, so that a forward which
    changes what the next one returns is seen too.
    """
    objective = warmed(maker)
    leaves = normalised(specimen(objective, STEPS))
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for tower, width in WIDTHS.trunk.items():
        for part, out in (("towers", width), ("projections", WIDTHS.joint)):
            drawn = torch.randn(width, out, generator=generator, dtype=torch.float64)
            weights[f"{part}.{tower}"] = drawn.requires_grad_()
    learned = {**weights, **dict(objective.named_parameters())}

    def directly() -> Tensor:
        loss = score(objective, {**leaves, **embed(objective, leaves, weights, slice(None))})
        loss.backward()
        return loss.detach()

    outcomes, title = [], "micro-batches = the whole batch at once"
    for way in (directly, lambda: replayed(objective, leaves, weights)):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(11)
            try:
                loss = way()
            except RuntimeError as error:
                return Finding(title, False, str(error).strip().splitlines()[0])
        gradients = {f"0.{name}": x.grad for name, x in learned.items() if x.grad is not None}
        outcomes.append({"0.loss": loss, **gradients})
        for x in learned.values():
            x.grad = None
    error_size, where = difference(outcomes[1], outcomes[0])
    return Finding(title, error_size < TOLERANCE, f"{error_size:.1e} {where}")


def check_state(maker: Maker) -> Finding:
    """Saved after some steps and loaded into a fresh objective, training continues with the same bits."""
    whole = steps(0, 1, maker, range(2 * STEPS))
    first = steps(0, 1, maker)
    saved = {name[len("state.") :]: x for name, x in first.items() if name.startswith("state.")}
    second = steps(0, 1, maker, range(STEPS, 2 * STEPS), saved)
    different = [name for name, x in second.items() if not torch.equal(x, whole[name])]
    detail = f"{len(saved)} tensors" + (f"; {', '.join(different[:3])} differ" if different else "")
    return Finding("saved state continues bit for bit", not different, detail)


def check_ranks(
    maker: Maker, world: int, run: Callable[..., list[dict[str, Tensor]]], shares: tuple[int, ...] = ()
) -> Finding:
    """Values, gradients and state on `world` ranks equal those of one process with the whole batch.

    run(world, function, *arguments) returns function(rank, world, *arguments) of every rank. shares: rows of
    every rank, () for equally many.
    """
    expected = steps(0, 1, maker)
    found = run(world, steps, maker, range(STEPS), None, shares)
    error, where = max(difference(part, expected) for part in found)
    kind = "uneven ranks" if shares else "ranks"
    return Finding(f"{world} {kind} = one process", error < TOLERANCE, f"{error:.1e} {where}")


CHECKS = (check_value, check_gradient, check_permutation, check_caching, check_state)


def check_all(maker: Maker, run: Callable[..., list[dict[str, Tensor]]] | None = None) -> list[Finding]:
    """Returns the findings of every check; `run` starts ranks (default: spawned processes with gloo).

    What the objective raises is a finding too. Raises ConfigError when it cannot be built.
    """
    maker()
    findings = [guarded(check, maker) for check in CHECKS]
    # Three with unequal shares alone: who passes that passes with equal ones.
    findings.append(guarded(check_ranks, maker, 2, run or spawn))
    return [*findings, guarded(check_ranks, maker, len(UNEVEN), run or spawn, UNEVEN)]


def guarded(check: Callable[..., Finding], maker: Maker, *arguments: Any) -> Finding:
    """Returns the finding of a check, or one that names what the objective raised and where."""
    try:
        return check(maker, *arguments)
    except Exception as error:  # whatever it is: the code under test is the user's
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())
        detail = f"{type(error).__name__}: {said} ({Path(place.filename).name}, line {place.lineno})"
        return Finding(check.__name__.removeprefix("check_"), False, detail)


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
