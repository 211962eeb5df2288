"""The command line, `steer-engine COMMAND`, also `python -m steer_engine`.

A module for each command, named like it; here they become one program. Exit status: 0 done,
1 failed, 2 wrong usage, 130 interrupted. Errors are one line.
"""

from __future__ import annotations

import signal
import sys

import typer
from typer.core import TyperGroup

from ..errors import SteerError
from . import demo, evaluate, finetune, generate, info, prepare, report, sweep, win_rate
from .console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, err

HELP_WIDTH = 100
# The parser's own error: typer has no name for it, and older versions of it take it from click.
WrongUsage = typer.BadParameter.__base__
# What a newcomer needs first.
ORDER = (
    "demo", "generate", "evaluate", "sweep", "report", "finetune", "prepare", "win-rate", "info",
)  # fmt: skip


class _CommandsInOrder(TyperGroup):
    """Lists commands as ORDER does; typer would put groups of commands last."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="steer-engine",
    cls=_CommandsInOrder,
    context_settings={"max_content_width": HELP_WIDTH},
    help="Write synthetic text data sets with STEER guidance on Falcon models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(evaluate.evaluate)
app.command()(sweep.sweep)
app.command()(report.report)
app.command()(finetune.finetune)
app.command(help=prepare.HELP)(prepare.prepare)
app.add_typer(win_rate.app, name="win-rate")
app.command()(info.info)


def main() -> None:
    """Run the command line and exit."""
    is_debug = "--debug" in sys.argv
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        sys.exit(app(standalone_mode=False))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(EXIT_INTERRUPTED)
    except WrongUsage as error:
        if is_debug and not _is_help(error):
            raise
        err.print(_describe_usage(error), markup=False)
        sys.exit(EXIT_USAGE)
    except (SteerError, ValueError, OSError, MemoryError) as error:
        if is_debug:
            raise
        is_usage = isinstance(error, ValueError) and not isinstance(error, SteerError)
        err.print(f"error: {_describe(error)}", markup=False)
        sys.exit(EXIT_USAGE if is_usage else EXIT_FAILED)


def _describe(error: Exception) -> str:
    """One line; the operating system's errors without their number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _is_help(error: WrongUsage) -> bool:
    """Whether the message is the help of a group of commands, none of which was named."""
    return error.ctx is not None and error.format_message() == error.ctx.get_help()


def _describe_usage(error: WrongUsage) -> str:
    """What the parser found wrong, and whose help to read."""
    if _is_help(error):
        return error.format_message()
    message = " ".join(error.format_message().split()).removesuffix(".")
    command = error.ctx.command_path if error.ctx is not None else app.info.name
    return f"error: {message[:1].lower()}{message[1:]} (see `{command} --help`)"
