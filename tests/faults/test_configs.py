"""Configurations that are wrong or hostile: every problem at once, with its line; nothing is executed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clipkit.cli import main
from tests.test_config import refused, written


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("optim: {lr: 1}\noptim: {lr: 2}\n", "2: optim is written twice"),
        ("run:\n  seed: 1\n  seed: 1\n", "3: run.seed is written twice"),
        ("a: [1, 2\nb: 3\n", "not valid YAML"),
        ("- a\n- b\n", "1: a configuration is a mapping"),
        ("{1, 2}: 3\n", "not a plain word"),
        ("a: &x [1]\nb: *y\n", "undefined alias"),
        ("a: !!python/object/apply:os.system ['touch CANARY']\n", "not allowed"),
        ("a: !!python/name:os.system\n", "not allowed"),
        ("a: !custom 3\n", "not allowed"),
        ("a: !!int abc\n", "is no int"),
        ("a: " + "[" * 5000 + "\n", "nested more than 32 deep"),
        ("a: \x07\n", "not valid YAML"),
    ],
)
@pytest.mark.fault(
    "F23",
    "python tags, unknown tags, keys written twice, broken or deep YAML",
    "refused with the line; no command runs",
)
def test_f23_hostile_or_broken_yaml_is_refused_and_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = refused(written(tmp_path, text))
    assert any(cause in line for line, _ in found), found
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.fault("F23", "aliases that grow to 9^10 entries", "refused before they are expanded")
def test_f23_an_alias_bomb_is_refused_before_it_grows(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    ((found, _),) = refused(written(tmp_path, "\n".join(lines)))
    assert "once anchors are expanded" in found


PROBLEMS = {
    "an unknown key": (
        "optim: {learning_rte: 1e-3}",
        "unknown key optim.learning_rte",
        "did you mean optim.lr?",
    ),
    "a typo": (
        "optim: {weight_decai: 0.1}",
        "unknown key optim.weight_decai",
        "did you mean optim.weight_decay?",
    ),
    "a wrong type": ("optim: {lr: [1]}", "optim.lr: expected a number", "set optim.lr to a number"),
    "a negative number": ("optim: {lr: -1}", "optim.lr: expected a number above 0", "a number above 0"),
    "text for a number": ("run: {epochs: two}", "run.epochs: expected a whole number", "whole number"),
    "a key twice": ("optim: {lr: 1}\noptim: {lr: 2}", "optim is written twice", "one"),
    "a quoted number": ("optim: {lr: '1e-3'}", "optim.lr: expected a number, not '1e-3'", "set optim.lr"),
    "options that exclude each other": ("run: {epochs: 1, steps: 2}", "run: exactly one of", "steps"),
}


@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.fault(
    "F22",
    "an unknown key, a typo, a wrong type, a negative number, text for a number, a key twice, a quoted "
    "number, options that exclude each other",
    "exit 2 with file, line, key and value, and what to write instead; nothing is created",
)
def test_f22_a_wrong_line_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line, cause, cure = PROBLEMS[kind]
    sections = {
        "model": "model: ViT-B-32",
        "data": "data: {train: x.tar, batch_size: 256}",
        "run": "run: {epochs: 2}",
    }
    sections[line.partition(":")[0]] = line
    (tmp_path / "run.yaml").write_text("\n".join(sections.values()) + "\n")
    assert main(["pretrain", "run.yaml"]) == 2
    shown = capsys.readouterr().err
    assert re.search(rf"run\.yaml:\d+: .*{re.escape(cause)}", shown), shown
    assert cure in shown
    assert "Traceback" not in shown
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.fault("F22", "five wrong lines in one file", "all five in one answer")
def test_f22_all_problems_come_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        "model: {nme: x}",
        "data: {train: x, batch_size: many}",
        "run: {epochs: -1, sed: 2}",
        "optim: {x: 1}",
    ]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert main(["pretrain", "run.yaml"]) == 2
    shown = capsys.readouterr().err
    for number, part in (
        (1, "model.nme"),
        (2, "data.batch_size"),
        (3, "run.epochs"),
        (3, "run.sed"),
        (4, "optim.x"),
    ):
        assert re.search(rf"run\.yaml:{number}: .*{re.escape(part)}", shown), (part, shown)
