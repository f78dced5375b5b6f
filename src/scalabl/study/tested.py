"""What the runs of a study are tested on: a task's test rows, these with typing errors, other tasks, and rows out of
its scope. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import Example, Task
from scalabl.data.load import rows_of
from scalabl.data.load import shifted_rows as rows_elsewhere
from scalabl.data.typos import with_typos
from scalabl.study.study import Study

TYPOS, OUT_OF_SCOPE = "typos", "out_of_scope"


def sets_of(study: Study, task: str) -> dict[str, dict[str, Any]]:
    """Name -> what it is, of every set that the runs of a task are tested on; the task's own test rows come first.

    Of a set of another kind than rows of a task as they are, `TYPOS` has the share of characters or `OUT_OF_SCOPE` is
    true.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in (task, *study.shift.get(task, ()))}
    found |= {f"{task}, {share:.0%} typos": {TYPOS: share} for share in study.typos}
    return found | {name: {OUT_OF_SCOPE: True} for name in study.task(task).out_of_scope}


def rows_of_set(
    name: str,
    what: Mapping[str, Any],
    task: Task,
    *,
    of: str,
    data: str,
    test_rows: int | None,
    shift_rows: int | None,
) -> list[Example]:
    """The rows of a set.

    Args:
        name, what: as `sets_of` gives them.
        task: what the run was trained on.
        of: its name in the study.
        data: its name or path.
        test_rows, shift_rows: the most of its own test rows, and of any other set.

    Raises:
        UserError: there are none, its rows have no answers, or the run's labels do not fit.
    """
    if name == of:
        return tested_rows(data, test_rows)
    if TYPOS in what:
        return with_typos(tested_rows(data, shift_rows), what[TYPOS])
    if OUT_OF_SCOPE in what:
        return out_of_scope_rows(name, shift_rows, task)
    return _labelled(rows_of(name, limit=shift_rows, labels=task.labels), name)


def tested_rows(data: str, limit: int | None) -> list[Example]:
    """The rows that a task is tested on: its test split, or so many of it, the same ones every time.

    Raises:
        UserError: the task has no test split, or a row without an answer.
    """
    return _labelled(rows_of(data, split="test", limit=limit), data)


def out_of_scope_rows(data: str, limit: int | None, task: Task) -> list[Example]:
    """The rows that have none of a task's labels, without an answer; so many of them, the same ones every time.

    Raises:
        UserError: the task has no labels that all rows share, or no row is out of its scope.
    """
    if task.labels is None:
        raise UserError(f"out_of_scope names {data}, but {task.name} has no labels that all rows share; use shift.")
    rows = [row for row in rows_elsewhere(data, labels=task.labels) if row.target is None]
    if not rows:
        raise UserError(f"out_of_scope names {data}, but all of its rows have labels of {task.name}; use shift.")
    return random.Random(0).sample(rows, limit) if limit is not None and limit < len(rows) else rows


def tuning_rows(task: Task) -> tuple[Example, ...]:
    """Every row that training, fits and temperatures may draw from: the train and validation splits."""
    return tuple(row for name in ("train", "validation") if name in task.splits for row in task.split(name))


def overlap(test: Sequence[Example], tuning: Sequence[Example]) -> int:
    """How many test rows are also tuning rows, by their content."""
    known = set(map(_question, tuning))
    return sum(_question(row) in known for row in test)


def _question(row: Example) -> tuple[Any, ...]:
    """A row without its answer, in whichever order its choices stand."""
    return row.question, frozenset(row.choices), *row.content[2:]


def _labelled(rows: list[Example], data: str) -> list[Example]:
    for row in rows:
        if row.answers is not None:
            raise UserError(
                f"Row {row.id} of {data} may have several labels, which no benchmark judges; use scalabl evaluate."
            )
        if row.answer is None:
            raise UserError(f"Row {row.id} of {data} has no answer; a benchmark needs answers in every row.")
    return rows
