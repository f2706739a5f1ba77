"""Small runs for the tests of training: one configuration, and ways to start it in processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipkit.train import pretrain
from tests.conftest import TINY_MODEL


def values(shards: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Configuration values of a run of 24 steps of 12 samples; `changes` are dotted keys with __ for dots."""
    config: dict[str, Any] = {
        "model": dict(TINY_MODEL),
        "objectives": [{"name": "clip"}],
        "data": {"train": str(shards), "batch_size": 12, "workers": 0},
        "optim": {"lr": 1e-3, "warmup": 1},
        "run": {
            "dir": str(folder),
            "steps": 24,
            "log_every": 1,
            "checkpoint_every": 5,
            "seed": 1,
        },
    }
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def train(rank: int, world: int, config: dict[str, Any], resume: str = "auto") -> dict[str, Any]:
    """Runs `pretrain` on one rank."""
    return pretrain(config, resume=resume)


def trace(folder: Path) -> dict[int, str]:
    """Returns step -> hexadecimal loss, the exact bits, from metrics.jsonl."""
    found: dict[int, str] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            assert record["step"] not in found, f"step {record['step']} is written twice"
            found[record["step"]] = float(record["loss"]).hex()
    return found


def columns(folder: Path) -> dict[str, list[Any]]:
    """Returns the values of every name in the step records of metrics.jsonl, in step order."""
    found: dict[str, list[Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items() if "loss" in record else ():
            found.setdefault(name, []).append(value)
    return found


def losses(folder: Path) -> list[float]:
    """Returns the losses in step order."""
    return [float.fromhex(value) for _, value in sorted(trace(folder).items())]


def weights(folder: Path) -> bytes:
    """Returns the bytes of the exported weights."""
    return (folder / "export" / "open_clip_model.safetensors").read_bytes()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the records of one kind of event in metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("event") == kind]


def saved(folder: Path, step: int) -> dict[str, bytes]:
    """Returns the bytes of weights and optimizer in the checkpoint of a step."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return {name: (checkpoint / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}
