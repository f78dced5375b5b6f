"""A study's pictures: methods against each other for each test set, or, where the study has grids, the grids."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from scalabl.inference.report.table import number
from scalabl.study import names
from scalabl.study.drawing import COLOURS, METRICS_DRAWN, MUTED, Picture, blank, scale, styled, title
from scalabl.study.grid_pictures import grid_pictures, grids
from scalabl.study.study import Study
from scalabl.study.summary import Line, Table

RAW, TEMPERED_NAME = "as it is", "with a temperature (+ T)"
_OFFSET = 0.17  # of the two lines of a method from its place


def pictures(study: Study, tables: Sequence[Table]) -> list[Picture]:
    """The pictures of a study, in the order of its tables."""
    found, made = grids(study), []
    short = names.tasks(list(dict.fromkeys(name for table in tables for name in (table.trained_on, table.task))))
    for table in tables:
        if not found:
            made.append(comparison(table, short))
        elif not table.shifted:
            made += grid_pictures(found, table, short[table.task])
    return made


def comparison(table: Table, short: dict[str, str]) -> Picture:
    """A dot with its interval for every method, without and with a temperature: NLL, ECE and accuracy."""
    raw = [line for line in table.lines if not line.tempered]
    tempered = {line.variant.name: line for line in table.lines if line.tempered}
    drawing, (row,) = blank(10, 1.3 + 0.36 * len(raw), 1, len(METRICS_DRAWN), sharey=True)
    marks = (("o", COLOURS[0], COLOURS[0], RAW), ("D", "white", COLOURS[1], TEMPERED_NAME))
    with styled():
        for axes, metric in zip(row, METRICS_DRAWN, strict=True):
            everything: list[float] = []
            for side, (marker, face, edge, label) in enumerate(marks):
                lines = raw if side == 0 else [tempered[line.variant.name] for line in raw]
                heights = [i + (2 * side - 1) * _OFFSET for i in range(len(lines))]
                everything += _dots(axes, metric, lines, heights, marker, face, edge, label)
                _reference(axes, metric, lines, edge)
            scale(axes, metric, everything, upright=False)
            axes.set_title(title(metric), fontsize=10)
            axes.grid(axis="y")
            axes.spines[["top", "right", "left"]].set_visible(False)
        row[0].set_yticks(range(len(raw)), [_label(line, tempered) for line in raw])
        row[0].set_ylim(len(raw) - 0.5, -0.5)
        drawing.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    best = min(table.lines, key=lambda line: line.figures["nll"].mean or float("inf"))
    where = f"trained on {short[table.trained_on]}, tested on {short[table.task]}"
    description = (
        f"NLL, ECE and accuracy of every method, {where}; the lowest NLL is "
        f"{number(best.figures['nll'].mean or 0.0, 'nll')}, of {names.method(best.variant, tempered=best.tempered)}"
    )
    parts = (short[table.trained_on], "to", short[table.task]) if table.shifted else (short[table.task],)
    words = (
        "Dots: seeds. Marks: their mean. Lines: 95 % interval over seeds (Student's), which may run out of the picture."
        " Dotted: MLE, without and with a temperature."
    )
    if table.shifted:
        words = f"Tested on {short[table.task]}. {words}"
    return Picture(names.file_name("methods", *parts), table, drawing, description, words)


def _dots(
    axes: Axes, metric: str, lines: Sequence[Line], heights: list[float], marker: str, face: str, edge: str, label: str
) -> list[float]:
    """Means, intervals and seeds of lines at these heights; every value that has to be seen."""
    figures = [line.figures[metric] for line in lines]
    for figure, height in zip(figures, heights, strict=True):
        if figure.low is not None and figure.high is not None:
            axes.plot([figure.low, figure.high], [height] * 2, color=edge, linewidth=1.2)
        axes.plot(figure.values, [height] * len(figure.values), ".", color=MUTED, alpha=0.6, markersize=4, zorder=3)
    means = [float("nan") if figure.mean is None else figure.mean for figure in figures]
    axes.plot(
        means, heights, marker, color=edge, markerfacecolor=face, markersize=6, linestyle="none", label=label, zorder=4
    )
    return [value for figure in figures for value in figure.values]


def _reference(axes: Axes, metric: str, lines: Sequence[Line], colour: str) -> None:
    mean = next((line.figures[metric].mean for line in lines if line.variant.method == "mle"), None)
    if mean is not None:
        axes.axvline(mean, color=colour, linewidth=0.9, linestyle=":", zorder=1)


def _label(line: Line, tempered: dict[str, Line]) -> str:
    chance = line.collapsed or tempered[line.variant.name].collapsed
    return names.method(line.variant) + (" † at chance" if chance else "")
