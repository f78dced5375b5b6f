"""What a study's tables and pictures have in common: short names, and one look.

Names of methods, settings and their values, tasks; CSV files keep the long ones. Colours that colour-blind readers tell
apart, and SVG files.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePath
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator, PercentFormatter

from scalabl.inference.report.table import ARROWS, NAMES, PERCENT
from scalabl.runs.settings import typed_setting
from scalabl.study.summary import Table
from scalabl.study.variants import Variant

# in a method's name; "" where the value speaks for itself
_IN_A_NAME = {
    "variational_learning_rate": "lr of s",
    "learning_rate": "lr",
    "init_sigma": "initial sigma",
    "prior_mean": "prior mean",
    "prior_std": "prior std",
    "stochastic_modules": "stochastic:",
    "stochastic_layers": "stochastic:",
    "target_modules": "adapted:",
    "unit_rows": "unit rows:",
    "draws": "one draw a",
    "kl": "KL",
    "covariance": "",
    "schedule": "",
}
_ALONE = {
    "variational_learning_rate": "learning rate of s",
    "learning_rate": "learning rate of A and B",
    "init_sigma": "initial sigma",
    "draws": "one draw of s a",
    "kl": "direction of the KL",
}


def setting(name: str) -> str:
    """A setting's name as an axis is called."""
    return _ALONE.get(name, name.replace("_", " "))


def value(given: Any) -> str:
    """A setting's value: 0.05, yes, all, q, v."""
    if given is None:
        return "all"
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, float):
        return f"{given:g}"
    return ", ".join(part.strip().removesuffix("_proj") for part in str(given).split(","))


def method(variant: Variant, *, tempered: bool = False) -> str:
    """ "scalabl (prior std 0.5) + T"."""
    parts = [
        f"{_IN_A_NAME.get(name, name.replace('_', ' '))} {value(typed_setting(name, given))}"
        for name, given in variant.point.items()
    ]
    point = f" ({', '.join(part.strip() for part in parts)})" if parts else ""
    return variant.family + point + (" + T" if tempered else "")


def of_tables(tables: Sequence[Table]) -> dict[str, str]:
    """Each task's name; a path's last part, unless two have the same."""
    last = {name: PurePath(name).name for table in tables for name in (table.trained_on, table.task)}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}


def file_name(*parts: str) -> str:
    """A name for a file: letters, digits, dots and dashes."""
    return "-".join("".join(c if c.isalnum() or c in ".-" else "-" for c in part).strip("-") for part in parts)


# Okabe and Ito's colours, without the yellow, which is lost on white
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
INK, MUTED, RULE = "#1b1f24", "#59626d", "#d3d7db"
METRICS_DRAWN = ("nll", "ece", "accuracy")
CHOSEN = "✓"  # the setting that is taken, of those that were tried

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True, eq=False)
class Picture:
    """A drawing of one table of means, or of all of them.

    Attributes:
        name: of its file, without .svg.
        table: what it shows; None for all.
        drawing: matplotlib's figure.
        description: for those who do not see it.
        words: a sentence beneath it, or nothing.
    """

    name: str
    table: Table | None
    drawing: Drawing
    description: str
    words: str = ""


def styled(salt: str | None = None) -> AbstractContextManager[None]:
    """Context in which matplotlib draws as all pictures look; `salt` settles the ids of an SVG."""
    return matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt})  # type: ignore[arg-type]


def blank(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Drawing, list[list[Axes]]]:
    """A drawing of so many inches, with axes in rows and columns.

    Args:
        options: of matplotlib's `Figure.subplots`.
    """
    with styled():
        drawing = Drawing(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasSVG(drawing)
        made = drawing.subplots(rows, columns, squeeze=False, **options)
        drawing.get_layout_engine().set(wspace=0.04)  # type: ignore[union-attr,call-arg]
    for axes in made.flat:
        axes.tick_params(length=0)
    return drawing, [list(row) for row in made]


@lru_cache(maxsize=64)  # a second drawing of one figure would lay it out anew
def svg(picture: Picture) -> bytes:
    """The picture as an SVG file; the same bytes for the same figures."""
    out = io.BytesIO()
    with styled(picture.name):
        picture.drawing.savefig(out, format="svg", metadata={"Date": None, "Description": picture.description})
    return out.getvalue()


def title(metric: str) -> str:
    """ "NLL, nats ↓"."""
    unit = ", nats" if metric == "nll" else ", %" if metric in PERCENT else ""
    return f"{NAMES[metric]}{unit} {ARROWS[metric]}"


def scale(axes: Axes, metric: str, values: list[float], *, upright: bool) -> None:
    """Axis limits that show every value; intervals may run out. Shares are written in per cent."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    (axes.set_ylim if upright else axes.set_xlim)(low - room, high + room)
    axis = axes.yaxis if upright else axes.xaxis
    axis.set_major_locator(MaxNLocator(4))
    if metric in PERCENT:
        axis.set_major_formatter(PercentFormatter(1, symbol=""))
