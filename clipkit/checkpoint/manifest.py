"""The files of one checkpoint: written durably, listed with size and hash in `manifest.json`, checked."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"

# Tensors that never change in a run lie beside its checkpoints, named by what they hold.
_FIXED = re.compile(r"\.\./([a-z0-9_]+)-[0-9a-f]{16}\.safetensors")

# Dtypes that torch can compare on every device; the narrower floats hold no weights of a training run.
_CHECKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


_KEYS = {"step": int, "sequence": int, "world_size": int, "files": dict, "identity": dict}


class Defect(Exception):
    """Why a directory is not a complete checkpoint, in a few words without its path."""


def sync_folder(folder: Path) -> None:
    """Makes the entries of `folder` (creations and renames inside it) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Writes a new file durably and returns its record `{bytes, sha256}`."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_json(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a JSON document durably and returns its record."""
    return write_bytes(path, (json.dumps(document, indent=1) + "\n").encode())


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors as safetensors takes them: on the CPU, contiguous, no two of them sharing memory.

    Tied tensors are copied, so that each name can be read back by itself. Tensors that already fit are
    returned as they are, not copied.
    """
    hosted: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        if storage in seen:
            plain = plain.clone()
        elif storage:
            seen.add(storage)
        hosted[name] = plain
    return hosted


def refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor with a NaN or +inf (-inf is an ordinary attention mask)."""
    for name, tensor in tensors.items():
        if tensor.dtype in _CHECKED_DTYPES and not bool((tensor < torch.inf).all()):
            raise ValueError(f"{name} holds values that are not finite")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file durably, readable as the umask says, and returns its record."""
    # safetensors creates its files with mode 0600; an ordinary creation tells the mode that the umask wants.
    path.touch(exist_ok=False)
    mode = path.stat().st_mode & 0o7777
    save_file(on_host(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
    return record_of(path)


def record_of(path: Path) -> dict[str, Any]:
    """Makes a file durable and returns its record."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def fixed_name(stem: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns the name, relative to a checkpoint, of the file that holds these tensors for a whole run."""
    digest = hashlib.sha256()
    for name, x in sorted(on_host(tensors).items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"../{stem}-{digest.hexdigest()[:16]}.safetensors"


def holds(path: Path, stem: str) -> bool:
    """Returns whether a file of fixed tensors is there and holds what its name says."""
    try:
        return path.is_file() and fixed_name(stem, load_file(path)) == f"../{path.name}"
    except (OSError, SafetensorError):
        return False


def fixed_stem(name: str) -> str | None:
    """Returns the stem of a file of fixed tensors, None for the name of any other file."""
    match = _FIXED.fullmatch(name)
    return match[1] if match else None


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide about numbers and files."""
    found = {"python": platform.python_version()}
    for name in ("clipkit", "torch", "open_clip_torch", "safetensors", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _own_hash(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path,
    *,
    step: int,
    sequence: int,
    world_size: int,
    files: Mapping[str, Mapping[str, Any]],
    identity: Mapping[str, Any],
) -> None:
    """Writes `manifest.json` last: a directory without it is no checkpoint.

    `sequence` counts the saves of a run; it, not the step, says which checkpoint is the newest, because a
    run that was rolled back saves lower steps later.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "sequence": sequence,
        "world_size": world_size,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "identity": dict(identity),
        "files": {name: dict(record) for name, record in sorted(files.items())},
    }
    # Through JSON once, so that the hash is that of what a reader will see (tuples become lists).
    manifest = json.loads(json.dumps(manifest))
    write_json(folder / MANIFEST, {**manifest, "sha256": _own_hash(manifest)})


def _parse(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise Defect(f"has no {MANIFEST}: it is not a complete checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise Defect(f"{MANIFEST} is not JSON") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint directory; raises Defect when it cannot be trusted.

    An OSError other than a missing file passes: the manifest may be fine and the disk not.
    """
    manifest = _parse(folder)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise Defect(f"{MANIFEST} is not that of a checkpoint")
    if manifest["format"] > FORMAT:
        raise Defect(f"was written by a newer clipkit (format {manifest['format']}, this one reads {FORMAT})")
    if manifest.get("sha256") != _own_hash(manifest):
        raise Defect(f"{MANIFEST} was changed after it was written (its own hash differs)")
    well_formed = all(isinstance(manifest.get(key), kind) for key, kind in _KEYS.items())
    if not well_formed or any(Path(n).name != n and fixed_stem(n) is None for n in manifest["files"]):
        raise Defect(f"{MANIFEST} is not that of a checkpoint")
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> None:
    """Raises Defect naming the first file that is missing, cut or changed."""
    for name, record in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != record["bytes"]:
                raise Defect(f"{name} has {size} bytes instead of {record['bytes']}")
            if hashes:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != record["sha256"]:
                    raise Defect(f"{name} was changed after it was written (sha256 differs)")
        except FileNotFoundError:
            where = "" if fixed_stem(name) is None else " (it lies beside the checkpoints of its run)"
            raise Defect(f"{Path(name).name} is missing{where}") from None
        except OSError as error:
            raise Defect(f"{name} cannot be read ({error.strerror})") from error
