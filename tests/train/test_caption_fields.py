"""Runs over several caption fields: counted, continued exactly, and refused before anything is built."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clipkit.cli import main
from clipkit.train import pretrain, setup
from clipkit.types import ConfigError
from tests.conftest import Ranks
from tests.train.runs import columns, trace, train, values
from tests.train.test_resume import kill_at

NAMES = ("captions/txt", "captions/json.more", "captions_fallback/txt")


@pytest.fixture(scope="module")
def shards(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny shards with a document of further captions in two thirds of the samples."""
    folder = tmp_path_factory.mktemp("fields")
    for path in sorted(tiny_shards.glob("*.tar")):
        with tarfile.open(path) as tar, tarfile.open(folder / path.name, "w") as out:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                out.addfile(member, content)
                key, _, extension = member.name.partition(".")
                if extension == "txt":
                    more = ["one caption", "another one"] if int(key) % 3 else None
                    document = json.dumps({"more": more}).encode()
                    info = tarfile.TarInfo(f"{key}.json")
                    info.size = len(document)
                    out.addfile(info, io.BytesIO(document))
    return folder


def fields(shards: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    config = values(shards, folder, run__weight_ema=False, **changes)
    captions = ["txt", {"field": "json.more", "weight": 3}]
    config["data"]["train"] = [{"shards": str(shards), "captions": captions}]
    return config


def test_contributions_are_counted_and_continue_after_a_kill(shards: Path, tmp_path: Path) -> None:
    """On one rank, on two, and killed and continued: the same numbers at every step, and those of the end."""
    straight, broken, two = (fields(shards, tmp_path / name) for name in ("a", "b", "c"))
    (report,) = Ranks(1, train, straight).values()
    kill_at(broken, 1, 13)
    (again,) = Ranks(1, train, broken).values()
    ranks = Ranks(2, train, two).values()
    found = columns(tmp_path / "a")
    assert report["counts"] == again["counts"] == ranks[0]["counts"] == ranks[1]["counts"]
    assert trace(tmp_path / "b") == trace(tmp_path / "a")
    for name in NAMES:
        assert columns(tmp_path / "b")[name] == columns(tmp_path / "c")[name] == found[name]
        assert found[name][-1] == report["counts"][name] > 0
    for step, parts in enumerate(zip(found[NAMES[0]], found[NAMES[1]], strict=True), 1):
        assert sum(parts) == 12 * step
    # A third of the draws of json.more (3 in 4) finds nothing: 288 * 3 / 4 / 3 = 72 on average.
    assert 45 < report["counts"][NAMES[2]] < 100


def test_the_start_says_what_is_read_and_the_end_what_was(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(fields(shards, tmp_path / "run", run__steps=3))
    said = capsys.readouterr().err
    assert "members: png 100 %, txt 100 %, json.more " in said
    assert "used: images, captions from txt (weight 1), json.more (weight 3) (missing: fallback)" in said
    assert "expected in a batch of 12: " in said
    assert "expected to share a caption, and clip pushes them apart (objectives: [{name: unicl}]" in said
    (line,) = (line for line in said.splitlines() if line.startswith("captions: txt "))
    counts = Counter({name: int(line.split(f"{name} ")[1].split()[0]) for name in ("txt", "json.more")})
    assert counts.total() == 36
    assert "where another field was drawn and missing" in line


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_absent_field_is_refused_before_a_model_is_built(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a model is built")

    monkeypatch.setattr(setup, "build_towers", never)
    config = fields(shards, tmp_path / "run")
    config["data"]["train"][0]["captions"] = ["txt", "json.mroe"]
    with pytest.raises(
        ConfigError, match=r"data\.train\.0\.captions reads json\.mroe, which none of 96"
    ) as caught:
        pretrain(config, dry_run=dry_run)
    assert "did you mean json.more?" in caught.value.cure


def test_validation_looks_at_data_that_is_here(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    data = "{batch_size: 8, train: [{shards: SHARDS, captions: [FIELD]}]}"
    text = f"model: ViT-B-32\nrun: {{steps: 9}}\ndata: {data}\n"
    path.write_text(text.replace("SHARDS", str(shards)).replace("FIELD", "json.more"))
    assert main(["configs", "validate", str(path)]) == 0
    assert "captions from json.more" in capsys.readouterr().out
    path.write_text(text.replace("SHARDS", str(shards)).replace("FIELD", "json.mor"))
    assert main(["configs", "validate", str(path)]) == 2
    assert "did you mean json.more?" in capsys.readouterr().err
    path.write_text(text.replace("SHARDS", str(tmp_path / "elsewhere.tar")).replace("FIELD", "json.mor"))
    assert main(["configs", "validate", str(path)]) == 0
    (tmp_path / "pairs.csv").write_text("filepath,caption\na.png,a\n")
    path.write_text(text.replace("SHARDS", str(tmp_path / "pairs.csv")).replace("FIELD", "titel"))
    assert main(["configs", "validate", str(path)]) == 2
    assert "no column 'titel'" in capsys.readouterr().err
