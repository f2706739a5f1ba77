"""What a configuration may contain: one frozen model per section, unknown keys forbidden."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from clipkit.config.values import (
    Count,
    Duration,
    Every,
    Freeze,
    Holdout,
    OnSpike,
    OptionalEvery,
    Positive,
    Shards,
    Text,
    Trackers,
    Warmup,
    WeightEma,
    Whole,
    Workers,
    as_captions,
    as_sources,
    as_tuple,
    default_workers,
    refuse,
)
from clipkit.data.options import CaptionField, Source, Storage
from clipkit.data.recipes import read_recipes
from clipkit.types import ConfigError


class Section(BaseModel):
    """The rules of every section: immutable, no unknown keys, no silent conversion, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TowerConfig(Section):
    """One tower. init: weights to start from; freeze: false, true (= trunk), trunk or all; lr: own rate."""

    init: Text | None = None
    freeze: Freeze = False
    lr: Positive | None = None


class ModelConfig(Section):
    """A name that open_clip knows, or its model_cfg inline; where weights come from; tower options."""

    name: Text | None = None
    embed_dim: Count | None = None
    vision_cfg: dict[str, Any] | None = None
    text_cfg: dict[str, Any] | None = None
    quick_gelu: bool | None = None
    init: Text | None = None
    tokenizer: Text | None = None
    image: TowerConfig = TowerConfig()
    text: TowerConfig = TowerConfig()

    @model_validator(mode="after")
    def _named_or_inline(self) -> ModelConfig:
        inline = {"embed_dim": self.embed_dim, "vision_cfg": self.vision_cfg, "text_cfg": self.text_cfg}
        absent = [key for key, value in inline.items() if value is None]
        if self.name is not None and len(absent) < len(inline):
            raise refuse("both a name and an inline model_cfg are given", "keep one of the two")
        if self.name is None and absent:
            raise refuse(
                f"neither a name nor a complete inline model_cfg ({', '.join(absent)} missing)",
                "set model.name, for example ViT-B-32, or embed_dim, vision_cfg and text_cfg",
            )
        return self

    @property
    def spec(self) -> str | dict[str, Any]:
        """Returns what a model is built from: the name, or a fresh copy of the inline model_cfg."""
        if self.name is not None:
            return self.name
        inline: dict[str, Any] = {
            "embed_dim": self.embed_dim,
            "vision_cfg": dict(self.vision_cfg or {}),
            "text_cfg": dict(self.text_cfg or {}),
        }
        return inline if self.quick_gelu is None else {**inline, "quick_gelu": self.quick_gelu}


class ObjectiveConfig(Section):
    """One term of the loss. Everything besides name and weight belongs to the objective's own class."""

    model_config = ConfigDict(extra="allow")

    name: Text
    weight: Annotated[float, Field(ge=0)] = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Returns the options of the objective's own class, as written."""
        return dict(self.model_extra or {})


class CaptionConfig(Section):
    """Where captions are read: `txt`, or a path into the JSON member such as `json.caption`.

    A JSON list holds several captions, and with `lines: true` so does a text, one on each line: one of them
    is drawn. weight: how often the field is drawn, relative to the others.
    """

    field: Text = "txt"
    weight: Positive = 1.0
    lines: bool = False


class SourceConfig(Section):
    """Shards (paths, braces, globs or a folder) and their caption fields.

    weight: the part of the samples seen that are of this source; 7 and 3 mean the same as 0.7 and 0.3, and
    every batch is divided so, to within one sample. name: what its samples are counted under; by default the
    folder of the shards. missing: a sample without the field drawn for it gets one of the fields that it has
    (fallback), or is replaced and listed in rejects.jsonl (reject).

    In the place of shards may stand pairs as they are: a CSV, TSV or Parquet table with a row per image, or a
    folder of images with same-stem .txt files. Their shards are made once, and again when they change (see
    data.cache). image_root: folder or zip of a table's images, by default what lies beside it; image_key: its
    column of image paths. A caption field is then a column; `txt` means the captions as they are found.
    """

    shards: Shards
    image_root: Text | None = None
    image_key: Text | None = None
    captions: Annotated[tuple[CaptionConfig, ...], BeforeValidator(as_captions), Field(min_length=1)] = (
        CaptionConfig(),
    )
    missing: Literal["fallback", "reject"] = "fallback"
    weight: Positive = 1.0
    name: Text | None = None

    @field_validator("captions")
    @classmethod
    def _fields_once(cls, value: tuple[CaptionConfig, ...]) -> tuple[CaptionConfig, ...]:
        names = [caption.field for caption in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise refuse(f"the field {', '.join(twice)} is named twice", "name it once, with a larger weight")
        return value

    @property
    def source(self) -> Source:
        """Returns the section as the loader takes it."""
        return Source(
            shards=self.shards,
            captions=tuple(CaptionField(entry.field, entry.weight, entry.lines) for entry in self.captions),
            weight=self.weight,
            missing=self.missing,
            name=self.name,
            image_root=self.image_root,
            image_key=self.image_key,
        )


class StorageConfig(Section):
    """Where s3:, gs: and hf: addresses lead: an endpoint of your own, a region, a profile with the keys."""

    endpoint: Text | None = None
    region: Text | None = None
    profile: Text | None = None

    @property
    def storage(self) -> Storage:
        """Returns the section as the loader takes it."""
        return Storage(self.endpoint, self.region, self.profile)


class DataConfig(Section):
    """What is trained on. batch_size is GLOBAL; micro_batch is samples per rank and forward pass.

    uneven: take numbers of processes that do not divide lanes and batch; losses are weighted by rows;
    max_lost_chunks: how many chunks may stay unreadable, their samples replaced and listed in rejects.jsonl;
    on_no_range: a server that only sends whole files is refused, or read as a stream without an exact order;
    holdout: so many pairs (5000), or such a share of them (1%), picked by a hash of their keys, are never
    trained on and are the retrieval `holdout` of every evaluation; clipkit.data.holdout says which;
    cache: where shards of raw data are kept; None: .clipkit-cache beside it, or the user's cache folder;
    index_dir: a folder with the index that `clipkit index --out` made; index: lazy builds it while the first
    epoch is read, in an order of whole shards. Several sources in `train` make a mixture, whose epoch is as
    many samples as all of them hold, whichever they are from.
    """

    train: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_sources), Field(min_length=1)]
    holdout: Holdout = None
    batch_size: Count
    micro_batch: Count | None = None
    workers: Workers = Field(default_factory=default_workers)
    lanes: Count | None = None
    uneven: bool = False
    window_bytes: Count = 1 << 30
    max_pixels: Count = 64_000_000
    max_reject_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    max_consecutive: Count = 100
    max_lost_chunks: Whole = 0
    allow_pipe: bool = False
    on_no_range: Literal["refuse", "stream"] = "refuse"
    cache: Text | None = None
    index_dir: Text | None = None
    index: Literal["eager", "lazy"] = "eager"
    storage: StorageConfig = StorageConfig()
    crop_scale: Annotated[tuple[float, float], BeforeValidator(as_tuple)] | None = None
    recipes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    start_method: Literal["fork", "spawn", "forkserver"] | None = None

    @field_validator("train")
    @classmethod
    def _names_once(cls, value: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        named = [source.name for source in value if source.name is not None]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise refuse(f"two sources are called {', '.join(twice)}", "give each a name of its own")
        return value

    @field_validator("recipes")
    @classmethod
    def _recipes(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        try:
            read_recipes(value)
        except ConfigError as error:
            raise refuse(error.cause, error.cure) from error
        return value

    @field_validator("crop_scale")
    @classmethod
    def _crop(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0.0 < value[0] <= value[1] <= 1.0:
            raise refuse(
                f"not a range of areas: {list(value)}", "write [low, high] with 0 < low <= high <= 1"
            )
        return value

    @model_validator(mode="after")
    def _micro_fits(self) -> DataConfig:
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise refuse(
                f"micro_batch {self.micro_batch} exceeds batch_size {self.batch_size}",
                "batch_size is the global batch; micro_batch is a part of it on one process",
            )
        if self.lanes is not None and self.batch_size % self.lanes:
            raise refuse(
                f"lanes {self.lanes} does not divide batch_size {self.batch_size}",
                "choose a divisor of batch_size, or leave lanes out",
            )
        return self


class OptimConfig(Section):
    """AdamW and its schedule. lr None: 5e-4 from a batch of 16,384 on, 1e-3 below; final_lr: share of lr."""

    lr: Positive | None = None
    betas: Annotated[tuple[float, float], BeforeValidator(as_tuple)] = (0.9, 0.98)
    eps: Positive = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.2
    clip_norm: Positive | None = 1.0
    warmup: Warmup = "5%"
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0

    @field_validator("betas")
    @classmethod
    def _in_unit(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in value):
            raise refuse(f"a beta outside [0, 1): {list(value)}", "write for example [0.9, 0.98]")
        return value


class EvaluateConfig(Section):
    """One evaluation inside training; `name` labels its numbers (default: the last part of `data`).

    A probe reads pictures and labels alone, so it also tells how objectives without texts are doing.
    """

    task: Literal["zeroshot", "retrieval", "probe"]
    data: Text
    classnames: Text | None = None
    templates: Text | None = None
    name: Text | None = None

    @property
    def label(self) -> str:
        """Returns the name under which results are logged."""
        return self.name or Path(self.data).name or self.task


class RunConfig(Section):
    """Length, precision, seed and cadence. Exactly one of samples, epochs and steps.

    timeout: how long ranks wait for one that is missing, and each for its loader workers. max_skipped_steps:
    so many in a row end the run; None: 10, under fp16 50. on_spike: what a step does whose loss leaps
    (clipkit.train.spikes says when): warn; skip its update; or rollback, to the newest checkpoint and past
    the batches before the leap. background_save: checkpoints are written while training goes on, from a copy
    in host memory. sharding: none, every rank holds all weights (DDP); fsdp2, its rows of weights, gradients,
    moments and averages. resume_data: what becomes of the position in data that changed since; only `exact`
    never repeats a sample.
    trackers: get the numbers of metrics.jsonl as well; clipkit.train.trackers says how each continues.
    """

    dir: Text | None = None
    samples: Count | None = None
    epochs: Count | None = None
    steps: Count | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Whole = 0
    checkpoint_every: Every = "30min"
    keep_checkpoints: Count = 2
    background_save: bool = True
    evaluate_every: OptionalEvery = None
    evaluate: Annotated[tuple[EvaluateConfig, ...], BeforeValidator(as_tuple)] = ()
    trackers: Trackers = ()
    log_every: Count = 10
    diagnose_every: Count = 100
    weight_ema: WeightEma = "auto"
    world_size: Count | None = None
    deterministic: bool = False
    threads: Count | None = None
    max_skipped_steps: Count | None = None
    timeout: Duration = "30min"
    resume_data: Literal["exact", "restart_epoch", "continue_reseeded"] = "exact"
    sharding: Literal["none", "fsdp2"] = "none"
    on_spike: OnSpike = "warn"

    @model_validator(mode="after")
    def _shards_in_range(self) -> RunConfig:
        if self.sharding != "none" and self.precision == "fp16":
            raise refuse(
                "run.sharding with run.precision fp16: each rank would see overflow in its own rows only",
                "set run.precision to bf16 or fp32",
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        given = [key for key in ("samples", "epochs", "steps") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise refuse(
                f"exactly one of samples, epochs and steps is needed; found {found}",
                "keep one, for example `epochs: 6`",
            )
        labels = [entry.label for entry in self.evaluate]
        if len(set(labels)) < len(labels):
            raise refuse(
                f"two evaluations share a name ({', '.join(sorted(labels))})", "give each its own `name`"
            )
        return self
