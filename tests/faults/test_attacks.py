"""Files that would run code or carry secrets out: never executed, never written, never shown."""

from __future__ import annotations

import io
import json
import pickle
import shlex
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clipkit.data.remote
from clipkit.checkpoint import manifest as manifest_files
from clipkit.cli import main
from clipkit.config import make_config
from clipkit.data.indexing import build_index
from clipkit.data.rejects import LOST_CHUNK
from clipkit.data.sample import Unusable
from clipkit.data.source import expand_shards
from clipkit.data.targets import stored_vector
from clipkit.log import encode_record
from clipkit.models.weights import read_weights
from clipkit.train import pretrain
from clipkit.types import ClipkitError, ConfigError, DataError
from tests.checkpoint.children import save, single
from tests.conftest import write_tiny_shards
from tests.data.makers import good, npy, raw, stream, take, write_shards, write_tar
from tests.data.servers import serving
from tests.data.test_lost_chunks import broken, index_of
from tests.train.runs import values


@pytest.mark.fault(
    "F26",
    "a pickle in the place of the weights of a checkpoint, its hash in the manifest",
    "not executed; an error that names the file",
)
def test_f26_a_hostile_checkpoint_under_a_right_hash_is_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    store = single(tmp_path / "checkpoints")
    path = save(store, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").unlink()
    (path / "model.safetensors").unlink()
    manifest["files"]["model.safetensors"] = manifest_files.write_bytes(path / "model.safetensors", evil)
    manifest_files.write_manifest(
        path, step=1, sequence=1, world_size=1, files=manifest["files"], identity={"seed": 7}
    )
    found = store.newest()
    assert found is not None
    with pytest.raises(ClipkitError, match=r"model\.safetensors cannot be read"):
        found.tensors("model")
    assert not canary.exists()


@pytest.mark.fault("F26", "a manifest that names `../../` files", "refused")
def test_f26_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    store = single(tmp_path / "checkpoints")
    path = save(store, 1)
    (path / "manifest.json").unlink()
    record = manifest_files.write_bytes(tmp_path / "outside", b"x")
    manifest_files.write_manifest(
        path, step=1, sequence=1, world_size=1, files={"../../outside": record}, identity={}
    )
    with pytest.raises(ClipkitError, match="is not that of a checkpoint"):
        store.open(path)


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@pytest.mark.fault(
    "F26",
    "members .pyd .pkl .pickle .pth .npy that hold pickles, in both readers",
    "only bytes: not executed",
)
def test_f26_nothing_in_a_shard_is_unpickled(tmp_path: Path) -> None:
    """Members that webdataset's decoder would execute are only bytes here, in both readers."""
    canary = tmp_path / "canary"
    evil = pickle.dumps(Canary(str(canary)))
    extra = [(f"000000.{kind}", evil) for kind in ("pyd", "pkl", "pickle", "pth", "npy")]
    for name, mode in [("a.tar.gz", "w:gz"), ("a.tar", "w")]:
        path = write_tar(tmp_path / name, [[*good(0), *extra], good(1)], mode)
        (batch,) = take(stream(str(path), 2), 0, 1)
        assert sorted(batch.keys) == ["000000", "000001"]
    assert not canary.exists()


@pytest.mark.fault(
    "F27",
    "`pipe:` shards without `data.allow_pipe`; a command that fails",
    "refused, no command runs; a failing command is an error",
)
def test_f27_pipes_must_be_allowed(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "set", [9, 8])
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError, match="shell command"):
        stream(f"pipe:touch {canary}", 2)
    assert not canary.exists()
    spec = [f"pipe:cat {shlex.quote(str(path))}" for path in sorted(shards.glob("*.tar"))]
    opened = stream(spec, 4, allow_pipe=True)
    assert (opened.exact, opened.num_samples) == (False, 17)
    assert len({key for batch in take(opened, 0, 4) for key in batch.keys}) == 16
    with pytest.raises(DataError, match="code 3"):
        stream(f"pipe:cat {shards}/00000.tar; exit 3", 2, allow_pipe=True)


@pytest.mark.fault(
    "F30",
    "a run from an address with login and signature, chunks lost on the way",
    "neither stands in any file of the run directory, nor on the screen",
)
def test_f30_a_run_keeps_the_secrets_of_its_shards(
    tiny_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a server with a login and a signature: neither is in anything that is written or shown."""
    monkeypatch.setattr(clipkit.data.remote, "RETRIES", (0.0,))
    with serving(tiny_shards) as server:
        spec = server.url.replace("//", "//user:CANARY@") + "/{00000..00004}.tar?sig=CANARY"
        config = values(tiny_shards, tmp_path / "run", run__steps=8, data__max_lost_chunks=1)
        config["data"]["train"] = spec
        server.always = broken(index_of(stream(spec, 12)), 1, 0)
        with pytest.raises(DataError, match=r"\*\*\*@127.0.0.1"):
            pretrain({**config, "data": {**config["data"], "max_lost_chunks": 0}}, resume="never")
        pretrain(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert rows
    assert {row["reason"] for row in rows} == {LOST_CHUNK}
    assert {row["shard"].partition("@")[0] for row in rows} == {"http://***"}
    shown = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "lost a chunk: http://***@127.0.0.1" in shown.err
    assert b"CANARY" not in written + (shown.out + shown.err).encode()


@pytest.mark.fault(
    "F30", "a token in an address given to a command, with and without `--traceback`", "not shown, not dumped"
)
def test_f30_commands_and_configurations_keep_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "ftp://user:CANARY@host/a.tar?sig=CANARY"
    assert main(["index", url, "--traceback"]) == 2
    assert main(["index", url]) == 2
    shown = capsys.readouterr()
    assert "***@host" in shown.err
    assert "CANARY" not in shown.out + shown.err
    config = make_config(
        {"model": {"name": "ViT-B-32"}, "data": {"train": url, "batch_size": 8}, "run": {"steps": 1}}
    )
    assert config.data.train[0].shards == url
    assert "CANARY" not in config.dump()


@pytest.mark.fault(
    "F26",
    "pickles as init weights: a .pt file, and open_clip_pytorch_model.bin in a directory",
    "not executed; error that says why and how to convert them",
)
def test_f26_pickled_weights_are_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Canary(str(canary))))
    with pytest.raises(ConfigError, match=r"not a \.safetensors file"):
        read_weights(str(tmp_path / "model.pt"))
    for name in ("protocol", "archive"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 4}}')
        weights = folder / "open_clip_pytorch_model.bin"
        if name == "protocol":
            weights.write_bytes(pickle.dumps(Canary(str(canary)), protocol=2))
        else:
            torch.save({"evil": Canary(str(canary))}, weights)
        with pytest.raises(ConfigError, match="a pickle that holds more than tensors"):
            read_weights(str(folder))
    assert not canary.exists()


@pytest.mark.fault(
    "F26",
    "arrays of pickled objects: a stored vector of a shard, the cached index, its records",
    "not executed; the sample is replaced, the index is built again",
)
def test_f26_arrays_of_objects_are_not_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = np.array([Canary(str(canary))], dtype=object)
    out = io.BytesIO()
    np.save(out, evil, allow_pickle=True)
    with pytest.raises(Unusable):
        stored_vector(raw(**{"teacher.npy": out.getvalue()}), "teacher.npy")
    assert stored_vector(raw(**{"teacher.npy": npy(np.ones(3, np.float32))}), "teacher.npy").shape == (3,)
    shards = write_shards(tmp_path / "set", [4])
    index = build_index(expand_shards(str(shards)))
    for file in [*shards.glob(".clipkit-index*.npy"), *shards.rglob("*.npz")]:
        if file.suffix == ".npy":
            file.write_bytes(out.getvalue())
        else:
            np.savez(file, starts=evil)
        assert build_index(expand_shards(str(shards))).sha == index.sha
    assert not canary.exists()


@pytest.mark.fault(
    "F27", "a shard named like an option, `-o.tar`", "read as the file it is; nothing is a command"
)
def test_f27_a_leading_dash_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "-o.tar", [good(0), good(1)])
    assert build_index(["-o.tar"]).num_samples == 2


@pytest.mark.fault(
    "F29",
    "line breaks, terminal escapes, HTML and a formula in keys of samples",
    "one line of JSON each in rejects.jsonl and metrics.jsonl, no control character among them",
)
def test_f29_logs_are_one_line_of_json_each(tmp_path: Path) -> None:
    hostile = "\x1b[2J\x07<script>alert(1)<\\script>\n=cmd()\r\u2028"
    line = encode_record({"event": hostile, hostile: [hostile]})
    assert json.loads(line) == {"event": hostile, hostile: [hostile]}
    assert not any(ord(sign) < 32 for sign in line)
    shards = write_tiny_shards(tmp_path / "shards", samples=12, per_shard=12)
    named = hostile.replace("\n", "").replace("\r", "")
    with tarfile.open(shards / "00000.tar") as source, tarfile.open(shards / "new.tar", "w") as target:
        for member in source:
            content = source.extractfile(member)
            if member.name == "000003.png":
                member.size, content = 0, None
            member.name = member.name.replace("000003", named)
            target.addfile(member, content)
    (shards / "new.tar").replace(shards / "00000.tar")
    pretrain(values(shards, tmp_path / "run", run__steps=1, data__max_reject_fraction=0.5))
    (written,) = (tmp_path / "run" / "rejects.jsonl").read_bytes().splitlines()
    assert json.loads(written)["key"] == named
    for log in ("rejects.jsonl", "metrics.jsonl"):
        content = (tmp_path / "run" / log).read_bytes()
        assert not any(sign < 32 for sign in content.replace(b"\n", b""))


@pytest.mark.fault(
    "F30",
    "`HF_TOKEN` and a secret key in the environment, and their values in the paths of a configuration",
    "their values stand in no file of the run directory",
)
def test_f30_tokens_of_the_environment_are_not_written(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY0123")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CANARY4567890")
    (tmp_path / "hf_CANARY0123").symlink_to(tiny_shards)
    config = values(tmp_path / "hf_CANARY0123", tmp_path / "run", run__steps=2)
    pretrain(config)
    pretrain(config)
    shown = capfd.readouterr()
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"CANARY" not in written + (shown.out + shown.err).encode()
