"""The application, its commands, and the way every failure leaves: two lines and an exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from clipkit.cli import configs, data, evaluating, machine, objectives, proposing, training
from clipkit.cli.output import rank
from clipkit.redaction import redact, visible
from clipkit.types import ClipkitError, ConfigError

_EPILOG = (
    "Exit codes: 0 done, 1 run-time failure, 2 usage or configuration, 3 data, 4 a gate failed, "
    "130 interrupted with the checkpoint saved."
)

# Plain help: the styled one imports rich's markdown machinery and takes 0.8 s instead of 0.2 s.
app = typer.Typer(
    name="clipkit",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)
app.command("quickstart")(training.quickstart)
app.command("init")(proposing.init)
app.command("pretrain")(training.pretrain)
app.command("sweep")(training.sweep)
app.command("zeroshot")(evaluating.zeroshot)
app.command("retrieval")(evaluating.retrieval)
app.command("probe")(evaluating.probe)
app.command("export")(evaluating.export)
app.command("index")(data.index)
app.command("test-objective")(objectives.check_objective)
app.add_typer(data.app, name="data")
app.add_typer(configs.app, name="configs")
app.command("doctor")(machine.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from clipkit import __version__

        print(f"clipkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of a failure (anywhere on the line).")
    ] = False,
) -> None:
    """Pretrain, fine-tune, evaluate and ship CLIP-style image-text models."""


def _cure(error: Exception) -> str:
    # By name: importing torch to ask would take seconds, and it may not be what failed.
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return "set or lower data.micro_batch (training) or --batch-size (evaluation)"
    return "run it again with --traceback for details"


def _report(error: Exception) -> int:
    """Prints a failure on stderr and returns its exit code."""
    prefix = f"rank {rank()}: " if rank() else ""
    if isinstance(error, ConfigError) and rank():
        return error.exit_code  # the same on every rank; rank 0 prints it
    pairs: list[tuple[str, str]]
    if isinstance(error, ClipkitError):
        problems: Sequence[Any] = getattr(error, "problems", ())
        pairs = [(str(problem), problem.cure) for problem in problems] or [(error.cause, error.cure)]
        code = error.exit_code
    else:
        summary = " ".join(str(error).split()) or "no message"
        pairs, code = [(f"{type(error).__name__}: {summary}", _cure(error))], 1
    for cause, cure in pairs:
        # Cleaned one by one: what ends a line is ours.
        print(f"{prefix}error: {visible(redact(cause))}", file=sys.stderr)
        print(f"  cure: {visible(redact(cure))}", file=sys.stderr)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `arguments` default to those of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch loads: its C++ side warns once per rank about find_unused_parameters, which is meant.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with_traceback = "--traceback" in given
    given = [argument for argument in given if argument != "--traceback"]
    try:
        code = app(args=given, prog_name="clipkit", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # The reader of our output left (`clipkit ... | head`): stop without a second error at exit.
        sys.stderr.close()
        return 1
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of the parser
            shown = io.StringIO()
            error.show(file=shown)
            print(visible(redact(shown.getvalue()), lines=True), end="", file=sys.stderr)
            return int(error.exit_code)
        if with_traceback:
            trace = "".join(traceback.format_exception(error))
            print(visible(redact(trace), lines=True), end="", file=sys.stderr)
        return _report(error)
    if code == 130:  # from here or from the parser, which turns Control-C into this code without a word
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0
