"""The `scalabl` program, and how it fails: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import typer

from scalabl.core import __version__, processes
from scalabl.core.errors import UserError

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

_FULL = "the disk is full; free some space and run the same command again"
_DISK = {
    errno.ENOSPC: _FULL,
    errno.EFBIG: "a file became larger than this disk or its limits (ulimit -f) allow; choose another directory",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.EISDIR: "a directory stands where a file is to be written; choose another name, or move it away",
    errno.ENOTEMPTY: "another call has written there meanwhile; choose another directory",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EACCES: "permission was denied; choose a directory that you may write",
    errno.EPERM: "permission was denied; choose a directory that you may write",
}


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version.")
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    command = context.invoked_subcommand
    if processes.world_size() > 1 and command is not None and command not in _SEVERAL:
        raise UserError(f"{command} runs in one process; several are for {', '.join(_SEVERAL)}.")


def explain(error: Exception) -> str | None:
    """What went wrong in one sentence that names the mend; None for what is no user's business (a bug)."""
    if isinstance(error, UserError):
        return str(error)
    if hasattr(error, "format_message"):  # the parser's own: a missing option, a word for a number
        sentence = str(error.format_message()).rstrip(".")
        return f"{sentence}; see scalabl --help." if sentence else ""
    if isinstance(error, OSError) and error.errno in _DISK:
        file = error.filename2 or error.filename  # of a file that was to be put in place, its place
        return f"{f'{file}: ' if file else ''}{_DISK[error.errno]}."
    text = str(error)
    # safetensors and torch.save report a failed write in words of their own
    for number, sentence in _DISK.items():
        if f"(os error {number})" in text:
            return f"{sentence[0].upper()}{sentence[1:]}."
    if "inline_container" in text or "file write failed" in text:
        return f"A checkpoint could not be written, perhaps {_FULL}."
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in signs)):
        return "Out of memory; lower --batch-size, --max-length or --samples, or load the base with --bits 4."
    return None


def fail(sentence: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on standard error, said by one of its processes."""
    if sentence and processes.is_first_to_fail():  # without a sentence, the help was printed instead
        print(f"scalabl: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(code)
