"""How runs were made: what differs between them, what they share, and the call that repeats one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import NamedTuple

from ..guidance import Guidance
from ..negatives import NegativePrompts
from ..sampling import SamplingParams
from .runs import Run

# run.json's parts that have a place of their own in the report.
ELSEWHERE = ("versions", "checkpoints")
ARGUMENT_TYPES = {
    "guidance": Guidance,
    "negatives": NegativePrompts,
    "sampling": SamplingParams,
}
ENGINE_ARGUMENTS = ("device", "dtype", "backend", "max_num_seqs", "max_model_len")


class SettingRow(NamedTuple):
    """A setting and its value in each run, in words."""

    name: str
    values: list[str]


def setting_rows(runs: Sequence[Run]) -> tuple[list[SettingRow], list[SettingRow]]:
    """Settings in which the runs differ, and those that they share (all, for a single run)."""
    flat = [dict(_flatten(run.settings)) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    rows = [SettingRow(name, [each.get(name, "n/a") for each in flat]) for name in names]
    differing = [row for row in rows if len(set(row.values)) > 1]
    return differing, [row for row in rows if len(set(row.values)) == 1]


def _flatten(settings: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if name == "sha256" or (not prefix and name in ELSEWHERE):
            continue
        if name == "prompts":
            yield from ((f"prompt {label}".strip(), text) for label, text in value.items())
        elif isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name} · ")
        else:
            yield f"{prefix}{name}".replace("_", " "), _in_words(value)


def _in_words(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value + 0.0:.4g}"  # a weight that is minus zero is shown as 0
    if isinstance(value, list):
        return ", ".join(json.dumps(v, ensure_ascii=False) for v in value) or "none"
    return str(value)


def python_call(run: Run) -> str:
    """Python that makes the run again, from run.json alone; the checkpoints have to be named."""
    settings = run.settings
    engine = settings.get("engine", {})
    lines = [
        "from steer_engine import Engine, Guidance, NegativePrompts, SamplingParams",
        "",
        "engine = Engine.from_pretrained(",
        '    "BASE", "DOMAIN",',
        *(f"    {name}={engine[name]!r}," for name in ENGINE_ARGUMENTS if name in engine),
        ")",
        "engine.generate_dataset(",
        f"    prompt={_prompt(run)!r},",
        f"    num_examples={settings.get('num_examples')},",
        *(['    real="REAL",'] if settings.get("real", {}).get("num_examples") else []),
        *(f"    {name}={_constructor(name, settings.get(name, {}))}," for name in ARGUMENT_TYPES),
        *_rare_arguments(settings),
        f"    seed={settings.get('seed')},",
        f'    output="{run.path.name}",',
        ")",
    ]
    return "\n".join(lines)


def _rare_arguments(settings: dict) -> list[str]:
    lines = []
    if settings.get("accept"):
        lines.append(f"    accept={settings['accept']},  # run.json holds its name alone")
    if settings.get("max_attempts", 10) != 10:
        lines.append(f"    max_attempts={settings['max_attempts']},")
    if settings.get("until"):
        rule = ", ".join(f"{name}={value!r}" for name, value in settings["until"].items())
        lines.append(f"    until=Convergence({rule}),  # from steer_engine.generation")
    return lines


def _prompt(run: Run) -> str | dict[str, str]:
    return run.prompts[""] if list(run.prompts) == [""] else run.prompts


def _constructor(name: str, values: dict) -> str:
    """Its fields that are not at their defaults."""
    kind = ARGUMENT_TYPES[name]
    arguments = []
    for field in fields(kind):
        value = values.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if field.default is MISSING or value != field.default:
            arguments.append(f"{field.name}={value!r}")
    return f"{kind.__name__}({', '.join(arguments)})"
