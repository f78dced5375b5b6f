"""How a picture is drawn: matplotlib axes in the page's own colours, as inline SVG.

Every colour is a stand-in here and becomes a CSS variable of the page in the SVG, so that one picture serves
light mode, dark mode and print. Text stays text. Nothing in the SVG points outside of it.

The pictures of a report, each as the text of one inline <svg>.
"""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from scalabl.metrics.scores import reliability, risk_coverage
from scalabl.metrics.selective import Threshold
from scalabl.tuner.diagnostics import logged

SERIES = ["#0000a1", "#0000a2", "#0000a3", "#0000a4", "#0000a5", "#0000a6"]
INK, MUTED, GRID = "#0000b1", "#0000b2", "#0000b3"
_VARIABLES = {colour: f"var(--series-{i + 1})" for i, colour in enumerate(SERIES)}
_VARIABLES |= {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}

# Beside its colour every line has its own dashes: nobody has to tell colours apart. (matplotlib's, SVG's)
DASHES: list[tuple[object, str]] = [
    ("solid", ""),
    ((0, (6, 2)), "6 2"),
    ((0, (1.5, 1.5)), "1.5 1.5"),
    ((0, (7, 2, 1.5, 2)), "7 2 1.5 2"),
    ((0, (3, 3)), "3 3"),
    ((0, (9, 2, 1.5, 2, 1.5, 2)), "9 2 1.5 2 1.5 2"),
]

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}


class Drawing:
    """A figure of so many inches; use `axes`, then `svg`."""

    def __init__(self, width: float, height: float, ratios: tuple[float, ...] = (1,), *, share_x: bool = False) -> None:
        with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]
            self._figure = Figure(figsize=(width, height), layout="constrained")
            FigureCanvasSVG(self._figure)
            grid = self._figure.subplots(
                len(ratios), 1, squeeze=False, sharex=share_x, gridspec_kw={"height_ratios": ratios}
            )
        self.axes: list[Axes] = list(grid[:, 0])
        for axes in self.axes:
            axes.tick_params(length=0)

    def svg(self, name: str, description: str) -> str:
        """The picture as an <svg> element; `name` keeps its ids its own, screen readers say `description`."""
        out = io.StringIO()
        with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):  # type: ignore[arg-type]
            self._figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        svg = out.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
        svg = re.sub(r'\bid="([\w.]+)"', rf'id="{name}-\1"', svg)
        svg = re.sub(r'(href="#|url\(#)([\w.]+)', rf"\g<1>{name}-\2", svg)
        svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own font
        for colour, variable in _VARIABLES.items():
            svg = svg.replace(colour, variable)
        box = re.search(r'viewBox="[^"]*"', svg)
        assert box is not None
        return f'<svg {box[0]} role="img" aria-label="{escape(description)}">{svg[svg.index(">") + 1 :]}'


def series(index: int) -> str:
    """The colour of the index-th line."""
    return SERIES[index % len(SERIES)]


def dashes(index: int) -> object:
    """matplotlib's linestyle of the index-th line: other dashes when the colours start again."""
    return DASHES[(index + index // len(SERIES)) % len(DASHES)][0]


def key(index: int) -> dict[str, str]:
    """The CSS colour and SVG dashes of the index-th line, for the legend in the page."""
    return {
        "colour": _VARIABLES[series(index)],
        "dashes": DASHES[(index + index // len(SERIES)) % len(DASHES)][1],
    }


NUM_BINS = 15
FIRST_ROWS = 20  # a risk among fewer rows moves by 5 points a row and more: the curve starts here
_MAX_POINTS = 400

TRAINING = {
    "nll": "negative log-likelihood (nats)",
    "kl": "KL(q ‖ p) (nats)",
    "sigma_mean": "mean standard deviation of s",
    "s_mean": "mean of s",
}


def reliability_diagram(name: str, method: str, probs: Tensor, labels: Tensor) -> str:
    """Accuracy against confidence in 15 bins, with Wilson intervals, above a histogram of confidence."""
    drawing = Drawing(3.4, 3.9, (3, 1), share_x=True)
    above, below = drawing.axes
    bins = [b for b in reliability(probs, labels, NUM_BINS) if b.count]
    confidence = np.array([b.confidence for b in bins])
    accuracy = np.array([b.accuracy for b in bins])
    ends = np.array([(b.accuracy_low, b.accuracy_high) for b in bins])
    error = np.stack([accuracy - ends[:, 0], ends[:, 1] - accuracy]).clip(min=0)
    above.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
    above.vlines(confidence, confidence, accuracy, color=series(1), linewidth=4, alpha=0.35)
    above.errorbar(
        confidence,
        accuracy,
        error,
        color=series(0),
        fmt="o-",
        markersize=3.5,
        linewidth=1.3,
        elinewidth=0.8,
    )
    above.set(ylim=(-0.02, 1.02), ylabel="accuracy", yticks=[0, 0.25, 0.5, 0.75, 1])
    shares = np.array([b.count for b in bins]) / len(labels)
    below.bar([b.low for b in bins], shares, 1 / NUM_BINS, align="edge", color=series(0), alpha=0.55)
    mean_confidence = probs.max(dim=1).values.mean().item()
    mean_accuracy = (probs.argmax(dim=1) == labels.cpu()).double().mean().item()
    below.axvline(mean_confidence, color=INK, linewidth=1.1, linestyle=(0, (3, 2)))
    below.axvline(mean_accuracy, color=INK, linewidth=1.1)
    below.set(xlim=(-0.02, 1.02), xlabel="confidence", ylabel="share", xticks=[0, 0.25, 0.5, 0.75, 1])
    for axis in (above.yaxis, below.xaxis, below.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    below.yaxis.set_major_locator(MaxNLocator(2))
    return drawing.svg(
        name,
        f"Reliability of {method}: mean confidence {mean_confidence:.0%}, accuracy {mean_accuracy:.0%}.",
    )


def risk_coverage_curves(
    name: str, methods: list[tuple[str, Tensor, Tensor]], thresholds: Sequence[Threshold | None] = ()
) -> str:
    """The share of errors among the surest rows, a line for each (name, probs (n, C), labels (n,)).

    `thresholds`: of the highest probability, one a method or None. Each is marked where it meets its line: a disc at
    the share of these rows that it answers, and a dotted level at the error rate that was promised.
    """
    drawing = Drawing(5.2, 3.3)
    axes = drawing.axes[0]
    ends, marks = [], []
    for i, (method, probs, labels) in enumerate(methods):
        coverage, risk = risk_coverage(probs, labels)
        start = min(FIRST_ROWS, len(coverage)) - 1
        chosen = np.unique(np.linspace(start, len(coverage) - 1, _MAX_POINTS).round().astype(int))
        marker = "o" if len(chosen) == 1 else None
        axes.plot(coverage[chosen], risk[chosen], color=series(i), linestyle=dashes(i), linewidth=1.7, marker=marker)
        ends.append(f"{method} {risk[-1].item():.0%}")
        threshold = thresholds[i] if i < len(thresholds) else None
        if threshold is not None:
            marks.append(_mark(axes, i, method, probs, risk, threshold))
    axes.set(xlim=(0, 1.01), xlabel="coverage: share of rows answered, the surest first", ylabel="share of errors")
    axes.set_ylim(bottom=0)
    _percent(axes)
    description = f"Risk-coverage curves; errors when every row is answered: {', '.join(ends)}."
    return drawing.svg(name, " ".join([description, *marks]))


def _mark(axes: Axes, index: int, method: str, probs: Tensor, risk: Tensor, threshold: Threshold) -> str:
    """Mark a threshold on its method's curve; what it says in words. risk (n,) of the k surest rows."""
    axes.axhline(threshold.max_error, color=series(index), linewidth=0.9, linestyle=(0, (1, 2)))
    answered = int((probs.max(dim=1).values > threshold.above).sum())
    start = f"{method} at its threshold: {answered / len(probs):.0%} answered, "
    if answered == 0:
        return f"{start}at most {threshold.max_error:.1%} promised."
    wrong = risk[answered - 1].item()
    axes.plot([answered / len(probs)], [wrong], color=series(index), marker="o", markersize=6, gid=f"threshold_{index}")
    return f"{start}{wrong:.1%} of them wrong, at most {threshold.max_error:.1%} promised."


def entropy_histograms(name: str, method: str, label: str, sets: list[tuple[str, Tensor]]) -> str:
    """An uncertainty (rows,) in nats in distribution (first, filled) and on each shifted set (a line)."""
    top = max(1e-9, max(values.max().item() for _, values in sets))
    means = ", ".join(f"{set_name} {values.mean().item():.3g}" for set_name, values in sets)
    description = f"{label} of {method}; means in nats: {means}."
    return _histograms(name, f"{label} (nats)", [values for _, values in sets], 0, top, description)


def score_histograms(name: str, label: str, sets: list[tuple[str, Tensor]]) -> str:
    """A score of scope (rows,), higher is further out, in distribution (first, filled) and on shifted sets (lines).

    The highest hundredth of all rows stands in the last bar.
    """
    low = min(values.min().item() for _, values in sets)
    high = max(low + 1e-9, max(values.double().quantile(0.99).item() for _, values in sets))
    medians = ", ".join(f"{set_name} {values.median().item():.3g}" for set_name, values in sets)
    values = [values.clamp(max=high) for _, values in sets]
    return _histograms(name, label, values, low, high, f"{label}; medians: {medians}.")


def _histograms(name: str, label: str, sets: list[Tensor], low: float, high: float, description: str) -> str:
    drawing = Drawing(3.4, 2.4)
    axes = drawing.axes[0]
    edges = np.linspace(low, high, 26).tolist()
    for i, values in enumerate(sets):
        weights = np.full(len(values), 1 / len(values))
        if i == 0:
            axes.hist(values, edges, weights=weights, histtype="stepfilled", color=series(0), alpha=0.35)
        axes.hist(
            values,
            edges,
            weights=weights,
            histtype="step",
            color=series(i),
            linestyle=dashes(i),
            linewidth=1.5,
        )
    axes.set(xlim=(low, high), xlabel=label, ylabel="share of rows")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return drawing.svg(name, description)


def training_curves(name: str, training: dict[str, list[dict[str, float]]]) -> list[str]:
    """One picture for each quantity that was logged (TRAINING names them), a line for each run."""
    pictures = []
    for quantity in TRAINING:
        curves = [_logged(records, quantity) for records in training.values()]
        if not any(steps for steps, _ in curves):
            continue
        drawing = Drawing(3.4, 2.4)
        axes = drawing.axes[0]
        for i, (steps, values) in enumerate(curves):
            if not steps:
                continue
            smooth = _running_mean(np.array(values))
            if len(values) > 30:
                axes.plot(steps, values, color=series(i), linewidth=0.7, alpha=0.3)
            axes.plot(
                steps,
                smooth,
                color=series(i),
                linestyle=dashes(i),
                linewidth=1.6,
                marker="o" if len(steps) == 1 else None,
            )
        axes.set(xlabel="step", ylabel=TRAINING[quantity])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        pictures.append(drawing.svg(f"{name}-{quantity}", f"{TRAINING[quantity]} over the training steps."))
    return pictures


def _logged(records: list[dict[str, float]], quantity: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of the records that hold the quantity, thinned to what a picture shows.

    Where a run logged no NLL, its loss is the NLL: a KL never enters the loss.
    """
    if quantity == "nll" and all(logged(entry, "nll") is None for entry in records):
        quantity = "loss"
    found = [(entry["step"], logged(entry, quantity)) for entry in records if "step" in entry]
    kept = [(step, value) for step, value in found if value is not None and math.isfinite(value)]
    kept = kept[:: max(1, math.ceil(len(kept) / _MAX_POINTS))]
    return [step for step, _ in kept], [value for _, value in kept]


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The centred mean over a fifteenth of the run, shorter at its ends; short runs are left as they are."""
    half = len(values) // 30
    total = np.concatenate([[0.0], values.cumsum()])
    place = np.arange(len(values))
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    mean: NDArray[np.float64] = (total[high] - total[low]) / (high - low)
    return mean


def _percent(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
