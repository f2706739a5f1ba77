"""What the README says can be done, can be done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clipkit.cli import main
from clipkit.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_stand_first() -> None:
    first, second = blocks("bash")[:2]
    assert first.startswith("pip install uv && uv run clipkit quickstart")
    assert second.startswith("pip install uv && uv run pytest")


def test_ci_calls_the_test_command_of_the_readme() -> None:
    assert "\nuv run pytest\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 400


def test_configurations_shown_are_valid(tmp_path: Path) -> None:
    for block in blocks("yaml"):
        (tmp_path / "shown.yaml").write_text(block)
        load_config(tmp_path / "shown.yaml")


def test_every_command_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"uv run clipkit (\w+)", README))
    assert {"quickstart", "pretrain", "zeroshot", "retrieval", "export"} <= named
    for command in named:
        assert main([command, "--help"]) == 0
        assert "Usage: clipkit" in capsys.readouterr().out


def test_every_shipped_configuration_is_valid_short_and_introduced() -> None:
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# "), f"{path} does not say what it is"
        assert text.count("\n") <= 40, path
        load_config(path)
