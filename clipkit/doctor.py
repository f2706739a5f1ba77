"""What this machine offers a run, and what would go wrong on it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "clipkit",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "transformers",
    "accelerate",
    "webdataset",
    "pydantic",
    "pillow",
    "numpy",
    "safetensors",
)
_MIN_FREE_DISK = 2 * 10**9  # bytes: the quickstart with its checkpoints needs about one
_MIN_MEMORY = 4 * 10**9  # bytes: what the quickstart may take at its peak
_MIN_FILES = 256  # open files: shards, workers and their pipes
_FONTS = 12  # DejaVu Sans, Sans Mono and Serif in four styles each


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `cure` is empty when nothing is wrong with it."""

    name: str
    value: str
    cure: str = ""


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _interpreter() -> list[Finding]:
    return [Finding("python", f"{platform.python_version()} on {platform.platform()}")]


def _packages() -> list[Finding]:
    findings = []
    for name in _PACKAGES:
        try:
            findings.append(Finding(name, version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, "not installed", "pip install uv && uv sync, or pip install -e ."))
    return findings


def _torchvision_ops() -> list[Finding]:
    cure = "install torch and torchvision together: pip install --force-reinstall torch torchvision"
    try:
        from torchvision.extension import _has_ops
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # a wheel built for another torch fails in any of these
        return [Finding("torchvision operators", f"cannot be loaded ({' '.join(str(error).split())})", cure)]
    if _has_ops():
        return [Finding("torchvision operators", "present")]
    return [Finding("torchvision operators", "missing: this torchvision was built for another torch", cure)]


def _devices() -> list[Finding]:
    import torch

    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        half = "bf16" if torch.cuda.is_bf16_supported() else "fp16 only"
        findings.append(
            Finding(f"cuda:{index}", f"{properties.name}, {_gigabytes(properties.total_memory)}, {half}")
        )
    if torch.version.cuda and not findings and shutil.which("nvidia-smi"):
        cure = "update the NVIDIA driver, or check CUDA_VISIBLE_DEVICES"
        findings.append(Finding("cuda", "a driver is installed, but torch sees no device", cure))
    if torch.backends.mps.is_available():
        findings.append(Finding("mps", "available"))
    return findings or [Finding("accelerator", "none: runs use the CPU")]


def _cores() -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return [Finding("cores", f"{usable} usable of {os.cpu_count()}, OMP_NUM_THREADS {threads}")]


def _memory_limit() -> int | None:
    """Bytes a container grants, None without a limit."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:  # not a container, or the other version of control groups
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _memory() -> list[Finding]:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return [Finding("memory", "unknown on this system")]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    granted = min(total, _memory_limit() or total)
    cure = (
        "" if granted >= _MIN_MEMORY else "the quickstart needs up to 4 GB; close programs or raise the limit"
    )
    return [Finding("memory", _gigabytes(granted), cure)]


def _disk() -> list[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    cure = "" if free >= _MIN_FREE_DISK else "free some space, or set run.dir to another disk"
    findings = [Finding("free disk", f"{_gigabytes(free)} in {here}", cure)]
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        findings.append(
            Finding("write access", f"none in {here} ({error.strerror})", "work in a directory of your own")
        )
    return findings


def _limits() -> list[Finding]:
    if sys.platform == "win32":
        return []
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cure = (
        ""
        if soft == resource.RLIM_INFINITY or soft >= _MIN_FILES
        else f"ulimit -n {min(4096, max(hard, 256))}"
    )
    findings = [Finding("open files", f"{soft} (at most {hard})", cure)]
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        cure = "" if free >= 10**8 else "start the container with --shm-size 2g, or use data.workers=0"
        findings.append(Finding("shared memory", f"{_gigabytes(free)} free", cure))
    return findings


def _fonts() -> list[Finding]:
    import matplotlib

    found = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf"))
    faces = [path for path in found if "Display" not in path.name]
    cure = "" if len(faces) >= _FONTS else "reinstall matplotlib: its wheel brings the DejaVu fonts"
    return [Finding("DejaVu fonts", f"{len(faces)} faces", cure)]


def _processes() -> list[Finding]:
    size = os.environ.get("WORLD_SIZE")
    if size is None:
        return [Finding("processes", "1 (several: torchrun --nproc_per_node 2 -m clipkit ...)")]
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    cure = f"set {', '.join(missing)}, or start with torchrun" if missing else ""
    return [Finding("processes", f"{size} (rank {os.environ.get('RANK', 'unknown')})", cure)]


def _hub() -> list[Finding]:
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    state = "offline: only local weights" if offline else "downloads allowed when a model name asks for them"
    return [Finding("model hub", state)]


_CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _interpreter,
    _packages,
    _torchvision_ops,
    _devices,
    _cores,
    _memory,
    _disk,
    _limits,
    _fonts,
    _processes,
    _hub,
)


def examine() -> list[Finding]:
    """Returns everything that was looked at, problems marked by a cure. Imports torch and matplotlib."""
    return [finding for check in _CHECKS for finding in check()]
