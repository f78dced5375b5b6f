"""NLL against cost: one picture of all methods over all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scalabl.inference.report.table import number
from scalabl.study.look import COLOURS, MUTED, Picture, blank, styled
from scalabl.study.summary import BASELINES, Gap, Table

_MARKERS = "osD^vP"
_TICKS = (0.5, 1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Point:
    """A method's means over tasks.

    Attributes:
        name: of its variant.
        gap: NLL minus plain LoRA's in nats, both with a temperature, over the seeds that both have.
        costs: of its training and its prediction beside plain LoRA's.
        tasks: how many.
    """

    name: str
    gap: float
    costs: tuple[float, float]
    tasks: int


def points_of(tables: Sequence[Table], baseline: str) -> list[Point]:
    """Of every method whose NLL and costs are known beside plain LoRA's on at least one task in scope."""
    made = []
    for name in dict.fromkeys(line.variant.name for table in tables for line in table.lines):
        found: list[tuple[float, ...]] = []
        for table in tables:
            lines = {(line.variant.name, line.tempered): line.figures for line in table.lines}
            if table.shifted or not {(name, True), (name, False), (baseline, True)} <= lines.keys():
                continue
            # paired: a method may have fewer seeds than the baseline
            gap = 0.0 if name == baseline else lines[name, True]["nll"].versus.get(BASELINES[1], Gap()).value
            of = [gap, *(lines[name, False][cost].mean for cost in ("train_cost", "predict_cost"))]
            known = [value for value in of if value is not None]
            if len(known) == len(of):
                found.append(tuple(known))
        if found:
            gap, train, predict = (fmean(values) for values in zip(*found, strict=True))
            made.append(Point(name, gap, (train, predict), len(found)))
    return made


def frontier(tables: Sequence[Table], baseline: str) -> Picture | None:
    """A mark a method, against what its training and what its prediction cost; None without one beside plain LoRA."""
    points = points_of(tables, baseline)
    if len(points) < 2:
        return None
    drawing, (row,) = blank(10, 4.2, 1, 2, sharey=True)
    with styled():
        for place, (axes, cost) in enumerate(zip(row, ("training", "prediction"), strict=True)):
            for i, point in enumerate(points):
                axes.plot(
                    point.costs[place], point.gap, _MARKERS[i // len(COLOURS) % len(_MARKERS)], markersize=7,
                    color=COLOURS[i % len(COLOURS)], label=f"{point.name} ({point.tasks})",
                )  # fmt: skip
            axes.axhline(0, color=MUTED, linewidth=0.9, linestyle=":", zorder=1)
            axes.set_xscale("log")
            low, high = (side(point.costs[place] for point in points) for side in (min, max))
            shown = [tick for tick in _TICKS if low / 1.5 <= tick <= 1.5 * high]
            axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
            axes.minorticks_off()
            axes.set_xlabel(f"{cost} beside plain LoRA, ×")
            axes.grid()
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("NLL minus plain LoRA's, nats ↓")
        drawing.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    lowest = min(points, key=lambda point: point.gap)
    gap, (train, predict) = number(lowest.gap, "nll", signed=True), lowest.costs
    about = (
        f"NLL against cost, mean over tasks; the lowest is {lowest.name}'s, {gap} from plain LoRA's, at {train:.2f} "
        f"times its training and {predict:.1f} times its prediction"
    )
    words = "All with a temperature, mean over tasks (how many in brackets). Lower and further left is better."
    return Picture("cost", None, drawing, about, words)
