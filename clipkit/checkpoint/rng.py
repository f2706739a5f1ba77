"""The global random generators, to tensors and back, exactly and without pickle."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from clipkit.types import ClipkitError


def capture_rng() -> dict[str, Tensor]:
    """Returns the states of python's, numpy's (legacy global) and torch's generators of all devices."""
    version, words, gauss = random.getstate()
    if version != 3:
        raise ClipkitError(
            f"random.getstate() is of version {version}",
            "use a Python that clipkit supports",
        )
    numpy_state = np.random.get_state(legacy=False)
    if numpy_state["bit_generator"] != "MT19937":
        raise ClipkitError(
            "numpy's global generator was replaced",
            "do not call numpy.random.set_bit_generator in a run",
        )
    mersenne = numpy_state["state"]
    state = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.words": torch.from_numpy(mersenne["key"].astype(np.int64)),
        "numpy.position": torch.tensor([mersenne["pos"], numpy_state["has_gauss"]], dtype=torch.int64),
        "numpy.gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            state[f"torch.cuda.{index}"] = torch.cuda.get_rng_state(index)
    if torch.backends.mps.is_available():
        state["torch.mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Tensor]) -> None:
    """Sets the generators to a state of `capture_rng`; devices that this machine lacks are left out."""
    gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python.words"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy.position"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {
                "key": state["numpy.words"].numpy().astype(np.uint32),
                "pos": position,
            },
            "has_gauss": has_gauss,
            "gauss": state["numpy.gauss"].item(),
        }
    )
    torch.set_rng_state(state["torch.cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"torch.cuda.{index}" in state:
                torch.cuda.set_rng_state(state[f"torch.cuda.{index}"], index)
    if torch.backends.mps.is_available() and "torch.mps" in state:
        torch.mps.set_rng_state(state["torch.mps"])


def derive_rng(seed: int, step: int, rank: int) -> None:
    """Seeds every generator from (seed, step, rank): what a rank does that has no saved state of its own."""
    digest = hashlib.blake2b(f"clipkit rng {seed} {step} {rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "big")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)
