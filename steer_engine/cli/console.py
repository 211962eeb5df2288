"""What commands share of the terminal: both consoles, exit statuses, logging."""

from __future__ import annotations

import logging
import shlex
import sys

from rich.console import Console

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
NUM_SHOWN = 8  # rows of a table that shows the first or the best of many
out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def set_up_logging(is_verbose: bool = False) -> None:
    """Let the library's warnings, or all that it logs, reach standard error."""
    level = logging.INFO if is_verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def command_line() -> str:
    """What was typed, for a report to repeat."""
    return shlex.join(["steer-engine", *sys.argv[1:]])
