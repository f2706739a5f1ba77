"""Sharded training gives the numbers of one process, and its checkpoints fit any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import clipkit
from clipkit import dist
from clipkit.checkpoint import CheckpointStore, load_module_tensors, part_rows
from clipkit.config import make_config
from clipkit.dist import World
from clipkit.models.ema import WeightEMA
from clipkit.models.towers import build
from clipkit.train import pretrain
from clipkit.train.setup import make_accelerator, wrap
from clipkit.train.sharding import repeated, shard
from clipkit.train.step import step
from clipkit.types import ConfigError
from tests.checkpoint.children import flip_byte
from tests.conftest import Ranks
from tests.evaluation.layouts import captioned_csv
from tests.train.runs import losses, trace, train, values, weights
from tests.train.test_evaluate import CAPTIONS, evaluations
from tests.train.test_one_big_batch import TOLERANCE, batch_of, make, model
from tests.train.test_resume import kill_at

CLIP_NORM = 0.05
SHARDED = {"run__sharding": "fsdp2"}


def two_clipped_steps(
    rank: int, world: int, kind: str, micro: int | None, sharded: bool, precision: str = "fp32"
) -> dict[str, Tensor]:
    """Loss, gradient norm, and all weights, averages and buffers after each of two clipped steps, whole."""
    accelerator = make_accelerator(precision)
    bare, views = make(kind, "clip")
    if precision != "fp32":
        bare.float()
    bare.towers.freeze("text", "trunk")
    with torch.no_grad():
        bare.towers.logit_scale.fill_(4.6)  # near its limit, log 100
    bare.ema = WeightEMA(bare.towers, 0.9)
    if sharded:
        shard(bare, accelerator.device)
        own = sum(dist.own_rows(x).numel() for x in bare.parameters())
        assert own < 0.6 * sum(x.numel() for x in bare.parameters())
    trained = [x for x in bare.parameters() if x.requires_grad]
    learner, optimizer = wrap(accelerator, bare, torch.optim.SGD(trained, lr=20.0, momentum=0.5))
    found: dict[str, Tensor] = {}
    for number in range(2):
        batch = batch_of(bare, views, number, World.current())
        result = step(
            learner, accelerator, optimizer, batch, micro_batch=micro, clip_norm=CLIP_NORM, inspect=True
        )
        assert result.taken
        assert result.grad_norm > CLIP_NORM
        bare.after_step(number, number / 2)
        loss = dist.all_reduce_mean(result.terms["loss"])
        found |= {f"{number}.loss": loss, f"{number}.norm": result.grad_norm}
        for name, x in bare.state_dict().items():
            if x.is_floating_point():
                assert x.dtype == bare.towers.logit_scale.dtype
                found[f"{number}.{name}"] = dist.whole(x).clone()
    assert float(found["1.towers.clip.logit_scale"]) <= 4.6051702
    return found


@pytest.mark.parametrize(("world", "micro", "kind"), [(2, None, "resnet"), (2, 3, "native")])
def test_clipping_clamp_averages_and_frozen_parts_equal_one_process(
    run_ranks: Any, world: int, micro: int | None, kind: str
) -> None:
    (expected,) = run_ranks(1, two_clipped_steps, kind, None, False)
    for found in run_ranks(world, two_clipped_steps, kind, micro, True):
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert float((found[name] - x).abs().max()) <= TOLERANCE * max(1.0, float(x.abs().max())), name


def test_bf16_computes_what_it_computes_under_ddp_from_fp32_weights(run_ranks: Any) -> None:
    (expected, _) = run_ranks(2, two_clipped_steps, "native", None, False, "bf16")
    for found in run_ranks(2, two_clipped_steps, "native", None, True, "bf16"):
        # The second step rounds to bf16 what differs in its last bit of fp32.
        for name in (name for name in expected if name.startswith("0.")):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert found["0.loss"] == expected["0.loss"]


@pytest.mark.parametrize(
    ("kind", "image", "text"),
    [
        ("native", ["ResidualAttentionBlock"] * 2, ["ResidualAttentionBlock"] * 2),
        ("roberta_dropout", ["ResidualAttentionBlock"] * 2, ["RobertaLayer"] * 2),
    ],
)
def test_units_are_the_repeated_blocks_of_a_tower(kind: str, image: list[str], text: list[str]) -> None:
    clip = build(model(kind)).clip
    found = [[type(block).__name__ for block in repeated(part)] for part in (clip.visual, clip.text)]
    assert found == [image, text]
    inside = sum(x.numel() for block in repeated(clip.visual) for x in block.parameters())
    assert inside > 0.5 * sum(x.numel() for x in clip.visual.parameters())


class Net(nn.Module):
    """Parameters whose rows do not divide evenly, down to fewer rows than ranks, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.many = nn.Parameter(torch.arange(28.0).view(7, 4))
        self.two = nn.Parameter(torch.tensor([5.0, 6.0]))
        self.one = nn.Parameter(torch.tensor([4.6]))
        self.register_buffer("count", torch.tensor(3))


def save_rows(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    net = Net()
    fully_shard(net)
    whole, rows = part_rows("model", net.state_dict())
    store = CheckpointStore(folder)
    fixed_rows = {name: rows.pop(name) for name in ["model/many"] if name in rows}
    store.save(
        world,
        tensors={"model": whole},
        rank_tensors={},
        documents={},
        identity={},
        rows=rows,
        fixed_rows=fixed_rows,
    )


def load_rows(rank: int, world: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    net = Net()
    with torch.no_grad():
        for x in net.parameters():
            x.zero_()
    fully_shard(net)
    newest = CheckpointStore(folder).newest()
    assert newest is not None
    load_module_tensors(net, newest.stored("model"))
    for name, x in Net().state_dict().items():
        assert torch.equal(dist.whole(net.state_dict()[name]), x), name


@pytest.mark.parametrize(("saved", "read"), [(2, 3), (3, 2)])
def test_any_number_of_ranks_reads_the_rows_that_it_needs(
    run_ranks: Any, tmp_path: Path, saved: int, read: int
) -> None:
    run_ranks(saved, save_rows, tmp_path)
    run_ranks(read, load_rows, tmp_path)
    newest = CheckpointStore(tmp_path, World()).newest()
    assert newest is not None
    wanted, stored = Net().state_dict(), newest.stored("model")
    assert all(torch.equal(x, wanted[name]) for name, x in newest.tensors("model").items())
    for first in range(8):
        for last in range(8):
            assert torch.equal(stored["many"].read(first, last), wanted["many"][first:last])
    own = [load_file(newest.path / f"rows-rank{rank}.safetensors") for rank in range(saved)]
    assert sum(len(x) for part in own for x in part.values()) == 3, "a row is stored once"


def test_killed_sharded_runs_continue_bit_for_bit(tiny_shards: Path, tmp_path: Path) -> None:
    # Dropout, a queue, averages of towers and head: whatever a run remembers. One trunk stands still.
    changes = {"run__steps": 8, "run__checkpoint_every": 2, "run__weight_ema": True, **SHARDED}
    straight, broken = (values(tiny_shards, tmp_path / name, **changes) for name in ("straight", "broken"))
    for config in (straight, broken):
        config["model"] = {**model("roberta_dropout"), "image": {"freeze": "trunk"}}
        config["objectives"] = [{"name": "clip"}, {"name": "moco", "queue": 24, "hidden": 8, "dim": 4}]
    Ranks(2, train, straight).values()
    kill_at(broken, 2, 5)
    Ranks(2, train, broken).values()
    assert trace(tmp_path / "broken") == trace(tmp_path / "straight")
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
    # What stands still is stored once per rank, and is part of what is loaded.
    folder = tmp_path / "straight" / "checkpoints"
    once = [load_file(path) for path in folder.glob("rows-*.safetensors")]
    assert len(once) == 2
    parts = {name.split(".")[0] for part in once for name in part}
    assert parts == {"model/towers", "model/ema", "model/teachers"}
    newest = folder / "step-00000008"
    assert not any(once[0].keys() & load_file(path).keys() for path in newest.glob("rows-*.safetensors"))
    exported = clipkit.load(tmp_path / "straight" / "export").towers.clip.state_dict()
    for kind in ("ema", "raw"):
        loaded = clipkit.load(tmp_path / "straight", weights=kind).towers.clip.state_dict()
        assert all(torch.equal(x, exported[name]) for name, x in loaded.items()) == (kind == "ema")


def test_checkpoints_go_from_ranks_to_ranks_and_damaged_ones_are_passed_over(
    tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    entry = {"task": "retrieval", "data": str(captioned_csv(tmp_path / "set", CAPTIONS))}

    def config(name: str, **changes: Any) -> dict[str, Any]:
        found = values(tiny_shards, tmp_path / name, run__steps=6, run__checkpoint_every=2, **SHARDED)
        found["data"]["lanes"] = 4
        found["run"] |= {"keep_checkpoints": 5, **changes}
        return found

    def saved(name: str, number: int) -> str:
        return str(tmp_path / name / "checkpoints" / f"step-{number:08d}")

    Ranks(2, train, config("two", evaluate=[entry], evaluate_every=3)).values()
    Ranks(1, train, config("one"), saved("two", 2)).values()
    Ranks(2, train, config("again"), saved("one", 4)).values()
    said = capfd.readouterr().err
    assert ", sharded (fsdp2)" in said
    assert "2 -> 1 process(es)" in said
    assert "1 -> 2 process(es)" in said
    wanted = losses(tmp_path / "two")
    assert losses(tmp_path / "one") == pytest.approx(wanted[-4:], abs=1e-5)
    assert losses(tmp_path / "again") == pytest.approx(wanted[-2:], abs=1e-5)
    found = evaluations(tmp_path / "two")
    assert [at for at, _ in found] == [3, 6]
    for _, results in found:
        assert results.keys() == {"set", "set@ema"}
        assert not any("error" in numbers for numbers in results.values())
    # A missing file, a flipped byte: the newest checkpoint that is whole is continued, and not sharded here.
    (Path(saved("two", 6)) / "rows-rank1.safetensors").unlink()
    flip_byte(Path(saved("two", 4)) / "rows-rank0.safetensors")
    Ranks(2, train, config("two", sharding="none")).values()
    said = capfd.readouterr().err
    assert "skipped checkpoint step-00000006: rows-rank1.safetensors is missing" in said
    assert "skipped checkpoint step-00000004: rows-rank0.safetensors was changed" in said
    assert f"continuing {saved('two', 2)}" in said
    assert "run.sharding changed" in said
    assert losses(tmp_path / "two") == pytest.approx(wanted, abs=1e-5)


def test_fp16_is_refused_and_one_process_has_nothing_to_shard(tiny_shards: Path, tmp_path: Path) -> None:
    changes = {"run__steps": 2, **SHARDED}
    with pytest.raises(ConfigError, match="fp16"):
        make_config(values(tiny_shards, tmp_path / "half", run__precision="fp16", **changes))
    pretrain(values(tiny_shards, tmp_path / "one", **changes))
    newest = CheckpointStore(tmp_path / "one" / "checkpoints", World()).newest()
    assert newest is not None
    assert not newest.sharded
