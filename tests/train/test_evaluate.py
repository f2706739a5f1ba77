"""Evaluations of a run: none of them costs it a checkpoint, its export, or a line twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipkit.checkpoint import CheckpointStore
from clipkit.export import load
from clipkit.train import pretrain
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.conftest import Ranks
from tests.evaluation.layouts import captioned_csv, image_bytes, labelled_csv
from tests.train.runs import train, values

CAPTIONS = [[f"picture {number}"] for number in range(6)]


def evaluations(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["results"]) for line in lines if line.get("event") == "evaluation"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_corrupt_image_does_not_cost_the_run_its_export(
    tiny_shards: Path, tmp_path: Path, world: int, capfd: pytest.CaptureFixture[str]
) -> None:
    captioned_csv(tmp_path / "broken", CAPTIONS, zipped=False)
    captioned_csv(tmp_path / "whole", CAPTIONS)
    (tmp_path / "broken" / "images" / "5.png").write_bytes(image_bytes(5)[:60])
    entries = [{"task": "retrieval", "data": str(tmp_path / name)} for name in ("broken", "whole")]
    config = values(tiny_shards, tmp_path / "run", run__steps=4, run__weight_ema=False, run__evaluate_every=2)
    config["run"]["evaluate"] = entries
    (report, *_) = Ranks(world, train, config).values()
    found = evaluations(tmp_path / "run")
    assert [step for step, _ in found] == [2, 4]
    for _, results in found:
        assert "5.png" in results["broken"]["error"]
        assert "t2i_recall@1" in results["whole"]
    assert report["metrics"] == found[-1][1]
    assert load(tmp_path / "run" / "export").logit_scale > 0
    assert "warning: evaluation broken failed" in capfd.readouterr().err
    # The same command again has another look at what failed, and writes no second line about this step.
    (tmp_path / "broken" / "images" / "5.png").write_bytes(image_bytes(5))
    Ranks(world, train, config).values()
    again = evaluations(tmp_path / "run")
    assert [step for step, _ in again] == [2, 4]
    assert again[-1][1]["whole"] == found[-1][1]["whole"]
    assert "t2i_recall@1" in again[-1][1]["broken"]


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        ({"templates": "/no/such/templates.txt"}, ConfigError, "templates"),
        ({"classnames": "/no/such/names.txt"}, ConfigError, "names"),
        ({"classnames": "three.txt"}, DataError, "3 class names"),
    ],
)
def test_wrong_names_and_templates_fail_before_the_first_step(
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    kind: type[ClipkitError],
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.txt").write_text("a\nb\nc\n")
    entry = {"task": "zeroshot", "data": str(labelled_csv(tmp_path / "set", 6, ["one", "two"])), **changes}
    with pytest.raises(kind, match=word):
        pretrain(values(tiny_shards, tmp_path / "run", run__steps=2, run__evaluate=[entry]))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_evaluated_twice(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"task": "retrieval", "data": str(captioned_csv(tmp_path / "set", CAPTIONS)), "name": "a"}
    config = values(tiny_shards, tmp_path / "run", run__steps=3, run__evaluate=[entry])
    report = pretrain(config)
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("clipkit.train.loop.evaluate", None)
        again = pretrain(config)
    assert again["metrics"] == report["metrics"]
    assert "a" in again["metrics"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
    # Another set under another name is another question.
    config["run"]["evaluate"] = [{**entry, "name": "b"}]
    assert set(pretrain(config)["metrics"]) >= {"b"}
    assert [step for step, _ in evaluations(tmp_path / "run")] == [3]


def test_an_evaluation_that_was_killed_is_made_up_for(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"task": "retrieval", "data": str(captioned_csv(tmp_path / "set", CAPTIONS))}

    def config(name: str) -> dict[str, Any]:
        return values(
            tiny_shards,
            tmp_path / name,
            run__steps=6,
            run__checkpoint_every=3,
            run__evaluate_every=3,
            run__evaluate=[entry],
        )

    pretrain(config("straight"))
    assert [step for step, _ in evaluations(tmp_path / "straight")] == [3, 6]

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("clipkit.train.loop.evaluate", killed)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain(config("broken"))
    found = CheckpointStore(tmp_path / "broken" / "checkpoints").newest()
    assert found is not None
    assert found.step == 3
    pretrain(config("broken"))
    assert evaluations(tmp_path / "broken") == evaluations(tmp_path / "straight")


def test_an_evaluation_behind_the_checkpoint_survives_a_kill(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"task": "retrieval", "data": str(captioned_csv(tmp_path / "set", CAPTIONS))}
    config = values(
        tiny_shards,
        tmp_path / "run",
        run__steps=6,
        run__checkpoint_every=3,
        run__evaluate_every=3,
        run__evaluate=[entry],
    )

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        # The last save: by then the log holds what followed the checkpoint of step 3.
        save = CheckpointStore.save
        patched.setattr(
            CheckpointStore,
            "save",
            lambda self, step, **parts: killed() if step == 6 else save(self, step, **parts),
        )
        with pytest.raises(RuntimeError, match="killed"):
            pretrain(config)
    before = evaluations(tmp_path / "run")
    pretrain(config)
    after = evaluations(tmp_path / "run")
    assert [step for step, _ in after] == [3, 6]
    assert after[0] == before[0]
