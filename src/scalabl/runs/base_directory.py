"""Where a base model's directory is: how a run records it, and how it is found again. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from scalabl.core.errors import UserError

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_ENCODER = "minilm-l6"
_NAMES = (EMBEDDED, EMBEDDED_ENCODER)


def as_recorded(name: str) -> str:
    """A base model as a record names it: a directory by its whole path, other names as they are."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if name not in _NAMES and os.path.isdir(path) else name


def find_base(name: str, run: Path) -> str:
    """A run's base model where it is now.

    A relative path, as older records have it, is looked for from here, from the run's directory and from each of its
    parents; a whole path that is not there any more likewise by its ends, for a project that was moved. What is found
    is still held against the fingerprint of the run's base.

    Args:
        name: as a record or an adapter's configuration names it.
        run: the directory that it lies in.

    Returns:
        the directory; a name that is no path as it is.

    Raises:
        UserError: it is a path to no directory.
    """
    path = Path(os.path.expanduser(name))
    if name in _NAMES or path.is_dir():
        return name
    parts = path.parts[1:] if path.is_absolute() else path.parts
    ends = [Path(*parts[i:]) for i in range(len(parts))] if path.is_absolute() else [path]
    for place in (Path.cwd(), run.resolve(), *run.resolve().parents):
        for end in ends:
            if (place / end / "config.json").is_file():
                return str(place / end)
    if name.startswith((".", "/", "~")):
        raise UserError(
            f"The base model of {run} was in {name}, which is not there; say where it is with --model (model=... in "
            "Python)."
        )
    return name
