"""The Learner: towers, heads, objectives and their state in ONE module with ONE forward.

Nothing else is called on the wrapped module while training, so DDP, FSDP and autocast see every call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipkit import dist
from clipkit.models.ema import WeightEMA
from clipkit.models.teachers import Teachers
from clipkit.models.towers import Towers
from clipkit.objectives import Objective, needs_of
from clipkit.objectives.distill import Distill
from clipkit.objectives.margin import Margin
from clipkit.objectives.paired import Paired, UniCl
from clipkit.objectives.two_view import TwoView
from clipkit.types import Batch, ConfigError, Embeddings, Needs, TeacherEmbeddings

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """An image view and a text view that the objective `label` compares, by name.

    repels  it pushes every other row of the batch away, one with the same caption as well
    """

    label: str
    image: str
    text: str
    repels: bool


@dataclass(frozen=True)
class Couple:
    """Two views of one tower that the objective `label` compares; part: "trunk" or "joint" embeddings."""

    label: str
    first: str
    second: str
    part: str


def at_least_fp32(x: Tensor) -> Tensor:
    """Returns `x` as fp32, or unchanged when it is wider: bf16 logits at scale 100 are off by 0.15."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inputs_of(batch: Batch) -> dict[str, Tensors]:
    """Returns the tensors of a batch that the towers read."""
    return {"images": batch.images, "texts": batch.texts}


def extras_of(batch: Batch) -> dict[str, Tensors]:
    """Returns the tensors of a batch that only objectives read."""
    return {"stored": batch.stored, "labels": batch.labels, "present": batch.present}


class Learner(nn.Module):
    """All that is trained, wrapped and saved: `towers`, `objectives`, `teachers`, and `ema` if asked."""

    def __init__(
        self,
        towers: Towers,
        objectives: Mapping[str, tuple[Objective, float]],
        ema: WeightEMA | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        super().__init__()
        self.towers = towers
        self.objectives = nn.ModuleDict({label: part for label, (part, _) in objectives.items()})
        self.weights = {label: weight for label, (_, weight) in objectives.items()}
        self.ema = ema
        self.teachers = teachers

    @property
    def needs(self) -> Needs:
        """The union of what the objectives declare."""
        return needs_of(part for part in self.objectives.values() if isinstance(part, Objective))

    @property
    def pairs(self) -> list[Pair]:
        """Returns the image-text pairs of the objectives: one image view against one caption each."""
        found = []
        for label, part in self.objectives.items():
            assert isinstance(part, Objective)
            image = part.needs.of_tower("image")
            text = [view for view in part.needs.of_tower("text") if not view.optional]
            if len(image) == len(text) == 1:
                found.append(Pair(label, image[0].name, text[0].name, repels(part)))
        return found

    @property
    def couples(self) -> list[Couple]:
        """Returns the two views that the two-view objectives compare, before a projector of their own."""
        return [
            Couple(label, part.first.name, part.second.name, "joint" if part.projector is None else "trunk")
            for label, part in self.objectives.items()
            if isinstance(part, TwoView)
        ]

    def chance(self, label: str, rows: int) -> float | None:
        """Returns the loss of the term `label` for a global batch of `rows` equal embeddings, or None."""
        part = self.objectives[label]
        assert isinstance(part, Objective)
        return part.chance(rows)

    def forward(self, mode: str, **inputs: Any) -> Tensors:
        """Returns plain dicts of tensors (wrappers convert and traverse those and no dataclass).

        full       images, texts, extras, progress -> {"loss", "loss/<label>", "<extra>/<label>", ...}; with
                                                      `inspect` also "gradient/<label>", the norm of the
                                                      weighted term's gradient at the embeddings, and
                                                      "embedding.<trunk or joint>.<view>"
        embed      images, texts, weights, teach   -> {"trunk.<view>": (B, F), "joint.<view>": (B, D)}, and
                                                      with `teach` the same of every teacher, after
                                                      "teacher.<name>."
        score      embeddings, extras, progress    -> as full, from embeddings alone
        surrogate  images, texts, cotangents       -> {"loss"}: sum of embedding x cotangent

        shares, of full and score: rows of the global batch on every rank, () for equally many. All numbers
        are multiplied by W * B / N, so that their mean over ranks is that over the rows of the batch.
        """
        modes: dict[str, Callable[..., Tensors]] = {
            "full": self._full,
            "embed": self._embed,
            "score": self._score,
            "surrogate": self._surrogate,
        }
        return modes[mode](**inputs)

    def _full(
        self,
        images: Tensors,
        texts: Tensors,
        extras: dict[str, Tensors],
        progress: float,
        inspect: bool = False,
        shares: tuple[int, ...] = (),
    ) -> Tensors:
        return self._score(self._embed(images, texts, teach=True), extras, progress, inspect, shares)

    def _embed(self, images: Tensors, texts: Tensors, weights: str = "raw", teach: bool = False) -> Tensors:
        towers = self.towers
        if weights == "ema":
            assert self.ema is not None, "this learner keeps no averaged weights"
            towers = self.ema.towers
        own = {name: x for name, x in images.items() if "@" not in name}
        embeddings = towers.embed(own, {name: x for name, x in texts.items() if "@" not in name})
        if teach and self.teachers is not None:
            embeddings |= self.teachers.embed(images, texts)
        return embeddings

    def _score(
        self,
        embeddings: Tensors,
        extras: dict[str, Tensors],
        progress: float,
        inspect: bool = False,
        shares: tuple[int, ...] = (),
    ) -> Tensors:
        device = next(iter(embeddings.values())).device.type
        with torch.autocast(device, enabled=False), dist.uneven(shares):
            share = dist.row_weight()
            wide = {name: at_least_fp32(x) for name, x in embeddings.items()}
            e = Embeddings(
                trunk=named(wide, "trunk."),
                joint=named(wide, "joint."),
                teachers={} if self.teachers is None else self._taught(wide),
                logit_scale=at_least_fp32(self.towers.logit_scale).exp(),
                logit_bias=None if (bias := self.towers.logit_bias) is None else at_least_fp32(bias),
                progress=progress,
                **extras,
            )
            outputs: Tensors = {}
            weighted: Tensors = {}
            for label, part in self.objectives.items():
                terms = part(e)
                terms = terms if isinstance(terms, dict) else {"loss": terms}
                weighted[label] = self.weights[label] * share * terms["loss"]
                outputs.update({f"{name}/{label}": x.detach() * share for name, x in terms.items()})
            if inspect:
                outputs |= inspected(wide, weighted)
            return {"loss": functools.reduce(torch.add, weighted.values()), **outputs}

    def _taught(self, wide: Tensors) -> dict[str, TeacherEmbeddings]:
        assert self.teachers is not None
        return {
            name: TeacherEmbeddings(
                named(wide, f"teacher.{name}.trunk."), named(wide, f"teacher.{name}.joint."), scale
            )
            for name, scale in self.teachers.scales().items()
        }

    def _surrogate(self, images: Tensors, texts: Tensors, cotangents: Tensors) -> Tensors:
        embeddings = self._embed(images, texts)
        with torch.autocast(next(iter(embeddings.values())).device.type, enabled=False):
            terms = [(at_least_fp32(embeddings[name]) * x).sum() for name, x in cotangents.items()]
            return {"loss": torch.stack(terms).sum()}

    @torch.no_grad()
    def after_step(self, step: int, progress: float) -> None:
        """Does what follows an optimizer step that was taken: scale clamp, objectives, averages of weights.

        `progress` is that of the step, 0..1.
        """
        self.towers.clamp_scale()
        for part in self.objectives.values():
            assert isinstance(part, Objective)
            part.after_step()
        if self.teachers is not None:
            self.teachers.follow(self.towers, progress)
        if self.ema is not None:
            self.ema.update(self.towers, step)


def inspected(embeddings: Tensors, terms: Tensors) -> Tensors:
    """Returns the norm of every term's gradient at the embeddings, () each, and the embeddings detached.

    One backward per term through the scores alone; the gradients of parameters are left as they are. Where
    every tower stands still, nothing has a gradient there and the norms are left out.
    """
    own = {name: x for name, x in embeddings.items() if not name.startswith("teacher.")}
    leaves = [x for x in own.values() if x.requires_grad]
    found = {f"embedding.{name}": x.detach() for name, x in own.items()}
    for label, term in terms.items() if leaves else ():
        gradients: tuple[Tensor | None, ...] = ()
        if term.requires_grad:  # a queue that is empty gives a loss without a graph
            gradients = torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
        squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
        found[f"gradient/{label}"] = torch.stack(squares).sum().sqrt() if squares else term.detach() * 0
    return found


def repels(part: Objective) -> bool:
    """Returns whether an image-text objective treats other rows as negatives, those of equal caption too."""
    if isinstance(part, UniCl | Margin):
        return part.label != "caption"
    return isinstance(part, Paired) and not isinstance(part, Distill)


def named(tensors: Tensors, prefix: str) -> Tensors:
    """Returns the entries whose name starts with `prefix`, without it."""
    return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}


def freeze_unused(learner: Learner, batch: Batch) -> list[str]:
    """Freezes the parameters to which one back-propagated batch gives no gradient; returns their names.

    DDP would wait for them and the optimizer would decay them. Buffers, gradients and random states are
    left as they were. Raises ConfigError when a whole tower that an objective declares is among them.
    """
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        outputs = learner("full", **inputs_of(batch), extras=extras_of(batch), progress=0.0)
        outputs["loss"].backward()
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    learner.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in learner.named_buffers():
            buffer.copy_(buffers[name])
    for name in unused:
        trained[name].requires_grad_(False)
    for tower, module in (("image", "visual"), ("text", "text")):
        members = [name for name in trained if name.startswith(f"towers.clip.{module}.")]
        if learner.needs.of_tower(tower) and members and set(members) <= set(unused):
            raise ConfigError(
                f"no parameter of the {tower} tower gets a gradient from {', '.join(learner.objectives)}",
                "choose objectives that read this tower, or freeze it",
            )
    return unused
