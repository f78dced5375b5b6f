"""A study's pictures: methods against each other for each test set, or, where the study has grids, the grids.

A grid of two or three settings is a heat map, grids of one and the same setting are points along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import ScalarFormatter

from scalabl.inference.report.table import number
from scalabl.runs.registry import BASELINE
from scalabl.study import look
from scalabl.study.grids import Grid, grids
from scalabl.study.look import COLOURS, INK, METRICS_DRAWN, MUTED, Picture, blank, scale, styled, title
from scalabl.study.study import Study
from scalabl.study.summary import Line, Table
from scalabl.study.variants import Variant

RAW, TEMPERED_NAME = "as it is", "with a temperature (+ T)"
HEAT = {"validation_nll": "validation NLL", "nll": "test NLL"}
_OFFSET = 0.17  # of the two lines of a method from its place
_HEAT_COLOURS = "cividis_r"  # dark is high; read alike by every kind of colour vision
_MARKERS = "osD^vP"


def pictures(study: Study, tables: Sequence[Table]) -> list[Picture]:
    """The pictures of a study, in the order of its tables."""
    found, made = grids(study), []
    short = look.of_tables(tables)
    for table in tables:
        if not found and (not table.shifted or table.task in study.shift.get(table.trained_on, ())):
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
            seen: list[float] = []
            for side, (marker, face, edge, label) in enumerate(marks):
                lines = raw if side == 0 else [tempered[line.variant.name] for line in raw]
                heights = [i + (2 * side - 1) * _OFFSET for i in range(len(lines))]
                seen += _dots(axes, metric, lines, heights, marker, face, edge, label)
                _reference(axes, metric, lines, edge)
            scale(axes, metric, seen, upright=False)
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
        f"{number(best.figures['nll'].mean or 0.0, 'nll')}, of {look.method(best.variant, tempered=best.tempered)}"
    )
    parts = (short[table.trained_on], "to", short[table.task]) if table.shifted else (short[table.task],)
    words = (
        "Dots: seeds. Marks: their mean. Lines: 95 % interval over seeds (Student's), which may run out of the picture."
        " Dotted: MLE, without and with a temperature."
    )
    if table.shifted:
        words = f"Tested on {short[table.task]}. {words}"
    return Picture(look.file_name("methods", *parts), table, drawing, description, words)


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
    mean = next((line.figures[metric].mean for line in lines if line.variant.method == BASELINE), None)
    if mean is not None:
        axes.axvline(mean, color=colour, linewidth=0.9, linestyle=":", zorder=1)


def _label(line: Line, tempered: dict[str, Line]) -> str:
    chance = line.collapsed or tempered[line.variant.name].collapsed
    return look.method(line.variant) + (" † at chance" if chance else "")


def grid_pictures(found: Sequence[Grid], table: Table, task: str) -> list[Picture]:
    """The pictures of every grid of one, two or three settings; grids of one and the same setting share a picture."""
    along: dict[str, list[Grid]] = {}
    for grid in found:
        if len(grid.axes) == 1:
            along.setdefault(grid.axes[0].setting, []).append(grid)
    made = [points(some, table, task) for some in along.values()]
    made += [heat_map(grid, table, task) for grid in found if len(grid.axes) in (2, 3)]
    return [picture for picture in made if picture is not None]


def heat_map(grid: Grid, table: Table, task: str) -> Picture | None:
    """NLL on validation rows (above) and on test rows over two settings, a panel for each value of the third.

    Means over seeds, without a temperature. A full frame marks the lowest on validation rows, a dashed one the default.
    """
    lines = {line.variant.name: line for line in _raw(grid, table)}
    if not lines:
        return None
    down, across, *third = grid.axes
    panels = third[0].values if third else (None,)
    width = 1.6 + (0.62 * len(across.values) + 0.5) * len(panels)
    height = 1.4 + 2 * (0.5 + 0.38 * len(down.values))
    drawing, rows = blank(max(6.0, width), height, len(HEAT), len(panels), sharey=True, sharex=True)
    best = _best(grid, table)
    with styled():
        for row, (column, words) in zip(rows, HEAT.items(), strict=True):
            means = np.full([len(axis.values) for axis in (down, across)] + [len(panels)], np.nan)
            for place, variant in grid.variants.items():
                if variant.name in lines and (mean := lines[variant.name].figures[column].mean) is not None:
                    means[*place[:2], place[2] if third else 0] = mean
            norm = Normalize(np.nanmin(means), np.nanmax(means))
            for i, (axes, value) in enumerate(zip(row, panels, strict=True)):
                axes.imshow(means[..., i], cmap=_HEAT_COLOURS, norm=norm, aspect="auto")
                axes.spines[:].set_visible(False)
                for place, mean in np.ndenumerate(means[..., i]):
                    _write_mean(axes, place, float(mean), norm)
                for place, variant in grid.variants.items():
                    if not third or place[2] == i:
                        collapsed = variant.name in lines and lines[variant.name].collapsed > 0
                        _mark(axes, place, collapsed, best=variant == best, default=variant == grid.default)
                axes.set_xticks(range(len(across.values)), [look.value(v) for v in across.values])
                if third and row is rows[0]:
                    axes.set_title(f"{look.setting(third[0].setting)} {look.value(value)}", fontsize=10)
            row[0].set_yticks(range(len(down.values)), [look.value(v) for v in down.values])
            row[0].set_ylabel(f"{words}\n{look.setting(down.setting)}")
            plain = ScalarFormatter(useOffset=False)
            bar = drawing.colorbar(row[-1].images[0], ax=row, shrink=0.9, aspect=12, format=plain)
            bar.outline.set_visible(False)  # type: ignore[operator]
        for axes in rows[-1]:
            axes.set_xlabel(look.setting(across.setting))
    settings = ", ".join(look.setting(axis.setting) for axis in grid.axes)
    legend = " Full frame: lowest on validation rows; dashed: the default; †: at chance with at least one seed."
    name, about = look.file_name("heat-map", grid.family, task), f"Heat map of NLL on {task} over {settings}"
    return Picture(name, table, drawing, about, _sensitivity([grid], table) + legend)


def _write_mean(axes: Axes, place: tuple[int, ...], mean: float, norm: Normalize) -> None:
    dark = not np.isnan(mean) and norm(mean) > 0.55
    text = "–" if np.isnan(mean) else number(mean, "nll")
    axes.text(place[1], place[0], text, ha="center", va="center", fontsize=8, color="white" if dark else INK)


def _mark(axes: Axes, place: tuple[int, ...], collapsed: bool, *, best: bool, default: bool) -> None:
    i, j = place[:2]
    if collapsed:
        axes.text(j + 0.42, i - 0.25, "†", ha="right", va="center", color=COLOURS[1])
    for marked, style, inset, gid in ((best, "solid", 0.03, "best"), (default, "dashed", 0.08, "default")):
        if marked:
            corner, side = (j - 0.5 + inset, i - 0.5 + inset), 1 - 2 * inset
            look = {"fill": False, "edgecolor": COLOURS[1], "linewidth": 2, "linestyle": style, "gid": gid}
            axes.add_patch(Rectangle(corner, side, side, **look))  # type: ignore[arg-type]


def points(found: Sequence[Grid], table: Table, task: str) -> Picture | None:
    """NLL, ECE and accuracy along one setting: means over seeds, joined by lines where it is a number, and the seeds.

    Filled: as it is. Open, dashed: with a temperature. Methods without a grid are level lines.
    """
    if not any(_raw(grid, table) for grid in found):
        return None
    axis = found[0].axes[0]
    values = tuple(dict.fromkeys(value for grid in found for value in grid.axes[0].values))
    known = {(line.variant.name, line.tempered): line for line in table.lines}
    level = [line for line in table.lines if not line.variant.point]
    families = list(dict.fromkeys(line.variant.name for line in level))
    labels = [look.value(value) for value in values]
    joined = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    long = max(map(len, labels)) > 8 and len(labels) > 2
    default = "" if axis.default is None else f" (default {look.value(axis.values[axis.default])})"
    drawing, (row,) = blank(10, 3.9 if long else 3.4, 1, len(METRICS_DRAWN))
    with styled():
        for axes, metric in zip(row, METRICS_DRAWN, strict=True):
            seen: list[float] = []
            for i, grid in enumerate(found):
                at = {grid.axes[0].values[place[0]]: variant.name for place, variant in grid.variants.items()}
                for tempered in (False, True):
                    lines = [known.get((at.get(value, ""), tempered)) for value in values]
                    seen += _track(axes, metric, lines, i, tempered, grid.family + (" + T" if tempered else ""), joined)
            for line in level:
                if (mean := line.figures[metric].mean) is not None:
                    colour = COLOURS[(len(found) + families.index(line.variant.name)) % len(COLOURS)]
                    label, style = look.method(line.variant, tempered=line.tempered), "--" if line.tempered else "-"
                    axes.axhline(mean, linewidth=0.9, alpha=0.8, label=label, color=colour, linestyle=style)
                    seen.append(mean)
            scale(axes, metric, seen, upright=True)
            axes.set_title(title(metric), fontsize=10)
            axes.set_xticks(range(len(values)), labels, rotation=25 if long else 0, ha="right" if long else "center")
            axes.set_xlim(-0.4, len(values) - 0.6)
            axes.set_xlabel(look.setting(axis.setting) + default)
            axes.grid(axis="y")
            axes.spines[["top", "right"]].set_visible(False)
        drawing.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    name = look.file_name("along", look.setting(axis.setting), task)
    about = f"NLL, ECE and accuracy on {task} along {look.setting(axis.setting)}"
    words = _sensitivity(found, table) + " Dots: seeds. Open marks and dashed lines: with a temperature."
    return Picture(name, table, drawing, about, words)


def _track(
    axes: Axes, metric: str, lines: Sequence[Line | None], index: int, tempered: bool, label: str, joined: bool
) -> list[float]:
    """One family along the setting; every value that has to be seen."""
    colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[index % len(_MARKERS)]
    shift = 0.05 * (2 * index + tempered - 0.5)
    means: list[float] = []
    seen: list[float] = []
    for place, line in enumerate(lines):
        figure = line.figures[metric] if line else None
        means.append(float("nan") if figure is None or figure.mean is None else figure.mean)
        if figure:
            seen += figure.values
            at = [place + shift] * len(figure.values)
            axes.plot(at, figure.values, ".", color=colour, alpha=0.5, markersize=5, zorder=3)
    axes.plot(
        [place + shift for place in range(len(lines))], means, marker=marker, color=colour, label=label, markersize=6,
        markerfacecolor="white" if tempered else colour, linewidth=1.2, zorder=4,
        linestyle=("--" if tempered else "-") if joined else "none",
    )  # fmt: skip
    return seen


def _raw(grid: Grid, table: Table) -> list[Line]:
    """The grid's lines without a temperature."""
    variants = list(grid.variants.values())
    return [line for line in table.lines if not line.tempered and line.variant in variants]


def _best(grid: Grid, table: Table) -> Variant | None:
    """The variant with the lowest validation NLL, raw, among those that are nowhere at chance."""
    some = [
        (mean, line.variant)
        for line in _raw(grid, table)
        if not line.collapsed and (mean := line.figures["validation_nll"].mean) is not None
    ]
    return min(some, key=lambda pair: pair[0])[1] if some else None


def _sensitivity(found: Sequence[Grid], table: Table) -> str:
    """How sensitive each family is: the lowest on validation rows, the default, the spread on test rows."""
    sentences = []
    for grid in found:
        raw = {line.variant.name: line for line in _raw(grid, table)}
        best, default = _best(grid, table), grid.default
        if best is None:
            continue

        def both(variant: Variant, raw: dict[str, Line] = raw) -> str:
            validation, test = (raw[variant.name].figures[name].mean or 0.0 for name in ("validation_nll", "nll"))
            return f"{number(validation, 'nll')} there, {number(test, 'nll')} on test rows"

        sentence = f"{look.method(best)} has the lowest NLL on validation rows ({both(best)})"
        if default == best:
            sentence += ", and is the default"
        elif default is not None and default.name in raw:
            sentence += f"; the default, {look.method(default)}, has {both(default)}"
        tested = [mean for line in raw.values() if (mean := line.figures["nll"].mean) is not None]
        if len(tested) > 3:
            quarter, _, three = quantiles(tested, n=4, method="inclusive")
            low, high, quarter_, three_ = (number(x, "nll") for x in (min(tested), max(tested), quarter, three))
            sentence += f". Over its {len(tested)} settings test NLL goes from {low} to {high}"
            sentence += f", for half of them from {quarter_} to {three_}"
        sentences.append(sentence + ".")
    for line in table.lines:
        if line.variant.method == BASELINE and not line.variant.point:
            name = look.method(line.variant, tempered=line.tempered)
            sentences.append(f"{name}: {number(line.figures['nll'].mean or 0.0, 'nll')} on test rows.")
    return " ".join(sentences)
