"""Figures of several methods over several seeds: means, spreads, paired differences, and which is best.

The rows of a table are the dicts of `inference.report.table`. A seed changes initialisation, order of rows and draws,
while training and test rows stay the same: two methods are compared seed by seed. Intervals are Student's.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import t as student

from scalabl.metrics import METRICS

TEST = "test"
HIGHER = METRICS | {"auroc_total": True, "auroc_epistemic": True}  # metric -> whether higher is better
Table = Sequence[dict[str, Any]]  # of one seed
Figures = dict[str, dict[str, list[float | None]]]  # method -> metric -> a value a seed


def summarize(tables: Mapping[int, Table]) -> dict[str, dict[str, dict[str, Any]]]:
    """Data set ("test" or a shifted one) -> method -> its figures over seeds.

    A method's figures: "collapsed" (the seeds at which it is at chance), "best" (metrics), and for every metric
    {values, mean, sd, low, high, difference}: sd and interval of the mean are None with one seed, `difference` is
    {mean, low, high} of this method minus the first, None in the first.

    Raises:
        ValueError: the seeds' tables have other methods.
    """
    names = {seed: [row["method"] for row in table] for seed, table in tables.items()}
    if len({tuple(of_seed) for of_seed in names.values()}) != 1:
        raise ValueError(f"the seeds have other methods: {names}")
    shifted = list(dict.fromkeys(name for table in tables.values() for row in table for name in row["ood"]))
    return {data: _of_data(tables, data) for data in (TEST, *shifted)}


def _of_data(tables: Mapping[int, Table], data: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, list[float | None]] = {}
    for position, row in enumerate(next(iter(tables.values()))):
        by_seed = {seed: _figures(table[position], data) for seed, table in tables.items()}
        collapsed = [seed for seed, figures in by_seed.items() if figures.get("collapsed")]
        metrics = [metric for metric in HIGHER if all(metric in figures for figures in by_seed.values())]
        values = {metric: [figures[metric]["value"] for figures in by_seed.values()] for metric in metrics}
        first = first or values
        found[row["method"]] = {"collapsed": collapsed, "best": []} | {
            metric: {
                "values": own,
                **mean_with_interval(own),
                "difference": None if first is values else mean_with_interval(_minus(own, first[metric])),
            }
            for metric, own in values.items()
        }
    _mark_best(found)
    return found


def _figures(row: dict[str, Any], data: str) -> dict[str, Any]:
    figures: dict[str, Any] = row if data == TEST else row["ood"].get(data, {})
    return figures


def _minus(values: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    pairs = zip(values, others, strict=True)
    return [None if value is None or other is None else value - other for value, other in pairs]


def mean_with_interval(values: Sequence[float | None], confidence: float = 0.95) -> dict[str, float | None]:
    """{mean, sd, low, high} over seeds; all None where a seed has no value, the last three with a single seed."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return dict.fromkeys(("mean", "sd", "low", "high"))
    mean = statistics.fmean(known)
    if len(known) == 1:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = statistics.stdev(known)
    half = float(student.ppf((1 + confidence) / 2, len(known) - 1)) * sd / len(known) ** 0.5
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def _mark_best(methods: dict[str, dict[str, Any]]) -> None:
    """Enter in "best" the metrics in which a method is best, or not told apart from the best.

    Only where the paired interval tells at least one method apart from the best: where it does not, there is no best.
    A method at chance with any seed stands aside.
    """
    for metric, higher in HIGHER.items():
        standing = {
            name: figures[metric]
            for name, figures in methods.items()
            if not figures["collapsed"] and metric in figures and figures[metric]["sd"] is not None
        }
        if len(standing) < 2:
            continue
        best = max(standing, key=lambda name: (1 if higher else -1) * standing[name]["mean"])
        tied = [
            name
            for name, figure in standing.items()
            if not told_apart(mean_with_interval(_minus(figure["values"], standing[best]["values"])))
        ]
        if len(tied) < len(standing):
            for name in tied:
                methods[name]["best"].append(metric)


def told_apart(difference: Mapping[str, float | None]) -> bool:
    """Whether the interval of a difference leaves out zero."""
    low, high = difference["low"], difference["high"]
    return low is not None and high is not None and not low <= 0 <= high
