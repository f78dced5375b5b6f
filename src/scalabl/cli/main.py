"""The `scalabl` program, and how it fails: one sentence, exit code 2, no traceback."""

from __future__ import annotations

import errno
import os
import sys

import typer

from scalabl import __version__
from scalabl.errors import UserError

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

_DISK = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.EACCES: "permission was denied; choose a directory that you may write",
    errno.EPERM: "permission was denied; choose a directory that you may write",
}


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the program."""
    from scalabl.cli import data as _data  # noqa: F401  (each module adds its command to the app)
    from scalabl.cli import demo as _demo  # noqa: F401
    from scalabl.cli import evaluate as _evaluate  # noqa: F401
    from scalabl.cli import inspect as _inspect  # noqa: F401
    from scalabl.cli import predict as _predict  # noqa: F401
    from scalabl.cli import train as _train  # noqa: F401

    # progress and tables are ours; what libraries say beside them is for those who debug them
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("Interrupted; run the same command again to go on.", code=130)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{_DISK[error.errno]}.")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail("Out of memory; lower --batch-size, --max-length or --samples, or load the base with --bits 4.")


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, MemoryError) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _fail(sentence: str, code: int = 2) -> None:
    print(f"scalabl: {sentence}", file=sys.stderr)
    sys.exit(code)
