"""A study's grids: the variants that differ in the values of some settings alone, and the default one. No torch.

Pictures of a study's grids: a heat map of two or three settings, points along one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from scalabl.inference.report.table import number
from scalabl.runs.recipe import Recipe, typed_setting
from scalabl.study import names
from scalabl.study.drawing import COLOURS, INK, METRICS_DRAWN, Picture, blank, scale, styled, title
from scalabl.study.study import Study, Variant
from scalabl.study.summary import Line, Table


@dataclass(frozen=True)
class Axis:
    """One setting of a grid.

    Attributes:
        setting: its name in a recipe.
        values: in the recipe's order.
        default: the place of the value that the family would have without its grid; None where it is not among them.
    """

    setting: str
    values: tuple[Any, ...]
    default: int | None


@dataclass(frozen=True)
class Grid:
    """The variants of one entry of `methods` with a grid.

    Attributes:
        family: the entry's name.
        axes: its settings.
        variants: place on each axis -> variant.
    """

    family: str
    axes: tuple[Axis, ...]
    variants: Mapping[tuple[int, ...], Variant]

    @property
    def default(self) -> Variant | None:
        """The variant with every setting at its default, if there is one."""
        place = [axis.default for axis in self.axes]
        return self.variants.get(tuple(p for p in place if p is not None)) if None not in place else None


def grids(study: Study) -> list[Grid]:
    """The grids of a study, in its order."""
    families: dict[str, list[Variant]] = {}
    for variant in study.variants:
        if variant.point:
            families.setdefault(variant.family, []).append(variant)
    return [_grid(family, variants) for family, variants in families.items()]


def _grid(family: str, variants: list[Variant]) -> Grid:
    without = variants[0].without_grid
    axes = []
    for name in variants[0].point:
        values = tuple(dict.fromkeys(typed_setting(name, variant.point[name]) for variant in variants))
        default = typed_setting(name, without[name]) if name in without else getattr(Recipe(), name)
        axes.append(Axis(name, values, values.index(default) if default in values else None))
    places = {
        tuple(axis.values.index(typed_setting(axis.setting, variant.point[axis.setting])) for axis in axes): variant
        for variant in variants
    }
    return Grid(family, tuple(axes), places)


_COLOURS = "cividis_r"  # dark is high; read alike by every kind of colour vision
HEAT = {"validation_nll": "validation NLL", "nll": "test NLL"}
_MARKERS = "osD^vP"


def grid_pictures(found: Sequence[Grid], table: Table, task: str) -> list[Picture]:
    """The pictures of every grid of one, two or three settings; grids of one and the same setting share a picture."""
    made = []
    for setting in dict.fromkeys(grid.axes[0].setting for grid in found if len(grid.axes) == 1):
        made.append(points([g for g in found if len(g.axes) == 1 and g.axes[0].setting == setting], table, task))
    made += [heat_map(grid, table, task) for grid in found if len(grid.axes) in (2, 3)]
    return [picture for picture in made if picture is not None]


def heat_map(grid: Grid, table: Table, task: str) -> Picture | None:
    """NLL on validation rows (above) and on test rows over two settings, a panel for each value of the third.

    Means over seeds, without a temperature. A full frame marks the lowest on validation rows, a dashed one the default.
    """
    lines = {line.variant.name: line for line in table.lines if not line.tempered}
    down, across, *third = grid.axes
    panels = third[0].values if third else (None,)
    if not any(variant.name in lines for variant in grid.variants.values()):
        return None
    size = (
        1.6 + 0.62 * len(across.values) * len(panels) + 0.5 * len(panels),
        1.4 + 2 * (0.5 + 0.38 * len(down.values)),
    )
    drawing, rows = blank(max(6.0, size[0]), size[1], len(HEAT), len(panels), sharey=True, sharex=True)
    best = _best(grid, table)
    with styled():
        for row, (column, words) in zip(rows, HEAT.items(), strict=True):
            known = [v for name in lines if (v := lines[name].figures[column].mean) is not None and _in(grid, name)]
            norm = Normalize(min(known), max(known))
            for i, (axes, value) in enumerate(zip(row, panels, strict=True)):
                at = {place[:2]: v for place, v in grid.variants.items() if not third or place[2] == i}
                _panel(axes, _means(at, lines, column, (len(down.values), len(across.values))), norm)
                _frames(axes, at, lines, best, grid.default)
                axes.set_xticks(range(len(across.values)), [names.value(v) for v in across.values])
                if third and row is rows[0]:
                    axes.set_title(f"{names.setting(third[0].setting)} {names.value(value)}", fontsize=10)
            row[0].set_yticks(range(len(down.values)), [names.value(v) for v in down.values])
            row[0].set_ylabel(f"{words}\n{names.setting(down.setting)}")
            plain = ScalarFormatter(useOffset=False)
            bar = drawing.colorbar(row[-1].images[0], ax=row, shrink=0.9, aspect=12, format=plain)
            bar.outline.set_visible(False)  # type: ignore[operator]
        for axes in rows[-1]:
            axes.set_xlabel(names.setting(across.setting))
    settings = ", ".join(names.setting(axis.setting) for axis in grid.axes)
    said = _said([grid], table)
    legend = " Full frame: lowest on validation rows; dashed: the default; †: at chance with at least one seed."
    return Picture(
        names.file_name("heat-map", grid.family, task), table, drawing,
        f"Heat map of NLL on {task} over {settings}", said + legend,
    )  # fmt: skip


def _means(
    at: dict[tuple[int, ...], Variant], lines: dict[str, Line], column: str, shape: tuple[int, int]
) -> NDArray[np.float64]:
    means = np.full(shape, np.nan)
    for place, variant in at.items():
        if variant.name in lines and (mean := lines[variant.name].figures[column].mean) is not None:
            means[place] = mean
    return means


def _panel(axes: Axes, means: NDArray[np.float64], norm: Normalize) -> None:
    axes.imshow(means, cmap=_COLOURS, norm=norm, aspect="auto")
    axes.spines[:].set_visible(False)
    for (i, j), mean in np.ndenumerate(means):
        dark = not np.isnan(mean) and norm(mean) > 0.55
        text = "–" if np.isnan(mean) else number(float(mean), "nll")
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)


def _frames(
    axes: Axes,
    at: dict[tuple[int, ...], Variant],
    lines: dict[str, Line],
    best: Variant | None,
    default: Variant | None,
) -> None:
    for (i, j), variant in at.items():
        if variant.name in lines and lines[variant.name].collapsed:
            axes.text(j + 0.42, i - 0.25, "†", ha="right", va="center", color=COLOURS[1])
        for marked, style, inset, gid in ((best, "solid", 0.03, "best"), (default, "dashed", 0.08, "default")):
            if variant == marked:
                corner, side = (j - 0.5 + inset, i - 0.5 + inset), 1 - 2 * inset
                axes.add_patch(
                    Rectangle(
                        corner, side, side, fill=False, edgecolor=COLOURS[1], linewidth=2, linestyle=style, gid=gid
                    )
                )


def points(found: Sequence[Grid], table: Table, task: str) -> Picture | None:
    """NLL, ECE and accuracy along one setting: means over seeds, joined by lines where it is a number, and the seeds.

    Filled: as it is. Open, dashed: with a temperature. Methods without a grid are level lines.
    """
    axis = found[0].axes[0]
    values = tuple(dict.fromkeys(value for grid in found for value in grid.axes[0].values))
    known = {(line.variant.name, line.tempered): line for line in table.lines}
    if not any((variant.name, False) in known for grid in found for variant in grid.variants.values()):
        return None
    level = [line for line in table.lines if not line.variant.point]
    labels = [names.value(value) for value in values]
    joined = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    long = max(map(len, labels)) > 8 and len(labels) > 2
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
                    place = len(found) + list(dict.fromkeys(other.variant.name for other in level)).index(
                        line.variant.name
                    )
                    label = names.method(line.variant, tempered=line.tempered)
                    style = {"color": COLOURS[place % len(COLOURS)], "linestyle": "--" if line.tempered else "-"}
                    axes.axhline(mean, linewidth=0.9, alpha=0.8, label=label, **style)  # type: ignore[arg-type]
                    seen.append(mean)
            scale(axes, metric, seen, upright=True)
            axes.set_title(title(metric), fontsize=10)
            axes.set_xticks(range(len(values)), labels, rotation=25 if long else 0, ha="right" if long else "center")
            axes.set_xlim(-0.4, len(values) - 0.6)
            axes.set_xlabel(names.setting(axis.setting) + (f" (default {_default(axis)})" if _default(axis) else ""))
            axes.grid(axis="y")
            axes.spines[["top", "right"]].set_visible(False)
        drawing.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    description = f"NLL, ECE and accuracy on {task} along {names.setting(axis.setting)}"
    said = _said(found, table) + " Dots: seeds. Open marks and dashed lines: with a temperature."
    return Picture(names.file_name("along", names.setting(axis.setting), task), table, drawing, description, said)


def _track(
    axes: Axes, metric: str, lines: Sequence[Line | None], index: int, tempered: bool, label: str, joined: bool
) -> list[float]:
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


def _default(axis: Axis) -> str:
    return "" if axis.default is None else names.value(axis.values[axis.default])


def _in(grid: Grid, name: str) -> bool:
    return any(variant.name == name for variant in grid.variants.values())


def _best(grid: Grid, table: Table) -> Variant | None:
    """The variant with the lowest validation NLL, raw, among those that are nowhere at chance."""
    some = [
        line for line in table.lines
        if not line.tempered and not line.collapsed and _in(grid, line.variant.name)
        and line.figures["validation_nll"].mean is not None
    ]  # fmt: skip
    return min(some, key=lambda line: line.figures["validation_nll"].mean or 0.0).variant if some else None


def _said(found: Sequence[Grid], table: Table) -> str:
    """How sensitive each family is: the lowest on validation rows, the default, the spread on test rows."""
    raw = {line.variant.name: line for line in table.lines if not line.tempered}
    sentences = []
    for grid in found:
        best = _best(grid, table)
        if best is None:
            continue

        def figure(variant: Variant) -> str:
            return (
                f"{number(raw[variant.name].figures['validation_nll'].mean or 0.0, 'nll')} there, "
                f"{number(raw[variant.name].figures['nll'].mean or 0.0, 'nll')} on test rows"
            )

        said = f"{names.method(best)} has the lowest NLL on validation rows ({figure(best)})"
        default = grid.default
        if default == best:
            said += ", and is the default"
        elif default is not None and default.name in raw:
            said += f"; the default, {names.method(default)}, has {figure(default)}"
        tested = [
            m for v in grid.variants.values() if v.name in raw and (m := raw[v.name].figures["nll"].mean) is not None
        ]
        if len(tested) > 3:
            low, _, high = quantiles(tested, n=4, method="inclusive")
            said += (
                f". Over its {len(tested)} settings test NLL goes from {number(min(tested), 'nll')} to "
                f"{number(max(tested), 'nll')}, for half of them from {number(low, 'nll')} to {number(high, 'nll')}"
            )
        sentences.append(said + ".")
    for line in table.lines:
        if line.variant.method == "mle" and not line.variant.point:
            name = names.method(line.variant, tempered=line.tempered)
            sentences.append(f"{name}: {number(line.figures['nll'].mean or 0.0, 'nll')} on test rows.")
    return " ".join(sentences)
