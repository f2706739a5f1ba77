"""SwAV: crops predict each other's assignment to prototypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from clipkit import dist
from clipkit.losses import swav_loss
from clipkit.models.heads import mlp_head
from clipkit.objectives.base import Objective, Widths, check_count, check_number
from clipkit.objectives.declare import views_of
from clipkit.objectives.memory import FeatureQueue
from clipkit.objectives.two_view import watched
from clipkit.types import Embeddings, Needs

ASSIGNED = (0, 1)


class Swav(Objective):
    """Swapped prediction of codes, arXiv:2006.09882, with multi-crop; codes balance over all ranks.

    views       recipe of the crops: views 0 and 1 are assigned codes, the `local` others predict them
    prototypes  K; many more than classes, not more than a few times the batch without a queue
    epsilon     entropy of the codes; temperature of the predictions; iterations of Sinkhorn-Knopp
    frozen      share of the run in which prototypes stand still (313 iterations in the paper)
    queue       past features per assigned crop that steady the codes of small batches (paper: 3840), from
                the share `queue_start` of the run on
    """

    stops_gradient = True
    fewest_rows = 2

    def __init__(
        self,
        views: str = "swav",
        local: int = 6,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        hidden: int = 2048,
        dim: int = 128,
        frozen: float = 0.005,
        queue: int = 0,
        queue_start: float = 0.15,
    ) -> None:
        super().__init__()
        self.views = views_of("image", views, "swav", len(ASSIGNED) + check_count("local", local, 0))
        self.needs = Needs(views=self.views)
        self.temperature = check_number("temperature", temperature, 1e-3)
        self.epsilon = check_number("epsilon", epsilon, 1e-3)
        self.iterations = check_count("iterations", iterations, 1)
        self.hidden, self.dim = check_count("hidden", hidden, 0), check_count("dim", dim, 1)
        self.frozen = check_number("frozen", frozen, 0.0, 1.0)
        self.queue_start = check_number("queue_start", queue_start, 0.0, 1.0)
        size = check_count("queue", queue, 0)
        self.queues = nn.ModuleList(FeatureQueue(size, dim) for _ in ASSIGNED) if size else None
        self.prototypes = nn.Parameter(torch.empty(check_count("prototypes", prototypes, 2), dim))

    def build(self, widths: Widths) -> None:
        """Creates the projector and draws the prototypes on the sphere."""
        self.projector = mlp_head(widths.trunk["image"], self.hidden, self.dim)
        with torch.no_grad():
            self.prototypes.copy_(normalize(torch.randn_like(self.prototypes), dim=-1))

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss, the share of prototypes that the batch's rows are nearest to, and the watch."""
        crops = torch.cat([e.trunk[view.name] for view in self.views])
        features = normalize(self.projector(crops), dim=-1)
        # Times zero, not without gradient: a parameter that starts without one would be left untrained.
        moving = float(e.progress >= self.frozen)
        prototypes = self.prototypes.detach() + moving * (self.prototypes - self.prototypes.detach())
        scores = linear(features, prototypes).chunk(len(self.views))
        rows = features.chunk(len(self.views))
        loss = swav_loss(
            scores,
            dist.all_reduce_mean,
            assigned=ASSIGNED,
            temperature=self.temperature,
            epsilon=self.epsilon,
            iterations=self.iterations,
            extra=self._extra(e.progress),
        )
        terms = {"loss": loss, **watched(rows[0], rows[1])}
        for queue, place in zip(self.queues or (), ASSIGNED, strict=self.queues is not None):
            assert isinstance(queue, FeatureQueue)
            queue.stash(rows[place])
            terms |= queue.state()
        with torch.no_grad():
            used = torch.unique(dist.gather(scores[0].argmax(dim=1))).numel() / len(self.prototypes)
        return terms | {"prototypes_used": loss.new_tensor(used)}

    @torch.no_grad()
    def _extra(self, progress: float) -> list[Tensor]:
        """Scores of this rank's share of the queued features, once the queues are full and it is time."""
        if self.queues is None or progress < self.queue_start:
            return []
        world, shares = dist.World.current(), []
        for queue in self.queues:
            assert isinstance(queue, FeatureQueue)
            if int(queue.filled) < len(queue.rows):
                return []
            shares.append(queue.rows[world.rank :: world.size] @ self.prototypes.T)
        return shares

    @torch.no_grad()
    def after_step(self) -> None:
        """Puts the prototypes back on the sphere and enqueues."""
        rows = dist.own_rows(self.prototypes)
        rows.copy_(normalize(rows, dim=-1))
        for queue in self.queues or ():
            assert isinstance(queue, FeatureQueue)
            queue.push()
