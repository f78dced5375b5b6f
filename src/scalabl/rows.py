"""The rows that a command is given by name or path. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scalabl.errors import UserError
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
    rows = with_labels(rows, labels, data)
    if limit is not None and limit < len(rows):
        rows = random.Random(0).sample(rows, limit)
    return rows


def with_labels(rows: Sequence[Example], labels: Sequence[str] | None, data: str | Path) -> list[Example]:
    """Rows with the run's class words as their choices, in the run's order; unchanged where it has none.

    Raises:
        UserError: a row has a choice that is none of the class words.
    """
    return list(rows) if labels is None else [_with_labels(row, tuple(labels), data) for row in rows]


def _with_labels(row: Example, labels: tuple[str, ...], data: str | Path) -> Example:
    if row.choices == labels:
        return row
    if not set(row.choices) <= set(labels):
        raise UserError(
            f"{data} has the labels {', '.join(row.choices)}, but the run was trained on {', '.join(labels)}; give "
            "rows with the run's labels."
        )
    answer = None if row.answer is None else labels.index(row.choices[row.answer])
    return replace(row, choices=labels, answer=answer)
