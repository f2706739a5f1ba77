"""The quickstart's loop at a fraction of its size, and its gate."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clipkit import quickstart
from clipkit.config import load_config
from clipkit.types import GateError
from tests.evaluation.layouts import labelled_csv


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


STEPS = ("run.steps=4", "optim.warmup=1", "data.batch_size=32")


def test_the_loop_ends_with_a_table_a_reloaded_export_and_the_next_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = quickstart.run(folder, overrides=STEPS, drawing={"train": 400, "evaluation": 32})
    printed = capsys.readouterr().out
    names = {row["name"] for row in report["rows"]}
    wanted = {"zeroshot_pictogram", "zeroshot_colour", "retrieval_combinations", "retrieval_face"}
    assert wanted | {"compositional_colour", "compositional_order"} <= names
    assert all(row["name"] in printed and 0 <= row["value"] <= 1 for row in report["rows"])
    assert "made data" in printed
    assert f"clipkit retrieval {report['export']}" in printed.split("next: ")[1]
    assert json.loads((folder / "quickstart.json").read_text())["rows"] == report["rows"]


def test_a_second_call_continues_instead_of_training_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fresh process has reloaded this export already.
    # Not by its dotted name, which is that of the promised function `clipkit.export`.
    monkeypatch.setattr(importlib.import_module("clipkit.export"), "verify", lambda _: {})
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    quickstart.run(folder, overrides=STEPS, drawing={"train": 400, "evaluation": 32})
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_merged_classes_are_counted_wherever_the_model_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list("abcdef")
    (labelled_csv(tmp_path, 6, names) / "groups.json").write_text('{"groups": [[0, 1]]}')
    scores = torch.eye(6)
    scores[:2] = torch.tensor([[1.0, 2, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0]])
    scores[2] = scores[3]

    class Elsewhere:
        """Rows on a GPU: CPU tensors cannot be indexed by them."""

        T = None

        def __len__(self) -> int:
            return 6

        def __matmul__(self, other: object) -> Elsewhere:
            return self

        def topk(self, k: int, dim: int) -> SimpleNamespace:
            return SimpleNamespace(indices=SimpleNamespace(cpu=lambda: scores.topk(k, dim).indices))

    for name in ("embed_images", "embed_texts"):
        monkeypatch.setattr(f"clipkit.evaluation.{name}", lambda *_: Elsewhere(), raising=False)
    assert quickstart.merged_accuracy(None, tmp_path)[1] == pytest.approx(5 / 6)


def test_the_gate_names_what_is_below_its_floor() -> None:
    rows = [quickstart.Row("faces", "top-1", 0.30, 0.1), quickstart.Row("faces", "top-5", 0.9, 0.5)]
    quickstart.check_gate(rows, {"faces top-1": 0.30, "faces top-5": 0.8})
    with pytest.raises(GateError, match=r"faces top-1 0\.300 < 0\.310") as caught:
        quickstart.check_gate(rows, {"faces top-1": 0.31, "faces top-5": 0.8})
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("corpus", sorted(quickstart.CORPORA))
def test_every_corpus_has_a_valid_configuration_and_floors(corpus: str) -> None:
    plan = quickstart.CORPORA[corpus]
    assert load_config(quickstart.preset(plan.config)).run.steps
    assert plan.floors
    assert all(0 < floor < 1 for floor in plan.floors.values())
