"""Runs that die where a test says, and what must be true of what they leave behind."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipkit.checkpoint import CheckpointStore
from clipkit.train import pretrain
from tests.checkpoint.children import WATCHED
from tests.conftest import Ranks
from tests.train.runs import trace, weights
from tests.train.test_one_big_batch import model

ARRIVAL_S = 240


def dropping() -> dict[str, Any]:
    """A model_cfg of two small towers that both draw random numbers in every step."""
    cfg = model("roberta_dropout")
    roberta = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    cfg["text_cfg"]["hf_config"] = {**cfg["text_cfg"]["hf_config"], **roberta}
    cfg["vision_cfg"] |= {"width": 16, "layers": 1, "patch_dropout": 0.5}
    return {**cfg, "embed_dim": 8}


def vanish() -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(number: int) -> None:
    """Makes this process vanish before the `number`-th call to the disk of its first save.

    Counted are the calls of the thread that saves, in the order of the interpreter's own events, and fsync.
    """
    saver, calls, plain = 0, 0, CheckpointStore.save

    def count() -> None:
        nonlocal calls
        if threading.get_ident() == saver:
            calls += 1
            if calls == number:
                vanish()

    def hook(event: str, arguments: Any) -> None:
        if event in WATCHED:
            count()

    def save(self: CheckpointStore, step: int, **parts: Any) -> Path:
        nonlocal saver
        first = calls == 0
        saver = threading.get_ident() if first else 0
        try:
            return plain(self, step, **parts)
        finally:
            saver = 0

    CheckpointStore.save = save  # type: ignore[method-assign]
    # What a killed process gave to the kernel is not lost: here fsync is a point in time, no more.
    os.fsync = lambda descriptor: count()
    sys.addaudithook(hook)


def die_in_evaluation(moment: str) -> None:
    """Makes this process vanish "before" its first evaluation, "inside" it, "unlogged" or "logged"."""
    from clipkit.log import RunLog
    from clipkit.train import evaluate, loop

    if moment == "before":
        loop.evaluate = lambda *_: vanish()  # type: ignore[assignment]
    elif moment == "inside":
        embed, calls = evaluate.TrainingEncoder.encode_text, 0

        def second(self: Any, tokens: Any) -> Any:
            nonlocal calls
            calls += 1
            return vanish() if calls == 2 else embed(self, tokens)

        evaluate.TrainingEncoder.encode_text = second  # type: ignore[method-assign]
    else:
        write = RunLog.evaluation

        def logged(self: RunLog, *arguments: Any) -> None:
            if moment == "logged":
                write(self, *arguments)
            vanish()

        RunLog.evaluation = logged  # type: ignore[method-assign]


def _dying(
    rank: int, world: int, config: dict[str, Any], victim: int, arm: Callable[..., None], *how: Any
) -> None:
    if rank == victim:
        arm(*how)
    pretrain(config)


def run_until_killed(
    config: dict[str, Any], world: int, victim: int, arm: Callable[..., None], *how: Any
) -> bool:
    """Runs `pretrain` on `world` ranks, of which `victim` is to vanish; returns whether it did.

    The other ranks are killed as soon as it has. False: it ran to its end, and so did they.
    """
    ranks = Ranks(world, _dying, config, victim, arm, *how)
    process = ranks.processes[victim]
    process.join(ARRIVAL_S)
    if process.exitcode == -signal.SIGKILL:
        ranks.kill()
        return True
    ranks.values()
    return False


def run_until_step(config: dict[str, Any], world: int, step: int, draw: random.Random) -> None:
    """Runs `pretrain` and kills all ranks at a random moment of the step after line `step` of the log."""
    from tests.train.runs import train

    metrics = Path(config["run"]["dir"]) / "metrics.jsonl"
    ranks = Ranks(world, train, config)
    began, deadline = time.monotonic(), time.monotonic() + ARRIVAL_S
    seen: list[float] = []
    while (reached := last_step(metrics)) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        assert any(process.is_alive() for process in ranks.processes), ranks.values()
        if reached > len(seen):
            seen.append(time.monotonic() - began)
        time.sleep(0.002)
    # The length of a step is known from the log's own times, as far as this process saw them.
    time.sleep(draw.random() * (seen[-1] - seen[0]) / max(1, len(seen) - 1) if len(seen) > 1 else 0.01)
    ranks.kill()


def last_step(metrics: Path) -> int:
    """The last step whose line is whole; 0 for none."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    steps = [json.loads(line).get("step", 0) for line in lines if b'"loss"' in line]
    return max(steps, default=0)


def check_left(folder: Path, straight: dict[int, str]) -> None:
    """Asserts that a killed run has so far trained what the uninterrupted one has, and can go on from it.

    At most the last line of its log is torn.
    """
    log = folder / "metrics.jsonl"
    if log.exists():
        content = log.read_bytes()
        log.write_bytes(content[: content.rfind(b"\n") + 1])
        found = trace(folder)
        assert found == {step: straight[step] for step in found}
        assert list(found) == list(range(1, len(found) + 1)), "no step is missing"
        log.write_bytes(content)


def check_same(folder: Path, straight: Path) -> None:
    """Asserts that two finished runs have the same losses and the same weights, to the last bit."""
    assert trace(folder) == trace(straight)
    assert weights(folder) == weights(straight)
