"""`load` and `export`: every kind of MODEL that the commands accept."""

from __future__ import annotations

from pathlib import Path

from clipkit.checkpoint import Checkpoint, CheckpointStore
from clipkit.data import ImageView
from clipkit.dist import World
from clipkit.export.open_clip import load_open_clip, rebuild, save_open_clip
from clipkit.export.open_clip import verify as verify_export
from clipkit.models import Model, Towers
from clipkit.models.tokenizer import has_tokenizer
from clipkit.models.weights import CONFIG_FILE, pretrained_document, pretrained_source
from clipkit.types import ClipkitError, ConfigError

CHECKPOINTS = "checkpoints"
RUN_CONFIG = "config.yaml"
EXPORTED_RUN_CONFIG = "clipkit_config.yaml"
RAW, AVERAGED = "towers.clip.", "ema.towers.clip."


def load(model: str | Path, *, device: str = "auto", precision: str = "fp32", weights: str = "auto") -> Model:
    """Returns a model ready for use.

    model      an exported directory, a run directory (its newest valid checkpoint), one checkpoint's
               directory, or an open_clip `name:tag` (the only kind that may download)
    device     "auto" (cuda, mps, cpu), or a torch device
    precision  fp32, bf16, or fp16 (CUDA only)
    weights    of a run: "ema", "raw", or "auto": averaged weights when the run keeps them
    Raises ConfigError when `model` is none of these, ClipkitError when what is there is damaged.
    """
    towers = load_towers(model, weights=weights)
    view = ImageView.from_preprocess(towers.preprocess_cfg, train=False)
    return Model(towers, view, device, precision, name=str(model))


def load_towers(model: str | Path, *, weights: str = "auto") -> Towers:
    """Returns the towers of a MODEL (see `load`) on the CPU, in evaluation mode."""
    if weights not in ("auto", "ema", "raw"):
        raise ConfigError(f"unknown weights {weights}", "use auto, ema or raw")
    path = Path(model)
    if (path / CONFIG_FILE).is_file():
        return load_open_clip(path)
    if (path / CHECKPOINTS).is_dir():
        newest = CheckpointStore(path / CHECKPOINTS, World()).newest()
        if newest is None:
            raise ConfigError(
                f"run directory {path} has no checkpoint yet", "wait for the first one, or name another run"
            )
        return _from_checkpoint(newest, path, weights)
    if (path / "trainer.json").is_file():
        found = CheckpointStore(path.parent, World()).open(path)
        return _from_checkpoint(found, path.parent.parent, weights)
    named = pretrained_source(str(model))
    if named is None:
        what = (
            "holds neither an exported model nor checkpoints"
            if path.is_dir()
            else "is no directory and no name:tag"
        )
        raise ConfigError(
            f"MODEL {model} {what}", "name an exported directory, a run directory, or an open_clip name:tag"
        )
    return rebuild(pretrained_document(*named), init=str(model))


def _from_checkpoint(checkpoint: Checkpoint, run: Path, weights: str) -> Towers:
    trainer = checkpoint.document("trainer")
    tensors = checkpoint.tensors("model")
    averaged = any(name.startswith(AVERAGED) for name in tensors)
    if weights == "ema" and not averaged:
        raise ConfigError(
            f"{checkpoint.path} holds no averaged weights", "use --weights raw, or train with run.weight_ema"
        )
    prefix = AVERAGED if averaged and weights != "raw" else RAW
    spec = trainer["tokenizer"]
    source = None
    if spec["kind"] != "byte_pair":
        kept = run / "tokenizer"
        source = str(kept) if has_tokenizer(kept) else spec["source"]
    towers = rebuild({key: trainer[key] for key in ("model_cfg", "preprocess_cfg")}, tokenizer=source)
    state = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    missing, unexpected = towers.clip.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ClipkitError(
            f"{checkpoint.path} holds another model than it says: {', '.join([*missing, *unexpected][:3])}",
            "load an older checkpoint of this run, or export from the machine that trained it",
        )
    return towers


def export(
    model: str | Path,
    out: str | Path,
    *,
    verify: bool = False,
    weights: str = "auto",
    hf_name: str | None = None,
) -> Path:
    """Writes a MODEL (see `load`) as an open_clip directory and returns its absolute path.

    verify   reload it in a fresh process with open_clip and demand equal embeddings, to the last bit
    hf_name  what open_clip shall look up for a transformers text tower (see `save_open_clip`)
    """
    towers = load_towers(model, weights=weights)
    config = Path(model) / RUN_CONFIG
    extra = {EXPORTED_RUN_CONFIG: config.read_text(encoding="utf-8")} if config.is_file() else {}
    path = save_open_clip(towers, out, extra_files=extra, hf_name=hf_name)
    if verify:
        verify_export(path, towers)
    return path
