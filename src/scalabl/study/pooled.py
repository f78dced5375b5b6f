"""Every method against plain LoRA with a temperature, each with its own: task by task, and pooled over tasks.

A difference is paired over rows and seeds; its p is of the bootstrap over both, two-sided. Pooled is the mean over
tasks, whose rows are drawn each for itself. Holm's correction (1979) is over the tasks of a method, and for the pooled
ones over the methods. Typing errors are two sets a task, which count as one by their mean. Tasks of another model than
the study's are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalabl.inference.report.table import number
from scalabl.metrics.bootstrap import Metric, interval
from scalabl.metrics.figures import METRICS
from scalabl.study.page import PageCell, PageTable, heading_of, span
from scalabl.study.plan import StudyPlan
from scalabl.study.study import Study
from scalabl.study.summary import CONFIDENCE, BySeed, outcomes_by_method, paired_draws
from scalabl.study.tested import TYPOS, sets_of
from scalabl.study.variants import TEMPERED

POOLED = ("nll", "brier", "aurc", "accuracy")
IN_SCOPE, MISTYPED = "in scope", "typos"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Difference:
    """A method's metric minus the baseline's.

    Attributes:
        method, metric, where: what; `IN_SCOPE` or `MISTYPED`.
        task: or "" for the mean over tasks.
        gap: with its 95 % interval.
        p: of no difference, and corrected by Holm.
        tasks: how many there are.
        seeds: the most that a task has.
    """

    method: str
    metric: str
    where: str
    task: str
    gap: Metric
    p: float
    corrected: float
    tasks: int
    seeds: int

    @property
    def better(self) -> bool:
        assert self.gap.value is not None
        return (self.gap.value > 0) == METRICS[self.metric] and self.gap.value != 0

    @property
    def told_apart(self) -> bool:
        return self.corrected < SIGNIFICANT


def differences(study: Study, plan: StudyPlan, output: Path, baseline: str) -> list[Difference]:
    """Of every tempered method, metric and kind of set on each task, and over all tasks.

    Args:
        study, plan, output: what was run.
        baseline: the variant's name.
    """
    found: list[Difference] = []
    for where in (IN_SCOPE, MISTYPED):
        by_task = {
            task: [
                outcomes_by_method(study, plan, output, task, name)
                for name, what in sets_of(study, task).items()
                if (name == task if where == IN_SCOPE else TYPOS in what)
            ]
            for task in study.tasks
            if study.task(task).model in (None, study.model)
        }
        for metric in POOLED:
            pooled: list[Difference] = []
            for variant in study.variants:
                if variant.name != baseline:
                    own, over = _of_method(variant.name, baseline, metric, where, by_task)
                    found += own
                    pooled += over
            found += _corrected(pooled)
    return found


def _of_method(
    method: str, baseline: str, metric: str, where: str, by_task: Mapping[str, Sequence[Mapping[str, BySeed]]]
) -> tuple[list[Difference], list[Difference]]:
    """The differences on each task, and their mean, if there are any."""
    made, every, seeds = [], [], []
    for place, (task, sets) in enumerate(by_task.items()):
        pairs = [(of.get(method + TEMPERED, {}), of.get(baseline + TEMPERED, {})) for of in sets]
        pairs = [pair for pair in pairs if set(pair[0]) & set(pair[1])]
        drawn = [paired_draws(a, b, metric, seed=place) for a, b in pairs]
        known = [pair for pair in drawn if pair is not None]
        if not known:
            continue
        values, draws = zip(*known, strict=True)
        value, draw = sum(values) / len(values), torch.stack(draws).mean(dim=0)
        seeds.append(max(len(set(a) & set(b)) for a, b in pairs))
        every.append((value, draw))
        made.append(_difference(method, metric, where, task, value, draw, 1, seeds[-1]))
    if not every:
        return [], []
    value, draw = sum(v for v, _ in every) / len(every), torch.stack([d for _, d in every]).mean(dim=0)
    return _corrected(made), [_difference(method, metric, where, "", value, draw, len(every), max(seeds))]


def _difference(
    method: str, metric: str, where: str, task: str, value: float, draws: Tensor, tasks: int, seeds: int
) -> Difference:
    p = two_sided(draws)
    return Difference(method, metric, where, task, interval(value, draws, CONFIDENCE), p, p, tasks, seeds)


def two_sided(draws: Tensor) -> float:
    """p of no difference, from resampled differences (k,): never below 2 / (k + 1)."""
    sides = [int((draws <= 0).sum()), int((draws >= 0).sum())]
    return min(1.0, 2 * (min(sides) + 1) / (len(draws) + 1))


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in their order (Holm 1979)."""
    corrected, largest = [0.0] * len(values), 0.0
    for place, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = largest
    return corrected


def _corrected(some: Sequence[Difference]) -> list[Difference]:
    return [replace(d, corrected=p) for d, p in zip(some, holm([d.p for d in some]), strict=True)]


def pooled_rows(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """The rows of pooled.csv."""
    return [
        {
            "method": d.method, "metric": d.metric, "where": d.where, "task": d.task or "all", "tasks": d.tasks,
            "seeds": d.seeds, "difference": d.gap.value, "low": d.gap.low, "high": d.gap.high, "p": d.p,
            "p_holm": d.corrected, "told_apart": d.told_apart,
        }
        for d in found
    ]  # fmt: skip


def pooled_tables(found: Sequence[Difference]) -> list[PageTable]:
    """Over all tasks, in scope and mistyped; and the NLL in scope task by task, folded."""
    tables = []
    for where in (IN_SCOPE, MISTYPED):
        some = [d for d in found if d.where == where]
        rows = []
        for method in dict.fromkeys(d.method for d in some):
            own = {d.metric: d for d in some if d.method == method and not d.task}
            alone = [d for d in some if d.method == method and d.task and d.metric == "nll"]
            better = [d for d in alone if d.better]
            counts = f"{len(better)} of {len(alone)}, {sum(d.told_apart for d in better)}"
            worse = sum(d.told_apart for d in alone if not d.better)
            cells = [_cell(own[metric]) if metric in own else PageCell("–") for metric in POOLED]
            rows.append((f"{method} + T", [*cells, PageCell(counts), PageCell(str(worse))]))
        if rows:
            heads = ("method", *map(heading_of, POOLED), "NLL lower in tasks, told apart", "NLL higher, told apart")
            tables.append(PageTable(f"Minus plain LoRA + T, mean over tasks, {where}", heads, rows))
    alone = [d for d in found if d.where == IN_SCOPE and d.task and d.metric == "nll"]
    tasks = list(dict.fromkeys(d.task for d in alone))
    rows = []
    for method in dict.fromkeys(d.method for d in alone):
        on = {d.task: d for d in alone if d.method == method}
        rows.append((f"{method} + T", [_cell(on[task]) if task in on else PageCell("–") for task in tasks]))
    if rows:
        tables.append(PageTable("NLL minus plain LoRA's + T, task by task", ("method", *tasks), rows, folded=True))
    return tables


def _cell(d: Difference) -> PageCell:
    if d.gap.value is None:
        return PageCell("–")
    mark = ("△" if d.better else "▽") if d.told_apart else ""
    text = f"{number(d.gap.value, d.metric, signed=True)} ({span(d.gap.low, d.gap.high, d.metric, signed=True)})"
    return PageCell(text, marks=mark)
