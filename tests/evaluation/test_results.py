"""Results: valid JSON, written whole or not at all, readable in a terminal."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from clipkit.evaluation import format_table, write_result
from clipkit.evaluation.results import build_result
from clipkit.evaluation.retrieval import retrieval
from clipkit.evaluation.zero_shot import zero_shot
from clipkit.types import ConfigError
from tests.evaluation.encoders import Projection
from tests.evaluation.layouts import captioned_csv, labelled_csv


def test_write_is_valid_json_and_leaves_no_other_file(tmp_path: Path) -> None:
    result = zero_shot(Projection(), labelled_csv(tmp_path / "set", 6, ("ant", "bee", "käfer")))
    path = write_result(result, tmp_path / "new" / "r.json")
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]
    assert list(result)[:6] == ["task", "dataset", "model", "metrics", "counts", "protocol"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_unwritable_place_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "r.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot be written"):
            write_result({"metrics": {}}, path)


def test_a_nan_never_becomes_a_metric() -> None:
    with pytest.raises(AssertionError, match="acc1"):
        build_result("t", Projection(), "d", {"acc1": float("nan")}, {}, {})


def test_tables_name_the_direction_the_counts_and_the_protocol(tmp_path: Path) -> None:
    folder = captioned_csv(tmp_path / "set", [["same", "b"], ["same", "c"], ["d"]])
    lines = format_table(retrieval(Projection(), folder, recall_k=(1, 3)))
    assert lines[0] == "zeroshot_retrieval of projection on set"
    assert any(line.lstrip().startswith("text -> image (t2i)") for line in lines)
    assert "  on 3 images, 5 captions (1 to 2 per image), 2 of them for several images" in lines
    assert lines[-1] == "  fp32, 6 x 8 pixels, ties counted against the model"
    assert max(map(len, lines)) <= 100
