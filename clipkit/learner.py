"""The Learner: towers, heads, objectives and their state in ONE module with ONE forward.

Nothing else is called on the wrapped module while training, so DDP, FSDP and autocast see every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.models.ema import WeightEMA
from clipkit.models.towers import Towers
from clipkit.objectives import Objective
from clipkit.types import Batch, ConfigError, Embeddings, Needs

Tensors = dict[str, Tensor]


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
    """Everything that is trained, wrapped and saved: `towers`, `objectives`, and `ema` when asked for."""

    def __init__(
        self, towers: Towers, objectives: Mapping[str, tuple[Objective, float]], ema: WeightEMA | None = None
    ) -> None:
        super().__init__()
        self.towers = towers
        self.objectives = nn.ModuleDict({label: part for label, (part, _) in objectives.items()})
        self.weights = {label: weight for label, (_, weight) in objectives.items()}
        self.ema = ema

    @property
    def needs(self) -> Needs:
        """The union of what the objectives declare."""
        needs = Needs()
        for part in self.objectives.values():
            assert isinstance(part, Objective)
            needs = needs | part.needs
        return needs

    def forward(self, mode: str, **inputs: Any) -> Tensors:
        """Returns plain dicts of tensors (wrappers convert and traverse those and no dataclass).

        full       images, texts, extras, progress -> {"loss", "loss/<label>", "<extra>/<label>", ...}
        embed      images, texts, weights          -> {"trunk.<view>": (B, F), "joint.<view>": (B, D)}
        score      embeddings, extras, progress    -> as full, from embeddings alone
        surrogate  images, texts, cotangents       -> {"loss"}: sum of embedding x cotangent
        """
        modes: dict[str, Callable[..., Tensors]] = {
            "full": self._full,
            "embed": self._embed,
            "score": self._score,
            "surrogate": self._surrogate,
        }
        return modes[mode](**inputs)

    def _full(self, images: Tensors, texts: Tensors, extras: dict[str, Tensors], progress: float) -> Tensors:
        return self._score(self._embed(images, texts), extras, progress)

    def _embed(self, images: Tensors, texts: Tensors, weights: str = "raw") -> Tensors:
        towers = self.towers
        if weights == "ema":
            assert self.ema is not None, "this learner keeps no averaged weights"
            towers = self.ema.towers
        embeddings: Tensors = {}
        for view, pixels in images.items():
            embeddings[f"trunk.{view}"], embeddings[f"joint.{view}"] = towers.image(pixels)
        for view, tokens in texts.items():
            embeddings[f"trunk.{view}"], embeddings[f"joint.{view}"] = towers.text(tokens)
        return embeddings

    def _score(self, embeddings: Tensors, extras: dict[str, Tensors], progress: float) -> Tensors:
        with torch.autocast(next(iter(embeddings.values())).device.type, enabled=False):
            wide = {name: at_least_fp32(x) for name, x in embeddings.items()}
            e = Embeddings(
                trunk={name[6:]: x for name, x in wide.items() if name.startswith("trunk.")},
                joint={name[6:]: x for name, x in wide.items() if name.startswith("joint.")},
                logit_scale=at_least_fp32(self.towers.logit_scale).exp(),
                logit_bias=None if (bias := self.towers.logit_bias) is None else at_least_fp32(bias),
                progress=progress,
                **extras,
            )
            outputs: Tensors = {}
            total: Tensor | None = None
            for label, part in self.objectives.items():
                terms = part(e)
                terms = terms if isinstance(terms, dict) else {"loss": terms}
                weighted = self.weights[label] * terms["loss"]
                total = weighted if total is None else total + weighted
                outputs.update({f"{name}/{label}": x.detach() for name, x in terms.items()})
            assert total is not None
            return {"loss": total, **outputs}

    def _surrogate(self, images: Tensors, texts: Tensors, cotangents: Tensors) -> Tensors:
        embeddings = self._embed(images, texts)
        with torch.autocast(next(iter(embeddings.values())).device.type, enabled=False):
            terms = [(at_least_fp32(embeddings[name]) * x).sum() for name, x in cotangents.items()]
            return {"loss": torch.stack(terms).sum()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Does what follows an optimizer step that was taken: scale clamp, objectives, averaged weights."""
        self.towers.clamp_scale()
        for part in self.objectives.values():
            assert isinstance(part, Objective)
            part.after_step()
        if self.ema is not None:
            self.ema.update(self.towers, step)


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
    for tower, views in (("visual", learner.needs.image_views), ("text", learner.needs.text_views)):
        members = [name for name in trained if name.startswith(f"towers.clip.{tower}.")]
        if views and members and set(members) <= set(unused):
            raise ConfigError(
                f"no parameter of the {tower} tower gets a gradient from {', '.join(learner.objectives)}",
                "choose objectives that read this tower, or freeze it",
            )
    return unused
