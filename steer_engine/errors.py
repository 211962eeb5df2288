"""The engine's errors: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class SteerError(Exception):
    """Base of the engine's own errors; the command line prints its message without a traceback."""


class CheckpointError(SteerError, ValueError):
    """A checkpoint, adapter or tokenizer cannot be read, or does not fit its model."""


class CapacityError(SteerError, RuntimeError):
    """A request cannot fit the machine as configured; the message names the setting to change."""


class RunError(SteerError, RuntimeError):
    """A run cannot go on: its directory is unusable or holds another run, or its draws fail."""


class DataError(SteerError, ValueError):
    """Real examples cannot be read from the given source."""


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'gamma'?` for the nearest known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def check_number(
    name: str,
    value: float,
    *,
    low: float | None = None,
    high: float | None = None,
    low_is_open: bool = False,
    is_int: bool = False,
) -> None:
    """Raise ValueError unless value is a finite number in [low, high].

    low_is_open: low itself is refused too.
    is_int: only an int will do.
    """
    kinds = (int,) if is_int else (int, float)
    is_number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    too_low = is_number and low is not None and (value <= low if low_is_open else value < low)
    if not is_number or too_low or (high is not None and value > high):
        opening = "(" if low_is_open else "["
        bounds = (
            ""
            if low is None
            else f" in {opening}{low:g}, {'inf)' if high is None else f'{high:g}]'}"
        )
        raise ValueError(
            f"{name} must be {'an int' if is_int else 'a number'}{bounds}, got {value!r}"
        )
