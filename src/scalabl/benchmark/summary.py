"""The table of means: each method on each test set, over seeds, against MLE and against MLE with a temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalabl.benchmark.baseline import baseline_variant
from scalabl.benchmark.cells import finished
from scalabl.benchmark.compare import over_seeds, paired_over_seeds
from scalabl.benchmark.plan import Plan
from scalabl.benchmark.results import Outcome, outcomes
from scalabl.benchmark.study import TEMPERED, Study
from scalabl.metrics import METRICS, Metric

# means without a comparison
OTHERS = (
    "ood_auroc", "ood_auroc_epistemic", "temperature", "extra_parameters", "train_cost", "predict_cost", "peak_memory",
)  # fmt: skip


@dataclass
class Figure:
    """A mean over seeds.

    Attributes:
        mean: or None where no seed has a value.
        half: of the 95 % interval over seeds; None for one seed.
        best: whether it is the best, or not told apart from it.
        versus: "mle" and "mle+temperature" -> "better", "worse" or "" (not told apart, or itself).
    """

    mean: float | None
    half: float | None = None
    best: bool = False
    versus: dict[str, str] = field(default_factory=dict)


@dataclass
class Line:
    """One method on one test set.

    Attributes:
        method: its name, with "+temperature" or without.
        seeds: how many there are.
        collapsed: in how many of them it is no better than guessing.
        why: the sentence of the first of those.
        figures: by column.
    """

    method: str
    seeds: int
    collapsed: int
    why: str | None
    figures: dict[str, Figure]


@dataclass
class Table:
    """All methods trained on one task, on one test set of `n` rows."""

    trained_on: str
    task: str
    n: int
    lines: list[Line]

    @property
    def shifted(self) -> bool:
        return self.trained_on != self.task


def summarize(study: Study, plan: Plan, output: Path, rows: list[dict[str, Any]]) -> list[Table]:
    """Tables of every task and test set that has a finished entry, shifted ones behind.

    Args:
        study, plan, output: what was run.
        rows: of `tidy`.
    """
    tables = []
    for task in study.tasks:
        for tested in (task, *(other for other in study.shift.get(task, ()) if other != task)):
            said = _by_method(study, plan, output, task, tested)
            if said:
                some = [row for row in rows if row["trained_on"] == task and row["task"] == tested]
                tables.append(_table(study, task, tested, said, some))
    return sorted(tables, key=lambda table: table.shifted)


def _by_method(study: Study, plan: Plan, output: Path, task: str, tested: str) -> dict[str, dict[int, Outcome]]:
    """Method -> seed -> outcome; an ensemble stands for each of its members' seeds."""
    said: dict[str, dict[int, Outcome]] = {}
    for tempered in (False, True):
        for variant in study.variants:
            name = variant.name + TEMPERED * tempered
            for entry in plan.entries:
                if entry.variant != variant or entry.task != task or finished(output, entry.prediction) is None:
                    continue
                for outcome in outcomes(plan.cells[entry.prediction], output, variant.name):
                    if outcome.method == name and outcome.task == tested:
                        said.setdefault(name, {}).update(dict.fromkeys(entry.seeds, outcome))
    return said


def _table(
    study: Study, task: str, tested: str, said: Mapping[str, dict[int, Outcome]], rows: list[dict[str, Any]]
) -> Table:
    lines = []
    for variant in study.variants:
        mle = baseline_variant(study, variant)
        for name in (variant.name, variant.name + TEMPERED):
            if name in said:
                rivals = {"mle": mle.name, "mle+temperature": mle.name + TEMPERED} if mle else {}
                lines.append(_line(name, said, rivals, [row for row in rows if row["method"] == name]))
    _mark_best(lines, said)
    return Table(task, tested, rows[0]["n"], lines)


def _line(
    name: str, said: Mapping[str, dict[int, Outcome]], rivals: Mapping[str, str], rows: list[dict[str, Any]]
) -> Line:
    figures = {column: _mean([row[column] for row in rows]) for column in (*METRICS, *OTHERS)}
    for metric, higher in METRICS.items():
        for rival, of in rivals.items():
            if of in said and of != name and set(said[of]) & set(said[name]):
                gap = paired_over_seeds(said[name], said[of], metric)
                figures[metric].versus[rival] = _verdict(gap, higher)
    collapsed = [row["collapsed"] for row in rows if row["collapsed"]]
    return Line(name, len(rows), len(collapsed), collapsed[0] if collapsed else None, figures)


def _mean(values: list[float | None]) -> Figure:
    known = [float(value) for value in values if value is not None]
    return Figure(*over_seeds(known)) if known else Figure(None)


def _verdict(gap: Metric, higher: bool) -> str:
    if gap.value is None or gap.low is None or gap.high is None or gap.low <= 0 <= gap.high:
        return ""
    return "better" if (gap.value > 0) == higher else "worse"


def _mark_best(lines: list[Line], said: Mapping[str, dict[int, Outcome]]) -> None:
    """A method that is at chance with any seed is never best; with one method there is no best."""
    if len(lines) < 2:
        return
    for metric, higher in METRICS.items():
        standing = [line for line in lines if not line.collapsed and line.figures[metric].mean is not None]
        if not standing:
            continue
        sign = 1 if higher else -1
        best = max(standing, key=lambda line: sign * (line.figures[metric].mean or 0.0))
        for line in standing:
            shared = set(said[line.method]) & set(said[best.method])
            tied = bool(shared) and not _verdict(
                paired_over_seeds(said[line.method], said[best.method], metric), higher
            )
            line.figures[metric].best = line is best or tied
