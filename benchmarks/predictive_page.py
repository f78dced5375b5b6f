"""The rows, the page and the picture of `predictive.py`, made of what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
from draws import LOOKS, errors
from harness import STYLE, markdown_facts, median_with_interval, svg, table
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor

from scalabl.metrics import evaluate, ood_auroc, paired_difference
from scalabl.metrics.uncertainty import average, decompose, mean_particles

COLUMNS = (
    "strategy", "classes", "batch", "cost", "memory", "nll", "ece", "ood_auroc",  # the first ones, in this order
    "ood_auroc_epistemic", "kl", "cost_low", "cost_high", "rounds", "modelled", "nll_low", "nll_high",
    "nll_minus_mc", "nll_minus_mc_low", "nll_minus_mc_high", "accuracy", "particles",
)  # fmt: skip

NOTE = """\
Cost: beside one plain forward of the whole model (every layer, from tokens, at the posterior mean, nothing stored).
Each strategy starts from tokens too. Median over rounds of the ratio within a round; the CSV has their range. Memory:
what a pass adds to the loaded model at its peak. Intervals: 95 %, bootstrap of the rows, paired for the difference.
OOD AUROC: test rows against shifted ones by the total entropy, and by its epistemic part. KL: from the long-run
average, which is itself noisy, mean over rows. Draws of like N share the cost of the antithetic ones, and the three
forms of mc the same particles."""


def judged(
    found: Mapping[str, Mapping[str, Tensor]], long: Tensor, labels: Tensor, baseline: str
) -> dict[str, dict[str, float | None]]:
    """Strategy -> its quality.

    Args:
        found: strategy -> log class probabilities (N, n, C) of the "test" and the "ood" rows.
        long: (N, m, C) of the long-run average, of the first m test rows.
        labels: (n,) answers of the test rows.
        baseline: the strategy whose NLL is subtracted.

    Returns:
        columns of COLUMNS; None where a figure is not defined, as the epistemic part of a single prediction.
    """
    exact = average(long)
    present = (long > -torch.inf).any(dim=0)
    base = average(found[baseline]["test"])
    quality: dict[str, dict[str, float | None]] = {}
    for name, parts in found.items():
        test, ood = parts["test"], parts["ood"]
        probs = average(test)
        metrics = evaluate(probs, labels)
        gap = paired_difference(probs, base, labels, "nll")
        inside, outside = decompose(test), decompose(ood)
        epistemic = None if test.shape[0] == 1 else ood_auroc(inside.epistemic, outside.epistemic).value
        quality[name] = {
            "nll": metrics["nll"].value,
            "nll_low": metrics["nll"].low,
            "nll_high": metrics["nll"].high,
            "ece": metrics["ece"].value,
            "accuracy": metrics["accuracy"].value,
            "ood_auroc": ood_auroc(inside.total, outside.total).value,
            "ood_auroc_epistemic": epistemic,
            "kl": errors(probs[: len(exact), : exact.shape[1]], exact, present)["kl"],
            "nll_minus_mc": gap.value,
            "nll_minus_mc_low": gap.low,
            "nll_minus_mc_high": gap.high,
            "particles": float(mean_particles(test)),
        }
    return quality


def summarize(
    classes: int,
    timed: Mapping[str, str],
    costs: Mapping[int, Mapping[str, Any]],
    quality: Mapping[str, Mapping[str, float | None]],
    modelled: Mapping[int, Mapping[str, float]],
    plain: str,
) -> list[dict[str, Any]]:
    """One row a strategy and batch size, with the columns of COLUMNS.

    Args:
        classes: of the rows.
        timed: strategy -> the one whose passes were timed.
        costs: batch size -> {"rounds": [{strategy: seconds}], "memory": {strategy: MiB}}.
        quality: as `judged` gives.
        modelled: batch size -> strategy -> what the cost model says.
        plain: what a round's seconds are divided by.
    """
    rows = []
    for name, own in timed.items():
        for batch, known in costs.items():
            ratios = [seconds[own] / seconds[plain] for seconds in known["rounds"] if own in seconds]
            cost = median_with_interval(ratios)
            few = len(ratios) < 10
            row = {
                "strategy": name,
                "classes": classes,
                "batch": batch,
                "cost": cost["median"],
                "cost_low": min(ratios) if few else cost["low"],
                "cost_high": max(ratios) if few else cost["high"],
                "rounds": len(ratios),
                "memory": known["memory"][own],
                "modelled": modelled[batch].get(name),
                **quality[name],
            }
            rows.append({column: row[column] for column in COLUMNS})
    return rows


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    parts = ["# Predictives: cost against quality", "![Cost against KL and NLL](predictive.svg)"]
    rows = content["rows"]
    for classes in sorted({row["classes"] for row in rows}, reverse=True):
        own = [row for row in rows if row["classes"] == classes]
        batches = sorted({row["batch"] for row in own})
        middle = 8 if 8 in batches else batches[0]
        costs = {(row["strategy"], row["batch"]): f"{row['cost']:.2f}" for row in own}
        shown = table(
            [row for row in own if row["batch"] == middle],
            ("strategy", "{strategy}"),
            *((f"cost, batch {b}", lambda row, b=b, costs=costs: costs[row["strategy"], b]) for b in batches),
            (f"MiB, batch {middle}", "{memory:.0f}"),
            ("NLL", lambda row: _number(row["nll"])),
            (f"NLL − mc, N = {content['samples']}", _interval),
            ("ECE %", lambda row: "–" if row["ece"] is None else f"{100 * row['ece']:.1f}"),
            ("OOD AUROC", lambda row: _number(row["ood_auroc"])),
            ("by epistemic", lambda row: _number(row["ood_auroc_epistemic"])),
            ("KL, nats", "{kl:.1e}"),
        )
        choice = content["choices"][str(classes)]
        chosen = "; ".join(f"batch {batch}: {choice[str(batch)]}" for batch in batches)
        modelled = "; ".join(
            f"{row['strategy']} at batch {row['batch']} {row['modelled']:.2f} (measured {row['cost']:.2f})"
            for row in own
            if row["modelled"] is not None
        )
        parts += [
            f"## {classes} classes: {choice['data']}",
            shown,
            f"`auto` at each batch size: {chosen}. Of the judged predictions: {choice['quality']}",
            f"What the cost model says: {modelled}.",
        ]
    return "\n\n".join([*parts, NOTE, markdown_facts(content["facts"])])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(row: Mapping[str, Any]) -> str:
    value, low, high = (row[f"nll_minus_mc{end}"] for end in ("", "_low", "_high"))
    return "–" if value is None or low is None else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


def picture(rows: Sequence[dict[str, Any]], batch: int) -> str:
    """Cost on a logarithmic axis against KL and NLL, a column of panels a number of classes, as SVG."""
    numbers = sorted({row["classes"] for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    looks = {name: (LOOKS[i % 4][0], "osD^vP*X"[i // 4]) for i, name in enumerate(names)}
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(3.6 * len(numbers) + 2.2, 5.4), layout="constrained", facecolor="white")
        panels = drawing.subplots(2, len(numbers), squeeze=False, sharex=True)
    for column, classes in enumerate(numbers):
        own = [row for row in rows if (row["classes"], row["batch"]) == (classes, batch)]
        for axes, (key, words) in zip(panels[:, column], (("kl", "KL, nats"), ("nll", "NLL, nats")), strict=True):
            for row in own:
                colour, marker = looks[row["strategy"]]
                axes.errorbar(
                    row["cost"], row[key], xerr=[[row["cost"] - row["cost_low"]], [row["cost_high"] - row["cost"]]],
                    color=colour, marker=marker, markersize=6, linewidth=0.8,
                    label=row["strategy"] if axes is panels[0, 0] else None,
                )  # fmt: skip
            axes.set_xscale("log")
            axes.set_xticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(True, which="major", color="#d3d7db", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylabel(words)
        panels[0, column].set_yscale("log")
        panels[0, column].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0, column].yaxis.set_minor_formatter(NullFormatter())
        panels[0, column].set_title(f"{classes} classes, batch {batch}", fontsize=9)
        panels[1, column].set_xlabel("cost, plain forwards")
    drawing.legend(loc="outside right center", frameon=False, fontsize=7)
    return svg(drawing, "predictive")
