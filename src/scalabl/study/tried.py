"""The settings that were tried, by the NLL of validation rows: what was chosen on each task, and what would do best on
all of them.

tried.csv has a row for each setting and task: the NLL in nats as it is and with the temperature that suits it, the
temperature, and whether it was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from scalabl.inference.report.table import number
from scalabl.study import look
from scalabl.study.page import PageCell, PageTable
from scalabl.study.plan import LOSSES, Attempt, StudyPlan
from scalabl.study.variants import in_words

COLUMNS = ("method", "task", "settings", "seed", *LOSSES, "temperature", "chosen", "cell")


@dataclass(frozen=True)
class Trial:
    """A finished attempt.

    Attributes:
        attempt: what it was.
        raw, calibrated: NLL of validation rows in nats, as it is and with a temperature; None where it is no number.
        temperature: that temperature.
        chosen: whether it is the one that is taken.
    """

    attempt: Attempt
    raw: float | None
    calibrated: float | None
    temperature: float
    chosen: bool

    @property
    def settings(self) -> str:
        """In words."""
        return in_words(self.attempt.point)


def trials(plan: StudyPlan, output: Path) -> list[Trial]:
    """The attempts that are finished, in the plan's order."""
    found = []
    for attempt in plan.attempts:
        facts = plan.figures(output, attempt)
        if facts is not None:
            taken = plan.choices.get((attempt.task, attempt.variant.name)) == attempt.point
            found.append(Trial(attempt, facts["raw"], facts["calibrated"], facts["temperature"], taken))
    return found


def tried_rows(found: Sequence[Trial], seed: int) -> list[dict[str, Any]]:
    """The rows of tried.csv."""
    return [
        {
            "method": trial.attempt.variant.name,
            "task": trial.attempt.task,
            "settings": trial.settings,
            "seed": seed,
            **dict(zip(LOSSES, (trial.raw, trial.calibrated), strict=True)),
            "temperature": trial.temperature,
            "chosen": trial.chosen,
            "cell": trial.attempt.prediction,
        }
        for trial in found
    ]


def tried_tables(found: Sequence[Trial]) -> list[PageTable]:
    """A table for each method: a setting's NLL on each task, and beside them how far it is from the first setting and
    from each task's best one, on average over the tasks that have both."""
    tables = []
    for method in dict.fromkeys(trial.attempt.variant.method for trial in found):
        own = [trial for trial in found if trial.attempt.variant.method == method]
        tasks = list(dict.fromkeys(trial.attempt.task for trial in own))
        by_setting: dict[str, dict[str, Trial]] = {}
        for trial in own:
            by_setting.setdefault(trial.settings, {}).setdefault(trial.attempt.task, trial)
        best = {task: min(losses) for task in tasks if (losses := _losses(by_setting, task))}
        first = next(iter(by_setting.values()))
        rows = []
        for setting, on in by_setting.items():
            cells = [_cell(on.get(task), best.get(task)) for task in tasks]
            gaps = [_gap(on, first, task) for task in tasks]
            known = [gap for gap in gaps if gap is not None]
            behind = [loss - best[task] for task in tasks if task in on and (loss := on[task].calibrated) is not None]
            from_first = f"{number(mean(known), 'nll', signed=True)} ({len(known)})" if known else "–"
            from_best = f"{number(mean(behind), 'nll')}, {number(max(behind), 'nll')}" if behind else "–"
            rows.append((setting, [*cells, PageCell(from_first), PageCell(from_best)]))
        heads = ("settings", *tasks, "minus the first (tasks)", "behind the best: mean, most")
        tables.append(PageTable(f"{method}: NLL of validation rows, with a temperature", heads, rows))
    return tables


def _losses(by_setting: Mapping[str, Mapping[str, Trial]], task: str) -> list[float]:
    return [loss for on in by_setting.values() if task in on and (loss := on[task].calibrated) is not None]


def _gap(on: Mapping[str, Trial], first: Mapping[str, Trial], task: str) -> float | None:
    pair = [of[task].calibrated if task in of else None for of in (on, first)]
    return None if pair[0] is None or pair[1] is None else pair[0] - pair[1]


def _cell(trial: Trial | None, best: float | None) -> PageCell:
    if trial is None or trial.calibrated is None:
        return PageCell("–")
    marks = look.CHOSEN if trial.chosen else ""
    return PageCell(number(trial.calibrated, "nll"), bold=trial.calibrated == best, marks=marks)
