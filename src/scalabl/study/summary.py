"""The tables of means: each method on each test set, over seeds, against MLE and against MLE with a temperature.

summary.csv has a row for each method, test set and metric: mean, standard deviation and 95 % interval (Student's) over
seeds, and the paired differences with their 95 % intervals (bootstrap over rows and seeds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics.bootstrap import Metric, interval
from scalabl.metrics.figures import METRICS
from scalabl.runs.registry import BASELINE
from scalabl.study.cells import finished
from scalabl.study.outcomes import BOOTSTRAP, CONFIDENCE, Outcome, outcomes
from scalabl.study.plan import StudyPlan, baseline_variant
from scalabl.study.study import Study
from scalabl.study.tested import sets_of
from scalabl.study.variants import TEMPERED, Variant

# means without a comparison
OTHERS = (
    "ood_auroc", "ood_auroc_total", "validation_nll", "temperature",
    "extra_parameters", "train_cost", "predict_cost", "peak_memory",
)  # fmt: skip
_SHARES = ("accuracy", "ece", "auroc", "aurc", "ood_auroc", "ood_auroc_total")
BASELINES = (BASELINE, f"{BASELINE}+temperature")
BySeed = Mapping[int, Outcome]


@dataclass(frozen=True)
class Gap:
    """A method's metric minus a baseline's on the same rows and seeds.

    Attributes:
        value, low, high: with its 95 % interval; None where the metric is undefined for one of them.
        verdict: "better", "worse" or "" (the interval has zero in it).
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""


@dataclass
class Figure:
    """A mean over seeds.

    Attributes:
        mean: or None where no seed has a value.
        sd: standard deviation over seeds; None for one seed.
        low, high: of the 95 % interval over seeds, within what the figure can be; None for one seed.
        values: of the seeds, in their order.
        best: whether it is the best, or not told apart from it.
        versus: of `BASELINES` those that it was compared with -> the difference.
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
        for tested in sets_of(study, task):
            by_method = outcomes_by_method(study, plan, output, task, tested)
            if by_method:
                some = [row for row in rows if row["trained_on"] == task and row["task"] == tested]
                tables.append(_table(study, task, tested, by_method, some))
    return sorted(tables, key=lambda table: table.shifted)


def outcomes_by_method(
    study: Study, plan: StudyPlan, output: Path, task: str, tested: str
) -> dict[str, dict[int, Outcome]]:
    """Method -> seed -> outcome; an ensemble stands for each of its members' seeds."""
    found: dict[str, dict[int, Outcome]] = {}
    for variant in study.variants:
        for entry in plan.entries:
            if entry.variant == variant and entry.task == task and finished(output, entry.prediction) is not None:
                for outcome in outcomes(plan.cells[entry.prediction], output, variant.name):
                    if outcome.task == tested:
                        found.setdefault(outcome.method, {}).update(dict.fromkeys(entry.seeds, outcome))
    return found


def _table(study: Study, task: str, tested: str, by_method: Mapping[str, BySeed], rows: list[dict[str, Any]]) -> Table:
    lines = []
    for tempered in (False, True):
        for variant in study.variants:
            line = Line(variant, tempered, 0, 0, {})
            if line.method in by_method:
                some = [row for row in rows if row["method"] == line.method]
                line.seeds, line.collapsed = len(some), sum(row["collapsed"] for row in some)
                mle = baseline_variant(study, variant)
                line.figures = _figures(line.method, by_method, mle, some)
                lines.append(line)
    _mark_best(lines, by_method)
    return Table(task, tested, rows[0]["n"], lines)


def _figures(
    name: str, by_method: Mapping[str, BySeed], mle: Variant | None, rows: list[dict[str, Any]]
) -> dict[str, Figure]:
    figures = {column: figure([row[column] for row in rows], column) for column in (*METRICS, *OTHERS)}
    baselines = dict(zip(BASELINES, (mle.name, mle.name + TEMPERED), strict=True)) if mle else {}
    for baseline, of in baselines.items():
        if of in by_method and of != name and set(by_method[of]) & set(by_method[name]):
            for metric, higher in METRICS.items():
                gap = paired_over_seeds(by_method[name], by_method[of], metric)
                figures[metric].versus[baseline] = Gap(gap.value, gap.low, gap.high, _verdict(gap, higher))
    return figures


def figure(values: Sequence[float | None], column: str) -> Figure:
    """The mean over seeds of those that have a value."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return Figure(None)
    center, half = over_seeds(known)
    if half is None:
        return Figure(center, values=tuple(known))
    # no figure is below zero, and these are at most one
    high = min(center + half, 1.0) if column in _SHARES else center + half
    return Figure(center, stdev(known), max(center - half, 0.0), high, tuple(known))


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the 95 % interval of Student's t; no interval for one value."""
    if len(values) < 2:
        return values[0], None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values), half


def _verdict(gap: Metric, higher: bool) -> str:
    if gap.value is None or gap.low is None or gap.high is None or gap.low <= 0 <= gap.high:
        return ""
    return "better" if (gap.value > 0) == higher else "worse"


def _mark_best(lines: list[Line], by_method: Mapping[str, BySeed]) -> None:
    """A method that is at chance with any seed is never best; with one method there is no best."""
    for metric, higher in METRICS.items():
        standing = [line for line in lines if not line.collapsed and line.figures[metric].mean is not None]
        if len(lines) < 2 or not standing:
            continue
        best = max(standing, key=lambda line: (1 if higher else -1) * (line.figures[metric].mean or 0.0))
        own = by_method[best.method]
        for line in standing:
            other = by_method[line.method]
            tied = bool(set(other) & set(own)) and not _verdict(paired_over_seeds(other, own, metric), higher)
            line.figures[metric].best = line is best or tied


def paired_over_seeds(a: BySeed, b: BySeed, metric: str, *, seed: int = 0) -> Metric:
    """The mean over seeds of metric(a) - metric(b), with the interval of the paired bootstrap over rows and seeds.

    A resample draws rows, the same ones for both methods and all seeds, and seeds, the same ones for both methods.
    With three seeds an interval is narrower than it should be: three runs know little about a fourth.

    Args:
        a, b: seed -> the outcome on the same rows; seeds that only one of them has are left out.
        metric: a name of `scalabl.metrics.METRICS`.
        seed: of the resampled seeds.

    Raises:
        UserError: no seed in common, other rows, or no such metric.
    """
    drawn = paired_draws(a, b, metric, seed=seed)
    if drawn is None:
        return Metric(None, None, None, f"{metric} is undefined for one of the two methods")
    return interval(*drawn, CONFIDENCE)


def paired_draws(a: BySeed, b: BySeed, metric: str, *, seed: int = 0) -> tuple[float, Tensor] | None:
    """The difference of `paired_over_seeds`, and that of each resample (BOOTSTRAP,); None where it is undefined."""
    if metric not in METRICS:
        raise UserError(f"there is no metric {metric!r}; choose from {', '.join(METRICS)}.")
    common = [s for s in a if s in b]
    if not common:
        raise UserError("the two methods have no seed in common; run both with the same seeds.")
    if any(a[s].rows != b[s].rows for s in common):
        raise UserError("the two methods were not tested on the same rows; test both on one data set.")
    values = [[math.nan if (x := of[s].figures[metric]) is None else float(x) for s in common] for of in (a, b)]
    value = mean(x - y for x, y in zip(*values, strict=True))
    if math.isnan(value):
        return None
    gaps = torch.stack([a[s].draws[metric] - b[s].draws[metric] for s in common])
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randint(len(common), (BOOTSTRAP, len(common)), generator=generator)
    return value, gaps.T.gather(1, drawn).mean(dim=1)


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
                    "trained_on": table.trained_on, "task": table.task, "method": line.method, "metric": metric,
                    "seeds": len(found.values), "mean": found.mean, "sd": found.sd, "low": found.low,
                    "high": found.high, "at_chance": line.collapsed, "best": found.best if metric in METRICS else None,
                }  # fmt: skip
                for name in BASELINES:
                    gap = found.versus.get(name, Gap())
                    row |= {f"minus {name}": gap.value, f"minus {name}, low": gap.low, f"minus {name}, high": gap.high}
                rows.append(row)
    return rows
