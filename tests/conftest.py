"""Fixtures of the whole suite: one thread, no network, ranks by fork, a tiny model and tiny shards."""

from __future__ import annotations

import os

# Before torch is imported: with one OpenMP thread there is no thread pool that a forked rank could wait for.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import copy
import datetime
import io
import multiprocessing
import pickle
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if sys.dont_write_bytecode:
    # Every fresh process would compile torch and the rest again: 20 s instead of 9.
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parent.parent / ".pytest_cache" / "bytecode")
    del os.environ["PYTHONDONTWRITEBYTECODE"]
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

RANK_TIMEOUT_S = 240


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked slow, saying how to run them, unless -m chooses by marker."""
    for item in items if not config.option.markexpr else []:
        if item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.skip(reason=f"slow; run it with: pytest -m slow {item.nodeid}"))


def _rank_main(rank: int, world: int, rendezvous: str, send: Any, function: Any, arguments: Any) -> None:
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    # The forked copy of the parent's state would say that there is one process.
    AcceleratorState._reset_state(True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    # Accelerate insists on an address; the group below is there before anyone could use it.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=120),
        )
        value = function(rank, world, *arguments)
        dist.barrier()
        outcome = (True, value)
    except BaseException:
        outcome = (False, traceback.format_exc())
    try:
        # Plain pickle: torch's own way through pipes shares memory that ends with this process.
        send.send_bytes(pickle.dumps(outcome))
    finally:
        send.close()
        # Not a normal exit: the forked copy of pytest must not run the parent's exit handlers.
        os._exit(0)


class Ranks:
    """Real processes forked from this one: gloo, file rendezvous, one pipe each for what they return."""

    def __init__(self, world: int, function: Callable[..., Any], *arguments: Any) -> None:
        import torch

        torch.set_num_threads(1)
        context = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory()
        self.processes, self._pipes = [], []
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world, str(Path(self._folder.name) / "rendezvous"), send, function, arguments),
            )
            process.start()
            send.close()
            self.processes.append(process)
            self._pipes.append(receive)

    def kill(self) -> None:
        """Sends SIGKILL to every rank and waits until they are gone."""
        for process in self.processes:
            process.kill()
        self._reap()

    def _reap(self) -> None:
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def outcomes(self) -> list[tuple[bool, Any]]:
        """Returns (True, value) or (False, traceback) of each rank, once all have ended."""
        found: list[tuple[bool, Any]] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                found.append(
                    pickle.loads(pipe.recv_bytes())
                    if pipe.poll(RANK_TIMEOUT_S)
                    else (False, f"rank {rank} timed out")
                )
            except EOFError:
                found.append((False, f"rank {rank} died without a word"))
        self._reap()
        return found

    def values(self) -> list[Any]:
        """Returns what each rank returned; fails with the tracebacks of those that raised."""
        found = self.outcomes()
        failures = [str(value) for good, value in found if not good]
        assert not failures, "\n".join(failures)
        return [value for _, value in found]


def run_ranks_in_processes(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Returns `function(rank, world, *arguments)` of each rank."""
    return Ranks(world, function, *arguments).values()


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """`run_ranks(world, function, *arguments)` -> the value of each rank, from real processes."""
    return run_ranks_in_processes


TINY_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def tiny_model_cfg() -> dict[str, Any]:
    """An inline open_clip model_cfg: two native towers of two layers, 32 pixels, 16 tokens."""
    return copy.deepcopy(TINY_MODEL)


COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (40, 40, 210), "grey": (128, 128, 128)}


def write_tiny_shards(folder: Path, samples: int = 96, per_shard: int = 20, size: int = 32) -> Path:
    """Writes tars of noisy coloured squares with a caption, by tarfile alone; returns the folder."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    names = list(COLOURS)
    for first in range(0, samples, per_shard):
        with tarfile.open(folder / f"{first // per_shard:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_shard, samples)):
                name = names[int(generator.integers(len(names)))]
                noise = generator.integers(-25, 25, (size, size, 3))
                pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype("uint8")
                picture = io.BytesIO()
                Image.fromarray(pixels).save(picture, "png")
                caption = f"a {name} square, picture {number}".encode()
                for extension, content in (("png", picture.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five tars: 96 samples of 32 pixels (20 a shard, the last one 16)."""
    return write_tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def real_data() -> Path:
    """The folder of real test images, or a skip that says how to run the test."""
    folder = os.environ.get("CLIPKIT_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set CLIPKIT_REAL_DATA to the folder of real test images")
    return Path(folder)
