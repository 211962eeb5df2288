"""The report's first paragraph: what was generated and how it fares, in words made from numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluate import TRAINING_SET, Evaluation
from .runs import Run
from .table import Row


def summarize(
    runs: Sequence[Run], evaluation: Evaluation | None, rows: dict[str, list[Row]]
) -> str:
    """One paragraph about the first run, or the first evaluated set where there are no runs.

    rows: metric_rows(evaluation); {} without one.
    """
    sentences = []
    if runs:
        sentences.append(_what_was_generated(runs[0]))
    if evaluation:
        sentences.append(_what_it_is_compared_with(evaluation))
        sentences.append(_how_it_fares(evaluation, rows))
    elif len(runs) > 1:
        sentences.append(f"Beside it {_stand(len(runs) - 1)} {_list([r.name for r in runs[1:]])}.")
    if runs and runs[0].summary:
        sentences.append(_what_is_copied(runs[0]))
    return " ".join(sentences)


def _what_was_generated(run: Run) -> str:
    prompts = list(run.prompts.values())
    about = f"“{prompts[0]}”" if len(prompts) == 1 else f"{len(prompts)} prompts"
    guidance = run.summary.get("guidance")
    return (
        f"{run.name} holds {_count(len(run.examples), 'text')} that "
        f"{_was(len(run.examples))} generated for {about}"
        f"{f' with the guidance {guidance}' if guidance else ''}."
    )


def _what_it_is_compared_with(evaluation: Evaluation) -> str:
    others = [s.name for s in evaluation.sets[1:] if s.name != TRAINING_SET]
    real = _count(evaluation.real.num_texts, "real text")
    if others:
        start = f"Beside it {_stand(len(others))} {_list(others)}; all are compared with the same"
    else:
        start = "It is compared with"
    return f"{start} {real}, at {_count(evaluation.sample_size, 'text')} of each."


def _how_it_fares(evaluation: Evaluation, rows: dict[str, list[Row]]) -> str:
    """A sentence for each group of metrics, with the group's first metric as the example."""
    lead, sentences = evaluation.sets[0].name, []
    for group, group_rows in rows.items():
        first = next((row for row in group_rows if row.values[0].value), None)
        if first is None:
            continue
        real = f"; real texts {first.real.value}" if first.real.value else ""
        example = f"{first.metric.title} {first.values[0].value}{real}"
        ranked = [row for row in group_rows if any(value.mark for value in row.values)]
        subject = "it" if sentences else lead
        verdict = f", {subject} {_verdict(ranked)} ({example})" if ranked else f": {example}"
        sentences.append(f"On {group}{verdict}.")
    return " ".join(sentences)


def _verdict(ranked: Sequence[Row]) -> str:
    """In how many metrics the first set is best, or level with the best."""
    marks = [row.values[0].mark for row in ranked]
    if len(marks) == 1:
        return {"best": "is best", "level": "is level with the best"}.get(marks[0], "is not best")
    num_best, num_level = marks.count("best"), marks.count("level")
    of = f"of {_count(len(marks), 'metric')}"
    if num_best == len(marks):
        return f"is best in all {of}"
    best = f"is best in {num_best or 'none'} {of}"
    return f"{best} and level with the best in {num_level}" if num_level else best


def _what_is_copied(run: Run) -> str:
    copies = run.summary.get("num_copies_of_real", 0)
    repeats = run.summary.get("num_duplicates", 0)
    return (
        f"Word for word, {_count(copies, 'text')} of {run.name} "
        f"{'copies' if copies == 1 else 'copy'} a real one and {_count(repeats, 'text')} "
        f"{'repeats' if repeats == 1 else 'repeat'} an earlier one."
    )


def _count(number: int, noun: str) -> str:
    shown = f"{number:,}" if number else "no"
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def _stand(number: int) -> str:
    return "stands" if number == 1 else "stand"


def _list(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"
