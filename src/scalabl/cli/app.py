"""The `scalabl` program, and how it fails: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from scalabl.core import __version__, processes
from scalabl.core.console import say
from scalabl.core.errors import UserError
from scalabl.core.remote_code import OPTION, allow_remote_code


class HelpedCommand(TyperCommand):
    """A command whose help reads at 80 columns: paragraphs are filled, and each switch stands in one column, so that no
    name is cut; its text names the other way."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.help:
            self.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in self.help.split("\n\n"))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            parameter.secondary_opts = []
        super().format_help(ctx, formatter)


class _App(typer.Typer):
    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": HelpedCommand, **options})


app = _App(
    name="scalabl",
    help="LoRA fine-tuned language models that know what they don't know.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = _App(help="Benchmarks that are known by name.", no_args_is_help=True)
app.add_typer(data, name="data")

_SEVERAL = ("train", "evaluate", "predict")  # commands that several processes share


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version."),
    trusted: bool = typer.Option(False, OPTION, help="Let the base model run Python code of its own."),
) -> None:
    if trusted:
        allow_remote_code()
    if version:
        say(__version__)
        raise typer.Exit
    command = context.invoked_subcommand
    if processes.world_size() > 1 and command is not None and command not in _SEVERAL:
        raise UserError(f"{command} runs in one process; several are for {', '.join(_SEVERAL)}.")


def fail(sentence: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on standard error, said by one of its processes."""
    if sentence and processes.is_first_to_fail():  # without a sentence, the help was printed instead
        say(f"scalabl: {' '.join(sentence.split())}", stderr=True)
    sys.exit(code)
