"""Objectives that read a moving average of the tower: MoCo with its queue, BYOL, and PCL on top of MoCo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipkit.losses import byol_loss, moco_loss
from clipkit.losses.prototypes import concentrations, proto_nce_loss
from clipkit.losses.regression import simsiam_loss
from clipkit.models.heads import mlp_head
from clipkit.objectives.base import (
    Widths,
    check_choice,
    check_count,
    check_counts,
    check_flag,
    check_number,
)
from clipkit.objectives.memory import FeatureQueue, MomentumHead
from clipkit.objectives.two_view import Recipes, TwoView, watched
from clipkit.types import ConfigError, Embeddings, Needs, Teacher


def average_name(momentum: float, schedule: str) -> str:
    """Returns the name of the moving average that moves so: objectives that agree on both share it."""
    # Names of submodules hold no dots.
    return f"ema_{momentum!r}_{schedule}".replace(".", "_")


class Followed(TwoView):
    """A two-view objective whose targets come from a moving average of the tower and of the projector."""

    def __init__(
        self,
        tower: str,
        views: Recipes,
        default: str,
        hidden: int,
        dim: int,
        momentum: float,
        schedule: str,
        taught: Sequence[int],
    ) -> None:
        super().__init__(tower, views, default, hidden, check_count("dim", dim, 1))
        names = tuple((self.first.name, self.second.name)[number] for number in taught)
        check_choice("schedule", schedule, ("constant", "cosine"))
        momentum = check_number("momentum", momentum, 0.0, 1.0)
        self.average = Teacher(average_name(momentum, schedule), names, momentum, schedule)
        self.needs = self.needs | Needs(teachers=(self.average,))
        self.follower: MomentumHead | None = None
        self._progress = 0.0

    def build(self, widths: Widths) -> None:
        """Creates the projector and the head that follows it."""
        super().build(widths)
        assert self.projector is not None
        self.follower = MomentumHead(self.projector)

    def after_step(self) -> None:
        """Moves the following head, with the momentum of the step that was taken."""
        assert self.follower is not None
        assert self.projector is not None
        self.follower.follow(self.projector, self.average.momentum_at(self._progress))


class Moco(Followed):
    """Queries against a queue of past keys: MoCo v2 (arXiv:2003.04297), or v1 (arXiv:1911.05722).

    momentum     of the key tower, 0.999; short runs want less, for 1 / (1 - momentum) steps are remembered
    queue        number of keys kept, of all ranks; the keys of the batch itself are no negatives
    temperature  0.2 (v2); v1: 0.07 with hidden: 0 and views: moco_v1
    Slots of the queue that were never written are left out; with an empty queue the loss is 0.
    """

    def __init__(
        self,
        tower: str = "image",
        views: Recipes = None,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue: int = 65536,
        hidden: int = 2048,
        dim: int = 128,
    ) -> None:
        super().__init__(tower, views, "moco_v2", hidden, dim, momentum, "constant", (1,))
        self.scale_of_logits = 1 / check_number("temperature", temperature, 1e-3)
        self.queue = FeatureQueue(check_count("queue", queue, 1), dim)

    def keyed(self, e: Embeddings) -> tuple[Tensor, Tensor]:
        """Returns queries (B, dim) and keys (B, dim), L2-normalised, and keeps the keys for the queue."""
        assert self.follower is not None
        assert self.projector is not None
        queries = normalize(self.projector(e.trunk[self.first.name]), dim=-1)
        keys = normalize(self.follower(e.teachers[self.average.name].trunk[self.second.name]), dim=-1)
        self.queue.stash(keys)
        return queries, keys

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the loss against the queue, how full and how old the queue is, and the watch."""
        queries, keys = self.keyed(e)
        loss = moco_loss(queries, keys, self.queue.rows, self.scale_of_logits, self.queue.filled)
        return {"loss": loss, **self.queue.state(), **watched(queries, keys)}

    def after_step(self) -> None:
        """Moves the key head, and enqueues the keys of the step."""
        super().after_step()
        self.queue.push()


class Pcl(Moco):
    """MoCo with prototypes (ProtoNCE), arXiv:2005.04966 eq. 11, online.

    The paper clusters the features of the whole set every epoch, which needs a pass over it and the cluster
    of every sample by index. Here the queue is clustered every `every` steps (k-means on the sphere from
    evenly spaced rows), and an anchor belongs to the prototype nearest to its key. The queue must be much
    larger than the number of prototypes.
    clusters  prototypes of each clustering; several granularities are averaged
    warmup    share of the run with the term of MoCo alone
    """

    steps: Tensor
    ready: Tensor

    def __init__(
        self,
        tower: str = "image",
        views: Recipes = None,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue: int = 16384,
        hidden: int = 2048,
        dim: int = 128,
        clusters: Sequence[int] = (256, 512),
        every: int = 50,
        iterations: int = 10,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(tower, views, temperature, momentum, queue, hidden, dim)
        clusters = check_counts("clusters", clusters, 2)
        if max(clusters) > queue:
            raise ConfigError(
                f"clusters is {list(clusters)} for a queue of {queue}", "name counts below the queue's"
            )
        self.every = check_count("every", every, 1)
        self.iterations = check_count("iterations", iterations, 1)
        self.warmup = check_number("warmup", warmup, 0.0, 1.0)
        for at, number in enumerate(clusters):
            self.register_buffer(f"centres_{at}", torch.zeros(number, dim))
            self.register_buffer(f"spread_{at}", torch.ones(number))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.clusterings = len(clusters)

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the sum of both terms once there are prototypes, and what MoCo returns."""
        self._progress = e.progress
        queries, keys = self.keyed(e)
        loss = moco_loss(queries, keys, self.queue.rows, self.scale_of_logits, self.queue.filled)
        terms = {"instances": loss, **self.queue.state(), **watched(queries, keys)}
        if bool(self.ready) and e.progress >= self.warmup:
            centres = [getattr(self, f"centres_{at}") for at in range(self.clusterings)]
            spreads = [getattr(self, f"spread_{at}") for at in range(self.clusterings)]
            nearest = [(keys @ rows.T).argmax(dim=1) for rows in centres]
            terms["prototypes"] = proto_nce_loss(queries, centres, nearest, spreads)
            loss = loss + terms["prototypes"]
        return {"loss": loss, **terms}

    @torch.no_grad()
    def after_step(self) -> None:
        """Does what MoCo does, and clusters the queue when it is time."""
        super().after_step()
        self.steps.add_(1)
        rows = self.queue.rows[: int(self.queue.filled)]
        largest = max(len(getattr(self, f"centres_{at}")) for at in range(self.clusterings))
        if int(self.steps) % self.every or len(rows) < 2 * largest:
            return
        for at in range(self.clusterings):
            centres = getattr(self, f"centres_{at}")
            assignment = spherical_kmeans(rows, centres, self.iterations)
            spread = concentrations(rows, centres, assignment, 1 / self.scale_of_logits)
            getattr(self, f"spread_{at}").copy_(spread)
        self.ready.fill_(True)


@torch.no_grad()
def spherical_kmeans(rows: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Changes `centres` (K, D) to unit means of the nearest unit `rows` (M, D); returns clusters (M,) int64.

    Starts from K evenly spaced rows and draws no random number, so every rank finds the same; a cluster
    that loses all its rows keeps its centre.
    """
    count = len(centres)
    centres.copy_(rows[torch.arange(count, device=rows.device) * len(rows) // count])
    assignment = (rows @ centres.T).argmax(dim=1)
    for _ in range(iterations):
        sums = torch.zeros_like(centres).index_add(0, assignment, rows)
        kept = torch.bincount(assignment, minlength=count) > 0
        centres.copy_(torch.where(kept[:, None], normalize(sums, dim=-1), centres))
        assignment = (rows @ centres.T).argmax(dim=1)
    return assignment


class Byol(Followed):
    """Each view predicts what the average network says of the other one; no negatives. arXiv:2006.07733.

    momentum   0.996, on a cosine to 1; short runs want less
    predictor  false collapses: an experiment, not a choice
    simsiam    no average: the other view's projection without gradient, arXiv:2011.10566
    """

    layers = 2

    def __init__(
        self,
        tower: str = "image",
        views: Recipes = None,
        momentum: float = 0.996,
        schedule: str = "cosine",
        hidden: int = 4096,
        dim: int = 256,
        predictor: bool = True,
        simsiam: bool = False,
    ) -> None:
        super().__init__(tower, views, "byol", hidden, dim, momentum, schedule, (0, 1))
        self.predicts = check_flag("predictor", predictor)
        self.simsiam = check_flag("simsiam", simsiam)
        self.predictor: nn.Module = nn.Identity()
        self.stops_gradient = self.simsiam
        if self.simsiam:
            self.needs = Needs(views=self.needs.views)

    def build(self, widths: Widths) -> None:
        """Creates the projector, its average and the predictor."""
        super().build(widths)
        if self.predicts:
            self.predictor = mlp_head(self.dim, self.hidden, self.dim)
        if self.simsiam:
            self.follower = None

    def forward(self, e: Embeddings) -> dict[str, Tensor]:
        """Returns the regression loss of both directions, in [0, 8] (simsiam: [-1, 1]), and its watch."""
        self._progress = e.progress
        a, b = self.projected(e)
        predicted_a, predicted_b = self.predictor(torch.cat([a, b])).chunk(2)
        if self.simsiam:
            loss = simsiam_loss(predicted_a, predicted_b, a, b)
        else:
            assert self.follower is not None
            trunk = e.teachers[self.average.name].trunk
            rows = torch.cat([trunk[self.first.name], trunk[self.second.name]])
            target_a, target_b = self.follower(rows).chunk(2)
            loss = byol_loss(predicted_a, predicted_b, target_a, target_b)
        return {"loss": loss, **watched(a, b)}

    def after_step(self) -> None:
        """Moves the average projector, where there is one."""
        if not self.simsiam:
            super().after_step()
