"""The rows of a study: which are trained and tuned on, and which are tested on. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scalabl.errors import UserError
from scalabl.rows import rows_of
from scalabl.tasks import Example, Task


def tested_rows(task: str, limit: int | None) -> list[Example]:
    """The rows that a task is tested on: its test split, or so many of it, the same ones every time.

    Raises:
        UserError: the task has no test split, or a row without an answer.
    """
    return _labelled(rows_of(task, split="test", limit=limit), task)


def shifted_rows(task: str, limit: int | None, labels: Sequence[str] | None) -> list[Example]:
    """The rows of another task that a run is tested on: its test split if there is one, else every row.

    Raises:
        UserError: the run's class words do not fit, or a row without an answer.
    """
    return _labelled(rows_of(task, limit=limit, labels=labels), task)


def tuning_rows(task: Task) -> tuple[Example, ...]:
    """Every row that training, fits and temperatures may draw from: the train and validation splits."""
    return tuple(row for name in ("train", "validation") if name in task.splits for row in task.split(name))


def overlap(test: Sequence[Example], tuning: Sequence[Example]) -> int:
    """How many test rows are also tuning rows, by their content."""
    known = set(map(_asked, tuning))
    return sum(_asked(row) in known for row in test)


def _asked(row: Example) -> tuple[Any, ...]:
    """What a row asks, in whichever order its choices stand."""
    return row.question, frozenset(row.choices), *row.content[2:]


def _labelled(rows: list[Example], task: str) -> list[Example]:
    for row in rows:
        if row.answer is None:
            raise UserError(f"Row {row.id} of {task} has no answer; a benchmark needs answers in every row.")
    return rows
