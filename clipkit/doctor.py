"""What this machine offers a run, and what would go wrong on it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.data.engine import usable_processors
from clipkit.types import ClipkitError, ConfigError

if TYPE_CHECKING:
    import torch

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
_WAIT_S = 60  # that ranks wait for one another here
_SIZES = (10**6, 64 * 10**6)  # bytes of the collectives that are timed
_NETWORK = "check the network between the machines (NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, firewalls)"
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
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    return [Finding("cores", f"{usable_processors()} usable of {os.cpu_count()}, OMP_NUM_THREADS {threads}")]


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


def granted_memory() -> int | None:
    """Returns the bytes of main memory that this process may use, None where the system does not say."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, _memory_limit() or total)


def _memory() -> list[Finding]:
    granted = granted_memory()
    if granted is None:
        return [Finding("memory", "unknown on this system")]
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


def examine_ranks(folder: Path) -> list[Finding]:
    """Returns what was found between the ranks, the same list on each; all of them call it under a launcher.

    folder: where a run directory would be, to see whether the ranks share its file system. Collectives are
    checked against the values that arithmetic says. Raises ConfigError on one process, ClipkitError naming
    the collective that failed.
    """
    import datetime

    from accelerate import PartialState

    from clipkit import dist

    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(
            "one process is running, and doctor --distributed looks at what is between several",
            "start it with a launcher, on every machine as the training will be started: "
            "torchrun --nproc_per_node 2 -m clipkit doctor --distributed",
        )
    try:
        device = PartialState(timeout=datetime.timedelta(seconds=_WAIT_S)).device
        described = dist.gather_objects(_describe_rank(device))
    except (RuntimeError, ValueError) as error:
        raise ClipkitError(f"the ranks cannot meet: {_first_line(error)}", _NETWORK) from error
    findings = _who(described)
    checks: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("all-reduce", lambda: _all_reduce(device)),
        ("gather", lambda: _gather(device)),
        ("run directory", lambda: _shared(folder)),
    )
    for name, check in checks:
        try:
            findings += check()
        except RuntimeError as error:
            raise ClipkitError(f"{name} failed: {_first_line(error)}", _NETWORK) from error
    return findings


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _describe_rank(device: torch.device) -> dict[str, Any]:
    import torch

    names = {"clipkit": version("clipkit"), "torch": torch.__version__}
    kind = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": str(device),
        "kind": kind,
        "versions": ", ".join(f"{name} {number}" for name, number in names.items()),
    }


def _who(ranks: list[dict[str, Any]]) -> list[Finding]:
    """Findings about world, backend, devices and versions, from the descriptions of all ranks."""
    import torch.distributed as group

    hosts = [rank["host"] for rank in ranks]
    machines = ", ".join(f"{host}: {hosts.count(host)}" for host in dict.fromkeys(hosts))
    # get_backend() says "undefined" where torch chose one per kind of device.
    backends = dict(part.split(":") for part in str(group.get_backend_config()).split(","))
    backend = backends.get(ranks[0]["device"].split(":")[0], "unknown")
    findings = [Finding("world", f"{len(ranks)} ranks ({machines})"), Finding("backend", backend)]
    taken: dict[tuple[str, str], int] = {}
    for number, rank in enumerate(ranks):
        place = (rank["host"], rank["device"])
        cure = ""
        if rank["device"].startswith("cuda") and taken.setdefault(place, number) != number:
            cure = f"shared with rank {taken[place]}: start as many processes per machine as it has GPUs"
        value = f"{rank['device']}{rank['kind']} on {rank['host']}, process {rank['pid']}"
        findings.append(Finding(f"rank {number}", value, cure))
    versions = list(dict.fromkeys(rank["versions"] for rank in ranks))
    cure = "install the same versions on every machine" if len(versions) > 1 else ""
    return [*findings, Finding("versions", " and ".join(versions), cure)]


def _verdict(name: str, right: bool) -> Finding:
    """A finding on which all ranks agree: which of them got another value than arithmetic says."""
    from clipkit import dist

    wrong = [str(rank) for rank, good in enumerate(dist.gather_objects(right)) if not good]
    value = f"wrong on rank {', '.join(wrong)}" if wrong else "the expected value on every rank"
    return Finding(name, value, "update torch and the driver; another NCCL_ALGO may help" if wrong else "")


def _all_reduce(device: torch.device) -> list[Finding]:
    import torch

    from clipkit import dist

    world = dist.World.current()
    own = torch.arange(1000.0, device=device) * (world.rank + 1)
    wanted = torch.arange(1000.0, device=device) * (world.size * (world.size + 1) / 2)
    right = torch.equal(dist.all_reduce_sum(own), wanted)
    return [_verdict("all-reduce", right), *_speeds("all-reduce", dist.all_reduce_sum, device, 1)]


def _gather(device: torch.device) -> list[Finding]:
    import torch

    from clipkit import dist

    world = dist.World.current()
    own = torch.arange(1000.0, device=device)[:, None] + 1000 * world.rank
    wanted = torch.arange(1000.0 * world.size, device=device)[:, None]
    right = torch.equal(dist.gather(own), wanted)
    return [_verdict("gather", right), *_speeds("gather", dist.gather, device, world.size)]


def _speeds(name: str, work: Callable[[Any], Any], device: torch.device, parts: int) -> list[Finding]:
    """Findings of the time of the slowest rank; each rank gives a `parts`-th of the bytes of the result."""
    import torch

    from clipkit import dist

    findings = []
    for count in _SIZES:
        x = torch.zeros(count // 4 // parts, 1, device=device)
        seconds = []
        for _ in range(4):
            dist.barrier()
            began = time.perf_counter()
            work(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        # The first one pays for connections.
        (slowest,) = dist.agree([min(seconds[1:])])
        speed = f"{count / slowest / 1e9:.2f} GB/s ({1e3 * slowest:.2f} ms)"
        findings.append(Finding(f"{name} of {count / 1e6:.0f} MB", speed))
    return findings


def _shared(folder: Path) -> list[Finding]:
    """A finding on whether a file that rank 0 writes into the folder is there for every rank."""
    from clipkit import dist

    there = folder.absolute()
    while not there.is_dir():
        there = there.parent
    probe = there / dist.gather_objects(f".clipkit-doctor-{uuid.uuid4().hex}")[0]
    failure = ""
    main = dist.World.current().is_main
    if main:
        try:
            probe.write_text("clipkit")
        except OSError as error:
            failure = f"cannot be written to ({error.strerror})"
    dist.barrier()
    seen = [
        rank for rank, (_, found) in enumerate(dist.gather_objects((str(there), probe.is_file()))) if found
    ]
    unseen = [rank for rank in range(dist.World.current().size) if rank not in seen]
    if main:
        probe.unlink(missing_ok=True)
    failure = dist.gather_objects(failure)[0]
    if not failure and unseen:
        failure = f"rank {', '.join(map(str, unseen))} does not see what rank 0 writes"
    path = dist.gather_objects(str(there))[0]
    cure = "set run.dir to a folder on a file system that all machines share" if failure else ""
    return [Finding("run directory", f"{path}: {failure or 'shared by all ranks'}", cure)]
