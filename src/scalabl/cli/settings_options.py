"""The options of `train` and `plan`, made of the settings' fields: names, types, defaults, help and panels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from scalabl.runs.settings import FIELDS, PLACES, kind_of


class SettingsCommand(TyperCommand):
    """A command whose help has each switch in one column, so that no name is cut; `help` names the other way."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            parameter.secondary_opts = []
        super().format_help(ctx, formatter)


def with_settings(chosen: Mapping[str, Mapping[str, str]] | None = None) -> Callable[[Callable[..., None]], Any]:
    """Give a command the options of settings, behind its own of the first panel.

    Args:
        chosen: which settings, with "names" and "help" where an option is to have others; all that have one if None.

    Returns:
        a decorator of a command whose first argument is the dict of what was given, None for what was not.
    """
    options = {name: {} for name, each in FIELDS.items() if each.metadata["help"]} if chosen is None else chosen

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            command({name: values.pop(name) for name in options}, **values)

        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        below = [each for each in own if each.annotation.__metadata__[0].rich_help_panel]
        above = [each for each in own if each not in below]
        made = [_option(name, **changes) for name, changes in options.items()]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        signature = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*above, *made, *below)]
        run.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        return run

    return decorate


def _option(name: str, names: str | None = None, help: str | None = None) -> inspect.Parameter:
    """A setting as a parameter of a command; None where it is not given, so that a recipe's value holds."""
    each, kind = FIELDS[name], kind_of(name)
    long = f"--{name.replace('_', '-')}"
    text = help or each.metadata["help"]
    if kind is bool:
        text += f" {long.replace('--', '--no-')} turns it off."
    elif help is None and each.default is not None:
        text += f" Default: {each.default}."
    shown = None if each.metadata["first"] or PLACES[name] is None else str(PLACES[name]).capitalize()
    declared = f"{long}/{long.replace('--', '--no-')}" if kind is bool else names or each.metadata["option"] or long
    option = typer.Option(*declared.split(","), help=text, rich_help_panel=shown)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
