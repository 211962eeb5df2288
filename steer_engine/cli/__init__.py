"""The command line, `steer-engine COMMAND`, also `python -m steer_engine`.

A module for each command, named like it; here they become one program. Exit status: 0 done,
1 failed, 2 wrong usage, 130 interrupted. Errors are one line.
"""

from __future__ import annotations

import signal
import sys

import typer

from ..errors import SteerError
from . import demo, evaluate, finetune, generate, info, prepare, report, sweep, win_rate
from .console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, err

app = typer.Typer(
    name="steer-engine",
    help="Write synthetic text data sets with STEER guidance on Falcon models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(generate.generate)
app.command()(sweep.sweep)
app.command()(demo.demo)
app.command()(report.report)
app.command(help=prepare.HELP)(prepare.prepare)
app.command()(finetune.finetune)
app.command()(evaluate.evaluate)
app.command()(info.info)
app.add_typer(win_rate.app, name="win-rate")


def main() -> None:
    """Run the command line and exit."""
    is_debug = "--debug" in sys.argv
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        app()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (SteerError, ValueError, OSError, MemoryError) as error:
        if is_debug:
            raise
        is_usage = isinstance(error, ValueError) and not isinstance(error, SteerError)
        message = " ".join(str(error).split()) or type(error).__name__
        err.print(f"error: {message}", markup=False)
        sys.exit(EXIT_USAGE if is_usage else EXIT_FAILED)
