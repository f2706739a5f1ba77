"""The machine as a proposal needs it: device, memory, precision, processors, and a model's speed on it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipkit.data.engine import usable_processors
from clipkit.doctor import granted_memory

_SLOWER = 1.5  # bf16 on a CPU is taken when it is at least not slower; emulation is slower by far


@dataclass(frozen=True)
class Machine:
    """What a run would use: one device. memory: its bytes, None where the system does not say."""

    device: str
    name: str
    memory: int | None
    precision: str
    why_precision: str
    processors: int


@dataclass(frozen=True)
class Speed:
    """Measured steps. rows: samples of a batch; memory: peak in bytes, of a CPU with everything loaded."""

    rows: int
    samples_per_s: float
    memory: int


def look_at_machine() -> Machine:
    """Returns what this machine offers one process. Imports torch."""
    import torch

    processors = usable_processors()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return Machine(
            "cuda", properties.name, properties.total_memory, precision, "supported by the GPU", processors
        )
    if torch.backends.mps.is_available():
        return Machine("mps", "Apple GPU", granted_memory(), "fp32", "safe on mps", processors)
    from clipkit.train.setup import bf16_slowdown

    slowdown = bf16_slowdown(torch.device("cpu"))
    precision = "bf16" if slowdown < 1 / _SLOWER else "fp32"
    why = f"bf16 takes {slowdown:.1f} x the time of fp32 on this processor (measured)"
    return Machine("cpu", "CPU", granted_memory(), precision, why, processors)


def measure(values: Mapping[str, Any]) -> Speed | None:
    """Returns the speed of a few real steps of a configuration; None when a GPU has no room for its batch."""
    import torch

    from clipkit.train import pretrain

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        report = pretrain(dict(values), dry_run=True)
    except torch.OutOfMemoryError:
        report = None  # the smaller batch that was measured before stands
    # The model of this attempt must not count as memory of the next one.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if report is None:
        return None
    return Speed(values["data"]["batch_size"], report["samples_per_s"], report["memory_bytes"])
