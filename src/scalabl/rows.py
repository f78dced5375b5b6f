"""The rows that a command is given by name or path. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from scalabl.tasks import Example, load_rows, load_task


def rows_of(
    data: str, *, split: str | None = None, limit: int | None = None, labels: Sequence[str] | None = None
) -> list[Example]:
    """Labelled rows of a benchmark or file.

    Args:
        data: a benchmark's name, a JSONL file, or a directory of them.
        split: which split; None takes "test" if there is one, else every row there is.
        limit: take so many, the same ones every time.
        labels: the class words of the run, for {"text", "label"} rows.

    Raises:
        UserError: no such data or split, or bad rows.
    """
    path = Path(data).expanduser()
    if path.is_file() and labels is not None and split is None:
        rows = list(load_rows(path, labels=labels))
    else:
        task = load_task(data)
        if split is not None:
            rows = list(task.split(split))
        elif "test" in task.splits:
            rows = list(task.split("test"))
        else:
            rows = [row for part in task.splits.values() for row in part]
    if limit is not None and limit < len(rows):
        rows = random.Random(0).sample(rows, limit)
    return rows
