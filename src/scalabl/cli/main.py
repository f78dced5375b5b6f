"""The `scalabl` program: every command, run, and ended with one sentence where it fails."""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

import typer

from scalabl.cli import acquire as _acquire  # noqa: F401
from scalabl.cli import bayesianize as _bayesianize  # noqa: F401
from scalabl.cli import benchmark as _benchmark  # noqa: F401
from scalabl.cli import calibrate as _calibrate  # noqa: F401
from scalabl.cli import card as _card  # noqa: F401
from scalabl.cli import doctor as _doctor  # noqa: F401
from scalabl.cli import evaluate as _evaluate  # noqa: F401
from scalabl.cli import export as _export  # noqa: F401
from scalabl.cli import generate as _generate  # noqa: F401
from scalabl.cli import inspect as _inspect  # noqa: F401
from scalabl.cli import plan as _plan  # noqa: F401
from scalabl.cli import predict as _predict  # noqa: F401
from scalabl.cli import serve as _serve  # noqa: F401
from scalabl.cli import train as _train  # noqa: F401
from scalabl.cli.app import app, fail
from scalabl.core import processes
from scalabl.core.console import any_console, quiet_imports, say
from scalabl.core.errors import explain
from scalabl.core.interpreters import keep_safe_paths


def main() -> None:
    """Run the program."""
    keep_safe_paths()
    quiet_imports()
    with any_console():
        _run()


def _run() -> NoReturn:
    try:
        code = app(standalone_mode=False, prog_name="scalabl")
        sys.stdout.flush()  # what cannot be written shows here
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        sentence = explain(error)
        if sentence is None and processes.is_first_to_fail():
            say(traceback.format_exc(), stderr=True)
            sys.exit(1)
        fail(sentence or "")
    if code == 130:
        fail("Interrupted; run the same command again to go on.", code=130)
    sys.exit(code or 0)
