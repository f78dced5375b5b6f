"""The tables of means: each method on each test set, over seeds, against MLE and against MLE with a temperature.

summary.csv holds them, a row for each method, test set and metric: mean, standard deviation and 95 % interval
(Student's) over seeds, and the paired differences with their 95 % intervals (bootstrap over rows and seeds).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev
from typing import Any

from scalabl.metrics.bootstrap import Metric
from scalabl.metrics.figures import METRICS
from scalabl.study.cells import finished
from scalabl.study.compare import over_seeds, paired_over_seeds
from scalabl.study.plan import StudyPlan, baseline_variant
from scalabl.study.results import Outcome, outcomes
from scalabl.study.study import TEMPERED, Study, Variant

# means without a comparison
OTHERS = (
    "ood_auroc", "ood_auroc_total", "validation_nll", "temperature",
    "extra_parameters", "train_cost", "predict_cost", "peak_memory",
)  # fmt: skip
_SHARES = ("accuracy", "ece", "auroc", "aurc", "ood_auroc", "ood_auroc_total")
RIVALS = ("mle", "mle+temperature")


@dataclass(frozen=True)
class Gap:
    """A method's metric minus a rival's on the same rows and seeds.

    Attributes:
        value, low, high: with its 95 % interval; None where the metric is undefined for one of them.
        verdict: "better", "worse" or "" (not told apart).
    """

    value: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass
class Figure:
    """A mean over seeds.

    Attributes:
        mean: or None where no seed has a value.
        sd: standard deviation over seeds; None for one seed.
        low, high: of the 95 % interval over seeds, within what the figure can be; None for one seed.
        values: of the seeds, in their order.
        best: whether it is the best, or not told apart from it.
        versus: of `RIVALS` those that it was compared with -> the difference.
    """

    mean: float | None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()
    best: bool = False
    versus: dict[str, Gap] = field(default_factory=dict)


@dataclass
class Line:
    """One method on one test set.

    Attributes:
        variant: what it is.
        tempered: whether with a temperature.
        seeds: how many there are.
        collapsed: in how many of them it is no better than guessing.
        figures: by column.
    """

    variant: Variant
    tempered: bool
    seeds: int
    collapsed: int
    figures: dict[str, Figure]

    @property
    def method(self) -> str:
        """Its name in the tidy table."""
        return self.variant.name + TEMPERED * self.tempered


@dataclass
class Table:
    """All methods trained on one task, on one test set of `n` rows; those with a temperature stand behind."""

    trained_on: str
    task: str
    n: int
    lines: list[Line]

    @property
    def shifted(self) -> bool:
        return self.trained_on != self.task


def summarize(study: Study, plan: StudyPlan, output: Path, rows: list[dict[str, Any]]) -> list[Table]:
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


def _by_method(study: Study, plan: StudyPlan, output: Path, task: str, tested: str) -> dict[str, dict[int, Outcome]]:
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
    for tempered in (False, True):
        for variant in study.variants:
            name = variant.name + TEMPERED * tempered
            if name in said:
                mle = baseline_variant(study, variant)
                rivals = dict(zip(RIVALS, (mle.name, mle.name + TEMPERED), strict=True)) if mle else {}
                some = [row for row in rows if row["method"] == name]
                collapsed = sum(row["collapsed"] for row in some)
                lines.append(Line(variant, tempered, len(some), collapsed, _figures(name, said, rivals, some)))
    _mark_best(lines, said)
    return Table(task, tested, rows[0]["n"], lines)


def _figures(
    name: str, said: Mapping[str, dict[int, Outcome]], rivals: Mapping[str, str], rows: list[dict[str, Any]]
) -> dict[str, Figure]:
    figures = {column: figure([row[column] for row in rows], column) for column in (*METRICS, *OTHERS)}
    for metric, higher in METRICS.items():
        for rival, of in rivals.items():
            if of in said and of != name and set(said[of]) & set(said[name]):
                gap = paired_over_seeds(said[name], said[of], metric)
                figures[metric].versus[rival] = Gap(gap.value, gap.low, gap.high, _verdict(gap, higher))
    return figures


def figure(values: Sequence[float | None], column: str) -> Figure:
    """The mean over seeds of those that have a value."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return Figure(None)
    mean, half = over_seeds(known)
    if half is None:
        return Figure(mean, values=tuple(known))
    # no figure is below zero, and these are at most one
    high = min(mean + half, 1.0) if column in _SHARES else mean + half
    return Figure(mean, stdev(known), max(mean - half, 0.0), high, tuple(known))


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


def summary_rows(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """The rows of summary.csv."""
    rows = []
    for table in tables:
        for line in table.lines:
            for metric in (*METRICS, *OTHERS):
                found = line.figures[metric]
                if found.mean is None:
                    continue
                row: dict[str, Any] = {
                    "trained_on": table.trained_on,
                    "task": table.task,
                    "method": line.method,
                    "metric": metric,
                }
                row |= {"seeds": len(found.values), "mean": found.mean, "sd": found.sd}
                row |= {"low": found.low, "high": found.high, "at_chance": line.collapsed}
                row["best"] = found.best if metric in METRICS else None
                for rival in RIVALS:
                    gap = found.versus.get(rival, Gap(None, None, None, ""))
                    row |= {
                        f"minus {rival}": gap.value,
                        f"minus {rival}, low": gap.low,
                        f"minus {rival}, high": gap.high,
                    }
                rows.append(row)
    return rows
