"""Which rows a run was trained on: figures on them, and what is fitted on them, are too good. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from scalabl.core.errors import UserError
from scalabl.data.assemble import repeated, select_rows
from scalabl.data.example import Example, Task
from scalabl.data.load import load_task
from scalabl.runs.record import RunRecord
from scalabl.runs.stock import is_stock


def trained_on(record: RunRecord, rows: Sequence[Example]) -> list[Example]:
    """Those of the rows that the run was trained on, by what they hold.

    Empty where nobody knows them: no record of another trainer's adapter, data that are not at hand or have changed.
    """
    task = None if is_stock(record) else _at_hand(record.recipe["data"])
    if task is None:
        return []
    try:
        taken = select_rows(task, record.row_settings)
    except UserError:  # other rows lie there now
        return []
    return repeated(rows, taken.train) if record.took(taken.train, taken.validation) else []


def trained_on_in_words(found: Sequence[Example], rows: Sequence[Example]) -> str:
    """ "270 of the 300 rows, tickets:1 the first of them, are rows that the run was trained on": no whole sentence."""
    of, first = f"of the {len(rows):,} rows", found[0].id
    if len(found) == 1:
        return f"1 {of}, {first}, is a row that the run was trained on"
    return f"{len(found):,} {of}, {first} the first of them, are rows that the run was trained on"


def _at_hand(data: str) -> Task | None:
    """The run's data where they lie on this machine; nothing is fetched to compare rows with."""
    for source in ("package", "cache"):
        with contextlib.suppress(UserError):
            return load_task(data, source=source)
    return None
