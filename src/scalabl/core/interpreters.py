"""Interpreters that a command starts: none of them imports a file from where the user happens to stand.

Python puts the current directory in front of the path of `python -m` and `python -c`, so that a `pip.py` beside the
user would run in the place of pip. Every child is started with safe paths (`-P`) here, also where a library starts it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SAFE = "PYTHONSAFEPATH"


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs an installed module; give it a scratch directory where it needs no other."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child, with safe paths for its own children too."""
    return {**os.environ, _SAFE: "1", **changes}


@contextmanager
def safe_paths() -> Iterator[None]:
    """Context in which whatever a library starts (multiprocessing, its resource tracker, Ray) has safe paths."""
    before = os.environ.get(_SAFE)
    keep_safe_paths()
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE]
        else:
            os.environ[_SAFE] = before


def keep_safe_paths() -> None:
    """From now on, whatever this process starts has safe paths: what a command does first."""
    os.environ[_SAFE] = "1"
