"""From a configuration to everything a run holds, in the order in which things can fail cheaply."""

from __future__ import annotations

import datetime
import os
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed.fsdp import FSDPModule

from clipkit import optim
from clipkit.config import Config, check_schedule, parse_interval
from clipkit.data.continuing import open_continued
from clipkit.data.loader import TrainStream, open_train
from clipkit.data.options import LoaderOptions, Source
from clipkit.data.order import check_shares
from clipkit.dist import World
from clipkit.evaluation.holdout import holdout_notes, holdout_set
from clipkit.evaluation.sets import RetrievalSet
from clipkit.learner import Learner, freeze_unused
from clipkit.models.ema import WeightEMA
from clipkit.models.teachers import Teachers
from clipkit.models.towers import TowerOptions, Towers, build
from clipkit.objectives import OBJECTIVES, build_objectives, check_batch_size, needs_of, shared_scale
from clipkit.train.first_look import count_captions, look_at_data, open_sources
from clipkit.train.inputs import (
    Teaching,
    Views,
    build_teachers,
    build_views,
    fake_batch,
    teacher_notes,
    widths_of,
)
from clipkit.train.sharding import shard
from clipkit.train.trackers import Trackers
from clipkit.types import ConfigError, Needs

EMA_BELOW_SAMPLES = 20_000_000
EMA_DECAY = 0.999
# A collective gives up so many seconds after `run.timeout`: the heartbeat speaks first, and names the rank.
COLLECTIVE_GRACE_S = 30.0


@dataclass
class Run:
    """Everything a run holds: `learner` is the prepared module, `bare` the same module unwrapped.

    teacher_files: fixed teacher -> file -> {bytes, sha256} of what clipkit.train.teachers has stored of it;
    data_lines: what the banner says about the samples; holdout: the pairs of data.holdout.
    """

    config: Config
    folder: Path
    world: World
    accelerator: Accelerator
    learner: torch.nn.Module
    bare: Learner
    optimizer: Any
    stream: TrainStream
    total_steps: int
    warmup_steps: int
    notes: list[str] = field(default_factory=list)
    data_lines: list[str] = field(default_factory=list)
    trackers: Trackers = field(init=False)
    teacher_files: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    holdout: RetrievalSet | None = None

    def __post_init__(self) -> None:
        self.trackers = Trackers(self.config, self.folder)

    @property
    def micro_batch(self) -> int | None:
        return self.config.data.micro_batch

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self.bare.parameters() if p.requires_grad)


def make_accelerator(precision: str, deterministic: bool = False, timeout: float = 1800.0) -> Accelerator:
    """Returns an Accelerator for the visible devices; raises ConfigError for fp16 without CUDA.

    timeout: seconds that ranks wait for each other.

    DDP looks for unused parameters so that the last backward of a cached step reduces what the earlier
    ones left, and never rebuilds its buckets: rebuilt buckets add in another order after a resume.
    """
    if deterministic:
        # cuBLAS reads it once, when CUDA starts (CUDA Toolkit, "Results reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # One process may run several times (tests, quickstart); Accelerate would keep the first precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision, precision),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout + COLLECTIVE_GRACE_S)),
        ],
    )
    torch.use_deterministic_algorithms(deterministic)
    if precision == "fp16" and accelerator.device.type != "cuda":
        raise ConfigError(
            f"run.precision: fp16 on {accelerator.device.type} would silently train in fp32",
            "set run.precision to bf16 or fp32, or run on a CUDA device",
        )
    return accelerator


def wrap(accelerator: Accelerator, learner: Learner, optimizer: Any) -> tuple[torch.nn.Module, Any]:
    """Returns the prepared module and optimizer; the loader is never prepared (Accelerate would shard it).

    A learner that is sharded already is only given its precision.
    """
    if isinstance(learner, FSDPModule):
        prepared = accelerator.prepare_model(learner, device_placement=False, evaluation_mode=True)
        return prepared, accelerator.prepare(optimizer)
    with warnings.catch_warnings():
        # torch 2.15 renames the flag; its successor does not exist in 2.11.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        prepared, prepared_optimizer = accelerator.prepare(learner, optimizer)
    return prepared, prepared_optimizer


def seed_everything(seed: int) -> None:
    """Changes the global generators of python, numpy and torch: the same start on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def shortened(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns `names` in order, a module in the place of its parameters where they are all among them."""
    chosen = set(names)
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        prefixes = [".".join(parts[:length]) for length in range(1, len(parts))]
        module = (
            prefix
            for prefix in prefixes
            if all(other in chosen for other in known if other.startswith(f"{prefix}."))
        )
        found[next(module, name)] = None
    return list(found)


def declare(config: Config) -> dict[str, Any]:
    """Returns the objectives of the configuration as label -> (objective, weight), without their heads."""
    entries = [{"name": entry.name, "weight": entry.weight, **entry.options} for entry in config.objectives]
    objectives = build_objectives(entries, OBJECTIVES)
    check_batch_size(objectives, config.data.batch_size)
    return objectives


def build_towers(config: Config, objectives: dict[str, Any]) -> Towers:
    """Returns the towers of the configuration, and gives its objectives their heads."""
    scale = shared_scale(objectives)
    model = config.model
    towers = build(
        model.spec,
        image=TowerOptions(init=model.image.init, freeze=model.image.freeze),
        text=TowerOptions(init=model.text.init, freeze=model.text.freeze),
        init=model.init,
        log_scale=scale.log_scale,
        bias=scale.bias,
        micro_batch=config.data.micro_batch is not None,
        tokenizer=model.tokenizer,
    )
    # Their heads are as wide as the towers, which did not exist before they had said how the scale starts.
    widths = widths_of(towers)
    for part, _ in objectives.values():
        part.build(widths)
    return towers


def open_stream(
    config: Config,
    sources: tuple[Source, ...],
    views: Views,
    needs: Needs,
    world: World,
    saved: dict[str, Any] | None,
) -> TrainStream:
    """Returns the training data of the configuration for this rank: what `needs` declares and no more."""
    data = config.data
    options = LoaderOptions(
        source=sources,
        batch_size=data.batch_size,
        seed=config.run.seed,
        workers=data.workers,
        lanes=data.lanes,
        uneven=data.uneven,
        window_bytes=data.window_bytes,
        max_pixels=data.max_pixels,
        max_reject_fraction=data.max_reject_fraction,
        max_consecutive=data.max_consecutive,
        max_lost_chunks=data.max_lost_chunks,
        allow_pipe=data.allow_pipe,
        timeout=parse_interval(config.run.timeout).seconds or 0.0,
        start_method=data.start_method,
        on_no_range=data.on_no_range,
        index_dir=data.index_dir,
        index=data.index,
        storage=data.storage.storage,
        holdout=parse_interval(data.holdout).fraction if isinstance(data.holdout, str) else data.holdout,
    )

    def opener(options: LoaderOptions, saved: dict[str, Any] | None) -> TrainStream:
        return open_train(
            options, views.images, views.texts, world, saved=saved, labels=needs.labels, stored=needs.stored
        )

    if saved is None:
        return opener(options, None)
    return open_continued(opener, options, saved, config.run.resume_data)


def bf16_slowdown(device: torch.device) -> float:
    """Returns how many times slower a bf16 matrix product is than fp32 on this CPU (about 30 ms to find out).

    Processors without AMX or AVX512-BF16 emulate it: a factor of 50 was seen on a Zen 3.
    """
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(256, 256, dtype=dtype, device=device)
        x @ x
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return seconds[0] / seconds[1]


def make_optimizer(config: Config, learner: Learner) -> torch.optim.AdamW:
    """Returns the optimizer over what is trainable."""
    rates = {
        "towers.clip.visual.": config.model.image.lr,
        "towers.clip.text.": config.model.text.lr,
    }
    groups = optim.parameter_groups(
        learner.named_parameters(),
        config.learning_rate,
        config.optim.weight_decay,
        {prefix: rate for prefix, rate in rates.items() if rate is not None},
    )
    return optim.adamw(groups, config.optim.betas, config.optim.eps)


def wants_ema(config: Config, pairs: int) -> float | None:
    """Returns the decay of the averaged weights, or None; `auto` keeps them below 20 M pairs."""
    wanted = config.run.weight_ema
    if wanted == "auto":
        wanted = pairs < EMA_BELOW_SAMPLES
    if isinstance(wanted, bool):
        return EMA_DECAY if wanted else None
    return float(wanted)


def check_world(config: Config, world: World, saved: dict[str, Any] | None = None) -> None:
    """Raises ConfigError when the ranks are not the ones the configuration or the `saved` data count on."""
    if config.run.world_size is not None and config.run.world_size != world.size:
        raise ConfigError(
            f"run.world_size asks for {config.run.world_size} processes, {world.size} are running",
            f"start with `torchrun --nproc_per_node {config.run.world_size} -m clipkit pretrain ...`",
        )
    rows, lanes = config.data.batch_size, config.data.lanes
    # Where the order may begin again its lanes may too; they are checked when it does.
    if saved is not None and config.run.resume_data == "exact":
        lanes = saved.get("lanes") or lanes
    if lanes:
        check_shares(world.size, lanes, f"the number of lanes, {lanes},", config.data.uneven)
    else:
        check_shares(world.size, rows, f"data.batch_size={rows} (all processes)", config.data.uneven)


def _notes(
    config: Config, accelerator: Accelerator, stream: TrainStream, learner: Learner, unused: Sequence[str]
) -> list[str]:
    """What a user should know of a run before its first step. unused: parameters without a gradient."""
    notes = []
    if stream.shares:
        few, many = min(stream.shares), max(stream.shares)
        notes.append(f"processes hold {few} to {many} rows of a batch, and their losses count by them")
    if unused:
        whole = shortened(unused, [name for name, _ in learner.named_parameters()])
        notes.append(f"without gradient, frozen and left out of the optimizer: {', '.join(whole)}")
    if config.run.precision == "bf16" and accelerator.device.type == "cpu":
        slowdown = bf16_slowdown(accelerator.device)
        if slowdown > 2:
            notes.append(
                f"bf16 is {slowdown:.0f} times slower than fp32 on this processor; set run.precision: fp32"
            )
    return notes


def _parts_say(
    towers: Towers, teachers: Teaching, stored: Mapping[str, Path], objectives: Mapping[str, Any]
) -> Iterator[str]:
    """Yields the notes of the model's parts, in the words of each."""
    yield from towers.notes
    yield from (f"teacher {name}: {note}" for name, note in teacher_notes(teachers, stored))
    yield from (f"{label}: {note}" for label, (part, _) in objectives.items() for note in part.notes)


def _place(learner: Learner, sharding: str, world: World, device: torch.device) -> None:
    if sharding == "fsdp2" and world.size > 1:
        shard(learner, device)
    else:
        learner.to(device)


def prepare(
    config: Config,
    folder: Path,
    accelerator: Accelerator,
    saved: dict[str, Any] | None = None,
    stored: Mapping[str, Path] | None = None,
) -> Run:
    """Returns a run that is ready for its first step.

    saved: the data position it will continue from; stored: fixed teachers that it kept, name -> directory.
    """
    world = World.current()
    check_world(config, world, saved)
    seed_everything(config.run.seed)
    objectives = declare(config)
    needs = needs_of(part for part, _ in objectives.values())
    # Before the towers: what cannot be read, or lacks something, is refused in seconds.
    sources = open_sources(config, needs, world)
    data = look_at_data(config, sources, needs, world)
    towers = build_towers(config, objectives)
    teachers = build_teachers(needs, towers, stored)
    views = build_views(needs, towers, teachers, config.data.crop_scale, config.data.recipes)
    stream = open_stream(config, sources, views, needs, world, saved)
    held = stream.held_pairs()
    holdout = holdout_set(held) if held else None
    decay = wants_ema(config, stream.pairs)
    ema = None if decay is None else WeightEMA(towers, decay)
    learner = Learner(towers, objectives, ema, Teachers(teachers) if teachers else None)
    learner.train()
    # Before the trial: nccl refuses tensors of the CPU.
    _place(learner, config.run.sharding, world, accelerator.device)
    trial = fake_batch(learner, views, stream.stored_widths).to(accelerator.device)
    unused = freeze_unused(learner, trial)
    notes = [*_parts_say(towers, teachers, stored or {}, objectives)]
    notes += _notes(config, accelerator, stream, learner, unused)
    # Not again where a run continues.
    lines, repeated = count_captions(config, stream, learner, world) if saved is None else ([], [])
    optimizer = make_optimizer(config, learner)
    total = config.total_steps(stream.steps_per_epoch)
    notes += [*holdout_notes(held), *repeated, *check_schedule(config, total)]
    prepared, prepared_optimizer = wrap(accelerator, learner, optimizer)
    # Ranks draw different dropout masks, but every one of them the same way in every run.
    seed_everything(config.run.seed + world.rank)
    return Run(
        config=config,
        folder=folder,
        world=world,
        accelerator=accelerator,
        learner=prepared,
        bare=learner,
        optimizer=prepared_optimizer,
        stream=stream,
        total_steps=total,
        warmup_steps=config.warmup_steps(total),
        notes=notes,
        holdout=holdout,
        data_lines=data + lines,
    )
