"""What the active learning cells say: a line a cell, means over seeds against random picks, and the learning curves."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from _common import markdown_facts, markdown_table, write_text
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from over_seeds import mean_with_interval, told_apart

NAME = "active_learning"
TITLES = {"bald": "BALD", "entropy": "total entropy", "random": "random"}
COLUMNS = ("seed", "by", "round", "labelled", "accuracy", "nll", "ece")
STYLE = {"bald": ("#0072b2", "solid"), "entropy": ("#d55e00", "dashed"), "random": ("#555555", "dotted")}
HEADINGS = {"accuracy": "accuracy", "nll": "NLL (nats)"}

Curves = dict[str, dict[int, dict[int, dict[str, float]]]]  # strategy -> rows labelled -> seed -> metric -> value


def write(cells: Sequence[dict[str, Any]], known: dict[str, str], output: Path) -> None:
    """Write active_learning.csv, .md and .svg of the cells that are done."""
    output.mkdir(parents=True, exist_ok=True)
    found = curves(cells)
    write_text(output / f"{NAME}.csv", as_csv(cells))
    write_text(output / f"{NAME}.svg", picture(found))
    write_text(output / f"{NAME}.md", markdown(found, known))


def as_csv(cells: Sequence[dict[str, Any]]) -> str:
    """One line a cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for cell in cells:
        writer.writerow([len(cell[column]) if column == "labelled" else cell[column] for column in COLUMNS])
    return text.getvalue()


def curves(cells: Sequence[dict[str, Any]]) -> Curves:
    """The cells by strategy; the start of a seed belongs to every strategy."""
    strategies = [name for name in TITLES if any(cell["by"] == name for cell in cells)]
    found: Curves = {by: {} for by in strategies}
    for by in strategies:
        for cell in cells:
            if cell["by"] in (by, "start"):
                figures = {metric: cell[metric] for metric in ("accuracy", "nll", "ece")}
                found[by].setdefault(len(cell["labelled"]), {})[cell["seed"]] = figures
    return found


def markdown(found: Curves, known: dict[str, str]) -> str:
    """The results as a page."""
    parts = ["# Active learning: which rows to label", f"![learning curves]({NAME}.svg)"]
    header = ["picked by", "rows labelled", "ACC % ↑", "NLL ↓", "ACC − random", "NLL − random"]
    rows = []
    for by, curve in found.items():
        for labelled in sorted(curve):
            differences = [_difference(found, by, labelled, metric) for metric in HEADINGS]
            if labelled == min(curve):
                differences = [None, None]
            cells = [_mean(curve[labelled], "accuracy", 100, 1), _mean(curve[labelled], "nll", 1, 3)]
            cells += [_shown(differences[0], 100, 1), _shown(differences[1], 1, 3)]
            rows.append([TITLES[by], str(labelled), *cells])
    parts += [
        markdown_table(header, rows),
        "Mean ± standard deviation over seeds. Differences from random picks are paired by seed, with their 95 % "
        "interval (Student's); * where it leaves out zero. All strategies of a seed start from the same rows. Seeds "
        "share the pool and the test rows.",
        verdict(found),
        markdown_facts(known),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(found: Curves) -> str:
    """Whether each strategy beat random picks, at the most rows that both have labelled, in a sentence each."""
    sentences = []
    for by in found:
        if by == "random" or "random" not in found:
            continue
        both = set(found[by]) & set(found["random"]) - {min(found["random"])}
        if not both:
            continue
        difference = _difference(found, by, max(both), "nll")
        if difference is None:
            continue
        mean = difference["mean"]
        assert mean is not None
        lower = f"NLL {abs(mean):.3f} nats {'lower' if mean < 0 else 'higher'} than that of random picks"
        apart = told_apart(difference)
        said = (
            "beat random" if apart and mean < 0 else "was worse than random" if apart else "is not shown to beat random"
        )
        sentences.append(f"With {max(both)} rows {TITLES[by]} {said}: {lower}, interval {_shown(difference, 1, 3)}.")
    return " ".join(sentences)


def _difference(found: Curves, by: str, labelled: int, metric: str) -> dict[str, float | None] | None:
    """This strategy minus random, over the seeds that have both; None where there is nothing to compare."""
    if by == "random" or labelled not in found.get("random", {}):
        return None
    own, other = found[by][labelled], found["random"][labelled]
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    return mean_with_interval([own[seed][metric] - other[seed][metric] for seed in seeds])


def _shown(difference: dict[str, float | None] | None, scale: float, digits: int) -> str:
    if difference is None or difference["mean"] is None:
        return "–"
    mean = f"{scale * difference['mean']:+.{digits}f}"
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return mean
    ends = f"({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"
    return f"{mean} {ends}{'*' if told_apart(difference) else ''}".replace("-", "−")


def _mean(of_seeds: dict[int, dict[str, float]], metric: str, scale: float, digits: int) -> str:
    values = [scale * figures[metric] for figures in of_seeds.values()]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def picture(found: Curves) -> str:
    """Accuracy and NLL against the rows labelled: means over seeds as lines, seeds as dots."""
    with matplotlib.rc_context({"svg.hashsalt": NAME, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2)
        for axes, (metric, heading) in zip(panels, HEADINGS.items(), strict=True):
            for by, curve in found.items():
                colour, dashes = STYLE[by]
                labelled = sorted(curve)
                means = [statistics.fmean(f[metric] for f in curve[n].values()) for n in labelled]
                axes.plot(labelled, means, color=colour, linestyle=dashes, linewidth=1.7, label=TITLES[by])
                dots = [(n, figures[metric]) for n in labelled for figures in curve[n].values()]
                axes.scatter(*zip(*dots, strict=True), color=colour, s=9, alpha=0.6)
            axes.set(xlabel="rows labelled", ylabel=heading)
            axes.spines[["top", "right"]].set_visible(False)
        if found:
            panels[0].legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
