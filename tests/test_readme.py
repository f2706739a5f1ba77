"""What the README says can be done, can be done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from clipkit.cli import main
from clipkit.config import load_config
from clipkit.objectives import OBJECTIVES, build_objectives

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "examples" / "guides").glob("*.md"))


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
        config = load_config(tmp_path / "shown.yaml")
        build_objectives([{"name": e.name, **e.options} for e in config.objectives], OBJECTIVES)


def test_own_images_become_a_model_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tables = {
        "catalogue/pairs.csv": "caption",
        "my_captions/captions.csv": "caption",
        "my_labels/labels.csv": "label",
    }
    for path, column in tables.items():
        folder = tmp_path / Path(path).parent
        (folder / "images").mkdir(parents=True)
        rows = [f"filepath,{column}"]
        for number in range(16):
            picture = Image.new("RGB", (60, 80), (16 * number, 255 - 16 * number, 90))
            picture.save(folder / "images" / f"{number}.png")
            rows.append(f"images/{number}.png,{f'shade {number}' if column == 'caption' else number % 2}")
        (tmp_path / path).write_text("\n".join(rows) + "\n")
    (tmp_path / "my_labels" / "classnames.txt").write_text("dark\nlight\n")
    (block,) = (block for block in blocks("bash") if "clipkit init" in block)
    commands = [
        shlex.split(command, comments=True) for line in block.splitlines() for command in line.split(" && ")
    ]
    assert len(commands) == 6
    for words in commands:
        assert words[:3] == ["uv", "run", "clipkit"]
        small = ["data.batch_size=8", "run.epochs=1", "optim.warmup=0", "data.workers=0"]
        assert main([*words[3:], *(small if words[3] == "pretrain" else [])]) == 0, words
    assert (tmp_path / "exported" / "open_clip_config.json").is_file()


def test_every_command_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(
        re.findall(r"\bclipkit ([a-z][a-z-]+)\b", "".join(re.findall(r"`.*?`", README + GUIDES, re.DOTALL)))
    )
    others = re.search(r"Other commands: (.*?)Exit codes", README, flags=re.DOTALL)
    assert others is not None
    named |= set(re.findall(r"`([a-z-]+)", others[1]))
    assert {"quickstart", "pretrain", "zeroshot", "retrieval", "export", "probe", "sweep", "doctor"} <= named
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
