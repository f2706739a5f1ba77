"""A run whose data, seed or batch changed: refused, or continued as run.resume_data says, and recorded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipkit.data.continuing import open_continued
from clipkit.data.loader import LoaderOptions, Source, TrainStream, open_train
from clipkit.data.text import TextView
from clipkit.dist import World
from clipkit.train import pretrain
from clipkit.types import ConfigError
from tests.data.makers import ByteTokenizer
from tests.train.runs import trace, values


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("event") == name]


def keys_of(stream: Any, start: int, stop: int) -> list[list[str]]:
    return [list(batch.keys) for batch in stream.batches(start, stop)]


def test_changed_data_is_refused_or_continued_as_the_user_says(tiny_shards: Path, tmp_path: Path) -> None:
    one = values(tiny_shards, tmp_path / "one", run__steps=6, run__checkpoint_every=3)
    pretrain(one)
    first = str(tmp_path / "one" / "checkpoints" / "step-00000003")
    for name in ("auto", first):
        with pytest.raises(ConfigError, match=r"other values of run\.seed: 1 -> 2") as caught:
            pretrain({**one, "run": {**one["run"], "seed": 2}}, resume=name)
        assert "run.resume_data" in caught.value.cure
    # Another seed from step 3 on, by both ways, recorded in the run; a kill later continues it exactly.
    for way in ("restart_epoch", "continue_reseeded"):
        changed = values(tiny_shards, tmp_path / way, run__steps=6, run__checkpoint_every=1, run__seed=2)
        changed["run"]["resume_data"] = way
        pretrain(changed, resume=first)
        told = events(tmp_path / way, "data_changed")
        assert [(line["step"], line["resume_data"]) for line in told] == [(3, way)]
        assert "seed: 1 -> 2" in told[0]["cause"]
        kept = trace(tmp_path / way)
        assert sorted(kept) == [4, 5, 6]
        assert kept[4] != trace(tmp_path / "one")[4]
        for step in ("step-00000006", "latest"):
            path = tmp_path / way / "checkpoints" / step
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(tmp_path / way / "export")
        pretrain(changed)
        assert trace(tmp_path / way) == kept
    assert trace(tmp_path / "restart_epoch") != trace(tmp_path / "continue_reseeded")


def test_another_batch_continues_elsewhere_at_the_same_sample_count(
    tiny_shards: Path, tmp_path: Path
) -> None:
    one = values(tiny_shards, tmp_path / "one", run__steps=6, run__checkpoint_every=4)
    pretrain(one)
    named = str(tmp_path / "one" / "checkpoints" / "step-00000004")
    two = values(tiny_shards, tmp_path / "two", run__steps=4, data__batch_size=24)
    with pytest.raises(ConfigError, match=r"data\.batch_size: 12 -> 24") as caught:
        pretrain(two, resume=named)
    assert "--resume PATH" in caught.value.cure
    two["run"]["resume_data"] = "restart_epoch"
    done = pretrain(two, resume=named)
    # 48 samples were seen: two batches of 24 of them, two more to train.
    assert (done["steps"], done["samples"]) == (4, 96)
    assert sorted(trace(tmp_path / "two")) == [3, 4]
    # In its own directory steps have been counted in the old batch.
    home = {**one, "data": {**one["data"], "batch_size": 24}}
    home["run"] = {**one["run"], "resume_data": "restart_epoch"}
    with pytest.raises(ConfigError, match=r"data\.batch_size"):
        pretrain(home)


@pytest.mark.parametrize("way", ["restart_epoch", "continue_reseeded"])
def test_a_restarted_epoch_is_whole(tiny_shards: Path, way: str) -> None:
    view = TextView(tokenizer=ByteTokenizer(), context_length=24, trim="argmax")

    def opener(options: LoaderOptions, saved: dict[str, Any] | None) -> TrainStream:
        return open_train(options, [], [view], World(), saved=saved)

    options = LoaderOptions(Source(str(tiny_shards)), batch_size=12, seed=1)
    stream = opener(options, None)
    per_epoch = stream.steps_per_epoch
    saved = stream.state(per_epoch + 2)
    again = open_continued(opener, replace(options, seed=7), saved, way)
    assert again.changed is not None
    assert again.state(per_epoch + 2)["batch_in_epoch"] == 0
    start = per_epoch + 2
    epoch = keys_of(again, start, start + per_epoch)
    assert again.ends_epoch(start + per_epoch)
    assert not again.ends_epoch(start + 1)
    found = [key for batch in epoch for key in batch]
    assert len(set(found)) == len(found) == per_epoch * 12
    fresh = opener(replace(options, seed=7), None)
    same = epoch == keys_of(fresh, per_epoch, 2 * per_epoch)
    assert same == (way == "restart_epoch")
    # What it saves is continued exactly, with the configuration as it is now.
    later = again.state(start + 1)
    third = open_continued(opener, replace(options, seed=7), later, "exact")
    assert third.changed is None
    assert keys_of(third, start + 1, start + per_epoch) == epoch[1:]
