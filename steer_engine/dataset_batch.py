"""Several data sets written through one batch.

Whenever a place in the batch is free, the data set that is furthest behind starts its next example,
among those whose next example's negatives are complete. Alone, a data set leaves places empty while
all that may start wait for one long example, and at its end; beside others it leaves them to those.
Data sets that advance side by side also draw equal negatives from equal real examples at the same
time, so that the cache computes them once.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from .errors import nearest_hint
from .generation import DatasetRun
from .progress import ProgressBar
from .run_record import describe_environment
from .scheduler import Scheduler

if TYPE_CHECKING:
    from .engine import Engine

# Arguments of generate_dataset that data sets in one batch have in common.
COMMON_ARGUMENTS = ("seed", "output", "resume", "progress")
logger = logging.getLogger(__name__)


def complete_arguments(given: Mapping[str, Any], function: Callable) -> dict[str, Any]:
    """All arguments of one data set: the given ones, and the function's defaults.

    function: Engine.generate_dataset, bound.
    Raises: ValueError for an argument that is unknown, common to all, or missing.
    """
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p.default for p in parameters if p.name not in COMMON_ARGUMENTS}
    for name in given:
        if name in COMMON_ARGUMENTS:
            raise ValueError(f"{name} is common to all data sets; pass it beside the requests")
        if name not in known:
            raise ValueError(f"unknown argument {name!r}{nearest_hint(name, known)}")
    complete = known | dict(given)
    missing = [name for name, value in complete.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return complete


def write_together(
    engine: Engine, runs: Sequence[DatasetRun], *, seed: int, resume: bool, progress: bool
) -> None:
    """Run data sets of different names and one seed to their ends."""
    started_at = time.monotonic()
    by_name = {run.name: run for run in runs}
    has_output = any(run.output is not None for run in runs)
    environment = describe_environment(engine) if has_output else {}
    with ExitStack() as stack:
        # Those that exist come first: what does not fit them is refused before a new one is begun.
        for run in sorted(runs, key=lambda run: not run.exists):
            logger.info("%s", run.describe())
            stack.enter_context(run.open(environment, resume=resume))
        unfinished = _finish(engine.scheduler, runs, started_at)
        bar = stack.enter_context(_progress_bar(runs, progress))
        while unfinished:
            _fill(engine.scheduler, unfinished)
            for sequence in engine.step(seed):
                next_attempt = by_name[sequence.key.run].take(sequence)
                if next_attempt is not None:
                    engine.scheduler.waiting.appendleft(next_attempt)
            for run in unfinished:
                run.write()
            unfinished = _finish(engine.scheduler, unfinished, started_at)
            _show(bar, runs)


def _fill(scheduler: Scheduler, runs: Sequence[DatasetRun]) -> None:
    """Queue examples while places are free and pools complete."""
    places = scheduler.max_num_seqs - scheduler.num_queued
    for _ in range(places):
        ready = [run for run in runs if run.can_start]
        if not ready:
            break
        furthest_behind = min(ready, key=lambda run: run.next_index)
        scheduler.waiting.append(furthest_behind.start())


def _finish(
    scheduler: Scheduler, runs: Sequence[DatasetRun], started_at: float
) -> list[DatasetRun]:
    """Close the runs that are done, and return the others."""
    done = {run.name for run in runs if run.is_done}
    if not done:
        return list(runs)
    # A run that has converged leaves examples behind that nobody waits for any more.
    scheduler.drop(lambda sequence: sequence.key.run in done)
    for run in runs:
        if run.name in done:
            run.finish(time.monotonic() - started_at)
    return [run for run in runs if run.name not in done]


def _progress_bar(runs: Sequence[DatasetRun], is_enabled: bool) -> ProgressBar:
    num_examples = sum(run.request.num_examples for run in runs)
    return ProgressBar(num_examples, sum(run.num_resumed for run in runs), enabled=is_enabled)


def _show(bar: ProgressBar, runs: Sequence[DatasetRun]) -> None:
    num_attempts = sum(run.num_session_attempts for run in runs)
    num_kept = num_attempts - sum(run.num_rejected for run in runs)
    bar.update(
        sum(len(run.examples) for run in runs),
        sum(run.num_tokens for run in runs),
        num_kept / num_attempts if num_attempts else 1.0,
    )
