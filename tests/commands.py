"""Commands that fail, and how they must say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkit.cli import main


def fails(capsys: pytest.CaptureFixture[str], code: int, cause: str, *arguments: str | Path) -> str:
    """Runs a command, asserts exit code and form of the message, returns the cure."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error:", "  cure:"))]
    assert len(errors) == 2, errors
    assert cause in errors[0]
    assert "Traceback" not in "".join(errors)
    return errors[1].removeprefix("  cure: ")


def misused(capsys: pytest.CaptureFixture[str], cause: str, *arguments: str | Path) -> None:
    """Runs a command whose options cannot be parsed, asserts usage and one line that names them."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    usage, hint, error = filter(None, capsys.readouterr().err.splitlines())
    assert usage.startswith("Usage: clipkit ")
    assert hint.startswith("Try 'clipkit ")
    assert error.startswith("Error: ")
    assert cause in error


def write(config: dict[str, Any], path: Path) -> Path:
    """Writes a configuration file; returns its path."""
    path.write_text(yaml.safe_dump(config))
    return path
