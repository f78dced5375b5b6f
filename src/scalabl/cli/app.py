"""The `scalabl` program, and how it fails: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from scalabl.core import __version__, processes
from scalabl.core.console import say
from scalabl.core.errors import UserError
from scalabl.core.remote_code import OPTION, allow_remote_code

app = typer.Typer(
    name="scalabl",
    help="LoRA fine-tuned language models that know what they don't know.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data = typer.Typer(help="Benchmarks that are known by name.", no_args_is_help=True)
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
