"""Diagnostics while training: they say what is true, change nothing, and alarm when they should."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from clipkit.train.watch import PATIENCE, STUCK_STEPS, Watch, text_hashes
from clipkit.types import Batch
from tests.conftest import Ranks, write_tiny_shards
from tests.train.runs import trace, train, values, weights


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == kind]


def test_looking_changes_nothing(tiny_shards: Path, tmp_path: Path) -> None:
    # Micro-batches in one of two: both ways of computing a step are looked at.
    for micro in (None, 5):
        for every in (3, 1000):
            folder = tmp_path / f"{micro}-{every}"
            config = values(tiny_shards, folder, run__steps=9, run__diagnose_every=every)
            config["objectives"] = [{"name": "clip"}, {"name": "infonce", "views": "eda", "weight": 0.5}]
            config["data"]["micro_batch"] = micro
            Ranks(2, train, config).values()
        one, other = (tmp_path / f"{micro}-{every}" for every in (3, 1000))
        assert trace(one) == trace(other)
        assert weights(one) == weights(other)
        found = events(one, "diagnostics")
        assert [line["step"] for line in found] == [3, 6, 9]
        assert events(other, "diagnostics") == []
        shares = [found[0]["values"][f"gradient_share/{name}"] for name in ("clip", "infonce")]
        assert sum(shares) == pytest.approx(1)
        assert 0.01 < shares[0] < 0.99
        assert found[0]["values"]["duplicate_captions"] == 0.0


def test_duplicates_are_seen_across_ranks_and_point_to_unicl(tmp_path: Path) -> None:
    import tarfile

    shards = write_tiny_shards(tmp_path / "numbered", samples=24)
    (tmp_path / "same").mkdir()
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as source, tarfile.open(tmp_path / "same" / path.name, "w") as target:
            for member in source.getmembers():
                content = source.extractfile(member)
                assert content is not None
                if member.name.endswith(".txt"):
                    import io

                    text = f"picture {int(member.name[:6]) // 12}".encode()
                    member.size = len(text)
                    target.addfile(member, io.BytesIO(text))
                else:
                    target.addfile(member, content)
    config = values(tmp_path / "same", tmp_path / "run", run__steps=4, run__diagnose_every=2)
    Ranks(2, train, config).values()
    assert events(tmp_path / "run", "diagnostics")[0]["values"]["duplicate_captions"] == 1.0
    (alarm,) = events(tmp_path / "run", "alarm")
    assert alarm["alarm"] == "duplicates"


class Log:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)


class Guessing:
    weights: ClassVar = {"clip": 1.0}

    def chance(self, label: str, rows: int) -> float | None:
        return math.log(rows) if label == "clip" else None


def test_collapse_and_a_loss_at_chance_sound_once() -> None:
    log = Log()
    watch = Watch(Guessing(), 64, log)  # type: ignore[arg-type]
    for number in range(PATIENCE + 3):
        watch.record(10 * number, {"loss/byol": 0.1, "spread/byol": 0.03, "logit_scale": 14.0})
    assert [line["alarm"] for line in log.records] == ["collapsed"]
    assert "predictor" in log.notes[0]
    for step in range(100, 100 + STUCK_STEPS + 50, 10):
        watch.record(step, {"loss/clip": math.log(64) + 0.01, "logit_scale": 14.0})
    assert [line["alarm"] for line in log.records] == ["collapsed", "stuck"]
    assert all(word in log.notes[1] for word in ("learning rate", "captions", "duplicates"))


def test_a_healthy_run_raises_no_alarm() -> None:
    log = Log()
    watch = Watch(Guessing(), 64, log)  # type: ignore[arg-type]
    for step in range(0, 3000, 10):
        # One bad value among good ones, and a loss that passes chance on its way down.
        spread = 0.05 if step % 30 == 0 else 0.8
        loss = math.log(64) if step < 400 else 3.0
        watch.record(
            step, {"loss/clip": loss, "spread/byol": spread, "logit_scale": 99.95 if step < 900 else 50}
        )
    assert log.records == []


@pytest.mark.parametrize(("copies", "alarmed"), [(0, False), (1, False), (4, True)])
def test_near_duplicates_are_pairs_alike_in_picture_and_caption(copies: int, alarmed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for name in ("image", "text"):
        x = torch.randn(200, 32, generator=generator)
        # Alike but not equal, in rows that come in couples; captions alone are alike in a third of the rows.
        x[:copies] = x[100 : 100 + copies] + 0.01 * torch.randn(copies, 32, generator=generator)
        if name == "text":
            x[50:80] = x[150:180]
        rows[f"joint.{name}"] = torch.nn.functional.normalize(x, dim=1)
    log, batch = Log(), Batch({}, {}, torch.arange(200), torch.arange(200), ())
    Watch(Guessing(), 200, log).look(7, batch, rows, {})  # type: ignore[arg-type]
    assert log.records[-1]["values"]["near_duplicates"] == pytest.approx(2 * copies / 200)
    assert [line["alarm"] for line in log.records[:-1]] == ["near duplicates"] * alarmed
    # Before training all rows are near each other, which says nothing about the data.
    near = {name: torch.nn.functional.normalize(x + 2, dim=1) for name, x in rows.items()}
    log.records.clear()
    Watch(Guessing(), 200, log).look(7, batch, near, {})  # type: ignore[arg-type]
    assert len(log.records) == 1


def test_equal_texts_have_equal_hashes_whatever_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 49408, (500, 8), generator=generator)
    rows[7] = rows[3]
    hashes = text_hashes(rows)
    assert len(hashes.unique()) == 499
    assert torch.equal(text_hashes(torch.nn.functional.pad(rows, (0, 8))), hashes)


def test_looking_costs_little(tiny_shards: Path, tmp_path: Path) -> None:
    # Process time of a look against that of a step; every hundredth step is looked at by default.
    from tests.train.costs import look_and_step_seconds

    for _ in range(3):
        look, step = look_and_step_seconds()
        if look < step:
            return
        time.sleep(1)
    assert look < step, f"a look takes {look:.4f} s, a step {step:.4f} s: more than 1 % at every hundredth"
