"""Diagnostics while training: they say what is true, change nothing, and alarm when they should."""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from clipkit.evaluation import embed
from clipkit.learner import Couple, Learner, Pair
from clipkit.objectives import OBJECTIVES, build_objectives
from clipkit.train import loop, pretrain
from clipkit.train.watch import PATIENCE, STUCK_STEPS, Watch, distinct, text_hashes
from clipkit.types import Batch
from tests.conftest import Ranks, write_tiny_shards
from tests.train.runs import columns, trace, train, values, weights


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


@pytest.mark.parametrize(
    ("objective", "alarmed"),
    [
        ({"name": "clip"}, True),
        ({"name": "siglip", "views": {"image": "simclr"}}, True),
        ({"name": "unicl"}, False),
    ],
)
def test_duplicates_are_seen_across_ranks_and_point_to_unicl(
    tmp_path: Path, objective: dict[str, Any], alarmed: bool
) -> None:
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
    config["objectives"] = [objective]
    Ranks(2, train, config).values()
    assert events(tmp_path / "run", "diagnostics")[0]["values"]["duplicate_captions"] == 1.0
    alarms = events(tmp_path / "run", "alarm")
    # Pictures of one colour are near duplicates too; how often they are looked for depends on the speed.
    kinds = [alarm["alarm"] for alarm in alarms if alarm["alarm"] != "near duplicates"]
    assert kinds == ["duplicates"] * alarmed
    assert all(alarm["term"] == objective["name"] for alarm in alarms)


def test_pairs_are_found_whatever_their_views_are_called(tiny_shards: Path, tmp_path: Path) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=2, run__diagnose_every=2)
    config["objectives"] = [
        {"name": "clip", "views": {"image": "simclr", "text": "eda"}},
        {"name": "siglip", "own_scale": True},
        {"name": "simclr", "hidden": 16, "dim": 8},
        {"name": "infonce", "views": "eda"},
    ]
    pretrain(config)
    (record,) = events(tmp_path / "run", "diagnostics")
    assert {"similarity", "similarity/siglip"} <= record.keys()
    found = record["values"]
    for name in ("alignment", "near_duplicates", "duplicate_captions"):
        assert {name, f"{name}/siglip"} <= found.keys()
    for name in ("simclr", "infonce"):
        assert 0 <= found[f"alignment/{name}"] <= 4
        assert -8 <= found[f"uniformity/{name}"] <= 0


def test_objectives_say_which_views_they_compare_and_whether_they_push_duplicates_apart() -> None:
    entries: list[dict[str, Any]] = [
        {"name": "clip", "hard_captions": {"num": 2}},
        {"name": "siglip", "views": {"text": "json.recaption"}},
        {"name": "cyclip"},
        {"name": "unicl"},
        {"name": "unicl", "label": "cls"},
        {"name": "triplet"},
        {"name": "triplet", "label": "caption"},
        {"name": "triplet", "tower": "image", "label": "cls"},
        {"name": "distill", "teachers": "somewhere"},
        {"name": "simclr"},
        {"name": "infonce", "views": ["eda", "text"]},
    ]
    learner = Learner(torch.nn.Identity(), build_objectives(entries, OBJECTIVES))  # type: ignore[arg-type]
    assert [(pair.label, pair.text, pair.repels) for pair in learner.pairs] == [
        ("clip", "text", True),
        ("siglip", "json.recaption:0", True),
        ("cyclip", "text", True),
        ("unicl", "text", False),
        ("unicl_2", "text", True),
        ("triplet", "text", True),
        ("triplet_2", "text", False),
        ("distill", "text", False),
    ]
    for label, part, _ in (("simclr", "trunk", 0), ("infonce", "joint", 0)):
        learner.objectives[label].projector = torch.nn.Identity() if part == "trunk" else None
    assert learner.couples == [
        Couple("simclr", "simclr:0", "simclr:1", "trunk"),
        Couple("infonce", "eda:0", "text", "joint"),
    ]
    patient, plain, other = (
        Pair("unicl", "image", "text", False),
        Pair("clip", "image", "text", True),
        Pair("siglip", "image", "json.b:0", True),
    )
    assert distinct([patient, other, plain]) == {"": plain, "/siglip": other}


def test_heads_on_frozen_towers_are_looked_at(tiny_shards: Path, tmp_path: Path) -> None:
    config = values(tiny_shards, tmp_path / "run", run__steps=4, run__diagnose_every=2)
    config["objectives"] = [{"name": "simclr", "hidden": 16, "dim": 8}]
    config["data"]["lanes"] = 4
    config["model"] |= {"image": {"freeze": "all"}, "text": {"freeze": "all"}}
    pretrain(config)
    found = events(tmp_path / "run", "diagnostics")
    assert [line["step"] for line in found] == [2, 4]
    assert "alignment/simclr" in found[0]["values"]
    assert not any(name.startswith("gradient_share") for name in found[0]["values"])
    losses = columns(tmp_path / "run")["loss"]
    assert losses[0] != losses[-1]
    # With micro-batches the backward of the scores is the only one, and has to reach all ranks.
    for world, micro in ((1, 5), (2, 4)):
        config["run"]["dir"], config["data"]["micro_batch"] = str(tmp_path / f"run-{world}"), micro
        Ranks(world, train, config).values()
        assert columns(tmp_path / f"run-{world}")["loss"] == pytest.approx(losses, abs=1e-5)


def test_byol_without_its_predictor_collapses_and_is_caught(tiny_shards: Path, tmp_path: Path) -> None:
    for predictor in (False, True):
        folder = tmp_path / str(predictor)
        config = values(tiny_shards, folder, run__steps=60, optim__lr=0.06, run__checkpoint_every=1000)
        config["optim"]["schedule"] = "constant"
        config["data"]["batch_size"] = 24
        config["objectives"] = [
            {"name": "byol", "hidden": 64, "dim": 16, "momentum": 0.9, "predictor": predictor}
        ]
        pretrain(config)
        alarms = [(line["alarm"], line["term"]) for line in events(folder, "alarm")]
        assert alarms == ([] if predictor else [("collapsed", "byol")])
        assert (columns(folder)["spread/byol"][-1] > 0.5) == predictor


class Log:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)


class Words:
    pad_id = 0


class Towers:
    tokenizer = Words()


class Guessing:
    pairs: ClassVar = [Pair("clip", "image", "text", True)]
    couples: ClassVar[list[Couple]] = []
    towers = Towers()

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
    Watch(Guessing(), 200, log).look(7, batch, rows, {}, 1.0)  # type: ignore[arg-type]
    assert log.records[-1]["values"]["near_duplicates"] == pytest.approx(2 * copies / 200)
    assert [line["alarm"] for line in log.records[:-1]] == ["near duplicates"] * alarmed
    # Before training all rows are near each other, which says nothing about the data.
    near = {name: torch.nn.functional.normalize(x + 2, dim=1) for name, x in rows.items()}
    log.records.clear()
    Watch(Guessing(), 200, log).look(7, batch, near, {}, 1.0)  # type: ignore[arg-type]
    assert len(log.records) == 1


def test_looks_stay_below_a_hundredth_of_the_training() -> None:
    # Every look costs 0.3 s by this clock; a step of 2 s is looked at every ten steps.
    ticks = iter(range(1000))
    log, batch = Log(), Batch({}, {"text": torch.ones(8, 4).long()}, torch.arange(8), torch.arange(8), ())
    rows = {f"joint.{name}": torch.nn.functional.normalize(torch.randn(8, 4)) for name in ("image", "text")}
    watch = Watch(Guessing(), 8, log, clock=lambda: 0.3 * next(ticks))  # type: ignore[arg-type]
    for number in range(1, 41):
        watch.look(10 * number, batch, rows, {}, 20.0 * number)
    found = [record for record in log.records if record["event"] == "diagnostics"]
    skipped = [record["step"] for record in found if "skipped" in record]
    assert watch.spent < 0.01 * 800 + 0.3
    assert 10 < len(skipped) < 16
    assert "skipped" not in found[0]
    for record in found:
        assert ("alignment" in record["values"]) == ("skipped" not in record)
        # What all ranks do together is done at every look, whatever the clock of one of them says.
        assert record["values"]["duplicate_captions"] == 1.0


def _look_with_a_slow_main(rank: int, world: int, config: dict[str, Any]) -> None:
    if rank == 0:
        hours = iter(range(1000))
        loop.Watch = partial(Watch, clock=lambda: 3600.0 * next(hours))  # type: ignore[misc, assignment]
    pretrain(config)


def test_a_main_rank_that_skips_its_looks_stays_in_step(tiny_shards: Path, tmp_path: Path) -> None:
    for every in (1, 1000):
        config = values(tiny_shards, tmp_path / str(every), run__steps=5, run__diagnose_every=every)
        Ranks(2, _look_with_a_slow_main, config).values()
    found = events(tmp_path / "1", "diagnostics")
    assert ["skipped" in line for line in found] == [False, True, True, True, True]
    assert trace(tmp_path / "1") == trace(tmp_path / "1000")


def test_rows_are_gathered_where_the_ranks_can_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Tensor] = []

    def cuda(x: Tensor) -> Tensor:
        moved.append(x)
        return x

    class Two:
        size = 2

        @classmethod
        def current(cls) -> Two:
            return cls()

    monkeypatch.setattr(embed, "World", Two)
    monkeypatch.setattr(embed, "gather", lambda x: torch.cat([x, x]))
    monkeypatch.setattr(Tensor, "cuda", cuda)
    for backend, count in (("gloo", 0), ("nccl", 1)):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        assert embed.gather_rows(torch.arange(3)).tolist() == [0, 1, 2, 0, 1, 2]
        assert len(moved) == count


def test_equal_texts_have_equal_hashes_whatever_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 49408, (500, 8), generator=generator)
    rows[7] = rows[3]
    hashes = text_hashes(rows)
    assert len(hashes.unique()) == 499
    assert torch.equal(text_hashes(torch.nn.functional.pad(rows, (0, 8))), hashes)
    # Other vocabularies pad with another id.
    wide = torch.nn.functional.pad(rows, (0, 8), value=1)
    assert torch.equal(text_hashes(wide, 1), text_hashes(rows, 1))
    assert not torch.equal(text_hashes(wide), hashes)


def test_looking_costs_little(tiny_shards: Path, tmp_path: Path) -> None:
    # Process time of a look against that of a step; every hundredth step is looked at by default.
    from tests.train.costs import look_and_step_seconds

    for _ in range(3):
        look, step = look_and_step_seconds()
        if look < step:
            return
        time.sleep(1)
    assert look < step, f"a look takes {look:.4f} s, a step {step:.4f} s: more than 1 % at every hundredth"
