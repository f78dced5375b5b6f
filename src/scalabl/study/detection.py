"""Which number tells a wrong answer, and which a row out of scope: the AUROC of each score of a prediction.

The scores are `outcomes.scores`, with the method's temperature. detection.csv has a row for each of them, entry and
set: of errors among labelled rows, or of rows out of scope against the task's own test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scalabl.inference.report.table import number
from scalabl.study.cells import finished
from scalabl.study.outcomes import ERRORS, MISTYPED, STRANGE, outcomes, told
from scalabl.study.page import PageCell, PageTable
from scalabl.study.plan import StudyPlan


def detection_rows(plan: StudyPlan, output: Path) -> list[dict[str, Any]]:
    """The rows of detection.csv, of every finished entry in the plan's order."""
    return [
        {
            "method": entry.variant.name, "task": entry.task, "set": outcome.task, "tells": told(sets[outcome.task]),
            "score": score, "seed": entry.seeds[0], "auroc": auroc,
        }
        for entry in plan.entries
        if finished(output, entry.prediction) is not None
        for sets in [plan.cells[entry.prediction].settings["test_sets"]]
        for outcome in outcomes(plan.cells[entry.prediction], output, entry.variant.name)
        for score, auroc in outcome.detection.items()
    ]  # fmt: skip


def detection_tables(rows: Sequence[dict[str, Any]]) -> list[PageTable]:
    """A table for each method: mean AUROC over sets, seeds and tasks, and of how many tasks."""
    kinds, tables = (ERRORS, MISTYPED, STRANGE), []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        tasks = dict.fromkeys(row["task"] for row in own)
        means = {
            (score, kind): fmean(_of_tasks(rows_of_both))
            for score in dict.fromkeys(row["score"] for row in own)
            for kind in kinds
            if (rows_of_both := [row for row in own if (row["score"], row["tells"]) == (score, kind)])
        }
        best = {kind: max((v for (_, k), v in means.items() if k == kind), default=None) for kind in kinds}
        lines = []
        for score in dict.fromkeys(score for score, _ in means):
            values = [means.get((score, kind)) for kind in kinds]
            cells = [
                PageCell(
                    "–" if value is None else number(value, "auroc"), bold=value is not None and value == best[kind]
                )
                for kind, value in zip(kinds, values, strict=True)
            ]
            lines.append((score, cells))
        caption = f"{method} + T: AUROC of each score, mean over {len(tasks)} task{'s' if len(tasks) > 1 else ''}"
        tables.append(PageTable(caption, ("score", *kinds), lines, folded=True))
    return tables


def _of_tasks(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The mean AUROC of each task over its sets and seeds, which are more of some tasks than of others."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return [fmean(row["auroc"] for row in rows if row["task"] == task) for task in tasks]
