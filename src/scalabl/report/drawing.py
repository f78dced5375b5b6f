"""How a picture is drawn: matplotlib axes in the page's own colours, as inline SVG.

Every colour is a stand-in here and becomes a CSS variable of the page in the SVG, so that one picture serves
light mode, dark mode and print. Text stays text. Nothing in the SVG points outside of it.
"""

import io
import re
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

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
