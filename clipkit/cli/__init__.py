"""The command line: parse, call one function, print. Loads no torch until a command needs it."""

from clipkit.cli.app import app, main

__all__ = ["app", "main"]
