"""Evaluation while training: the same functions as the commands, on the weights of the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from clipkit import dist
from clipkit.checkpoint import capture_rng, restore_rng
from clipkit.config import EvaluateConfig
from clipkit.data.views import ImageView
from clipkit.evaluation.datasets import open_retrieval
from clipkit.evaluation.holdout import HOLDOUT
from clipkit.evaluation.probe import open_probed, probe
from clipkit.evaluation.retrieval import retrieval
from clipkit.evaluation.sets import RetrievalSet
from clipkit.evaluation.zero_shot import open_prompted, zero_shot
from clipkit.models.checks import trimmed_length
from clipkit.train.setup import Run
from clipkit.types import ClipkitError


class TrainingEncoder:
    """The Encoder of evaluation on the prepared module, so that autocast and sharding apply.

    weights: "raw" or "ema". Every rank must call it equally often.
    """

    def __init__(self, run: Run, weights: str) -> None:
        self._run, self._weights = run, weights
        self._towers = run.bare.towers
        self.image_size = self._towers.image_size
        self.preprocess = ImageView.from_preprocess(self._towers.preprocess_cfg, train=False)
        self.precision = run.config.run.precision
        self.name = f"{run.folder.name}@{weights}"

    @property
    def logit_scale(self) -> float:
        """The exponentiated temperature; all ranks must ask for it."""
        ema = self._run.bare.ema
        towers = self._towers if self._weights == "raw" or ema is None else ema.towers
        return float(dist.whole(towers.logit_scale.detach()).exp())

    def tokenize(self, captions: list[str]) -> Tensor:
        """Returns token ids, int64 (B, T)."""
        return self._towers.tokenizer(captions)

    def _embed(self, part: str, images: dict[str, Tensor], texts: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            outputs = self._run.learner("embed", images=images, texts=texts, weights=self._weights)
        (found,) = (x for name, x in outputs.items() if name.startswith(f"{part}."))
        return found

    def encode_image(self, images: Tensor) -> Tensor:
        """Returns joint embeddings (B, D) of uint8 images (B, 3, H, V)."""
        return self._embed("joint", {"image": images.to(self._run.accelerator.device)}, {})

    def encode_image_trunk(self, images: Tensor) -> Tensor:
        """Returns trunk features (B, F) of uint8 images (B, 3, H, V)."""
        return self._embed("trunk", {"image": images.to(self._run.accelerator.device)}, {})

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns joint embeddings (B, D) of token ids (B, T)."""
        trim = self._towers.text_trim
        if trim is not None:
            tokens = tokens[:, : trimmed_length(tokens, trim, tokens.shape[1])]
        return self._embed("joint", {}, {"text": tokens.to(self._run.accelerator.device)})


def _one(encoder: TrainingEncoder, entry: EvaluateConfig | RetrievalSet, run: Run) -> dict[str, Any]:
    if isinstance(entry, RetrievalSet):
        result = retrieval(encoder, entry, world=run.world)
    elif entry.task == "retrieval":
        result = retrieval(encoder, entry.data, world=run.world)
    elif entry.task == "probe":
        result = probe(encoder, entry.data, world=run.world)
    else:
        result = zero_shot(
            encoder, entry.data, classnames=entry.classnames, templates=entry.templates, world=run.world
        )
    metrics: dict[str, Any] = result["metrics"]
    return metrics


def check_data(entries: Iterable[EvaluateConfig]) -> None:
    """Opens every evaluation set, its class names and templates: what is wrong fails before the first step.

    Raises ConfigError and DataError as the evaluations would after hours; pictures are not decoded.
    """
    for entry in entries:
        if entry.task == "retrieval":
            open_retrieval(entry.data)
        elif entry.task == "probe":
            open_probed(entry.data)
        else:
            open_prompted(entry.data, entry.classnames, entry.templates)


def evaluate(run: Run, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Returns label -> metrics of `data.holdout` and every `run.evaluate` entry, of raw weights and averaged
    ones (`label@ema`).

    All ranks share the work. Training modes and random states are left as they were. A set that cannot be
    evaluated (a collapsed model, a picture that went bad) gets {"error": cause} and a line for `say`: neither
    is worth a run, and a collapse at step 100 may pass. Every rank meets the same error.
    """
    state = capture_rng()
    run.learner.eval()
    results: dict[str, dict[str, Any]] = {}
    entries: dict[str, EvaluateConfig | RetrievalSet] = {} if run.holdout is None else {HOLDOUT: run.holdout}
    entries |= {entry.label: entry for entry in run.config.run.evaluate}
    try:
        for weights in ("raw",) if run.bare.ema is None else ("raw", "ema"):
            encoder = TrainingEncoder(run, weights)
            for name, entry in entries.items():
                label = name if weights == "raw" else f"{name}@{weights}"
                try:
                    results[label] = _one(encoder, entry, run)
                except ClipkitError as error:
                    results[label] = {"error": error.cause}
                    say(f"warning: evaluation {label} failed: {error.cause} ({error.cure})")
    finally:
        run.learner.train()
        restore_rng(state)
    return results
