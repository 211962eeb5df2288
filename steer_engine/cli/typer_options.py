"""Options as typer takes them: the table in options.py becomes parameters of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..options import Option, complete, flag, read_run_file
from ..recipes import find_recipe

RunFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of these options; the command line overrides it."),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Log what happens to standard error.")]
# main() looks for the flag itself; commands declare it to be allowed and shown.
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def with_options(options: Sequence[Option]) -> Callable:
    """Give a command one option for each of these, passed on as a dict `given`."""
    return lambda function: _add_options(function, options)


def _add_options(function: Callable, options: Sequence[Option]) -> Callable:
    names = {option.name for option in options}

    def command(**arguments):
        given = {name: arguments.pop(name) for name in list(arguments) if name in names}
        return function(given=given, **arguments)

    own = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.name != "given"
    ]
    command.__signature__ = inspect.Signature([*map(_parameter, options), *own])
    command.__doc__ = function.__doc__
    command.__name__ = function.__name__
    return command


def _parameter(option: Option) -> inspect.Parameter:
    """An option's parameter: None, or an empty list, where the command line does not say."""
    name = flag(option.name)
    spelling = f"{name}/--no-{name[2:]}" if option.kind is bool else name
    declared = typer.Option(spelling, help=option.help + _shown_default(option), show_default=False)
    kind = list[str] if option.kind is list else option.kind
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, declared],
    )


def _shown_default(option: Option) -> str:
    if option.shown_default == "required":
        return " [required]"
    if option.shown_default is None and option.default is None:
        return ""
    return f" [default: {option.shown_default or _spelled(option.default)}]"


def _spelled(default: Any) -> str:
    """A default as one would write it; quotes only where a text's ends would not be seen."""
    if isinstance(default, bool):
        return "on" if default else "off"
    is_plain = f"{default}".isprintable() and f"{default}" == f"{default}".strip()
    return f"{default}" if is_plain else repr(default)


def complete_run(
    given: dict[str, Any], config: Path | None, options: Sequence[Option]
) -> dict[str, Any]:
    """The values of a run's options: the command line's, the run file's, the recipe's, defaults."""
    from_file = {} if config is None else read_run_file(config, options)
    values = complete(given, from_file, options=options)
    if values["recipe"] is None:
        return values
    recipe = find_recipe(values["recipe"])
    return complete(given, from_file, recipe.options(values), options=options)
