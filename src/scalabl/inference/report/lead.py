"""The pictures on top of a report, in the page or as one file: is a confidence true, are rows out of scope told."""

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import TypeAlias

from scalabl.inference.report import figures
from scalabl.inference.report.results import MethodResult, Report
from scalabl.metrics.detection import judge_detection
from scalabl.metrics.uncertainty import average

Heading: TypeAlias = str
SVG: TypeAlias = str
_SCORES = ("distance", "entropy")  # of scope, the first that there is


def lead_pictures(report: Report) -> list[tuple[Heading, SVG]]:
    """Reliability of the first method and of the one that leads beside it; in scope against the first shifted set."""
    found = []
    for i in report.led():
        method = report.methods[i]
        svg = figures.reliability_diagram(f"lead-{i}", method.name, average(method.log_probs), method.labels)
        found.append((method.name, svg))
    method = report.methods[report.led()[-1]]
    return found + [_scope(method, name) for name in list(method.ood)[:1]]


def _scope(method: MethodResult, other: str) -> tuple[Heading, SVG]:
    inside, outside = method.scope_scores(), method.scope_scores(other)
    score = next(score for score in _SCORES if score in inside and score in outside)
    area = judge_detection(inside[score], outside[score], bootstrap=1)["auroc"].value
    svg = figures.score_histograms("lead-scope", score, [("in distribution", inside[score]), (other, outside[score])])
    return f"{other} (dashed): AUROC {area:.3f}", svg


_WIDTH, _GAP, _TITLE = 330, 24, 34  # of one picture in a file, in pixels


def as_file(pictures: Sequence[tuple[Heading, SVG]]) -> str:
    """Pictures side by side as one SVG file, in the page's own colours, light and dark."""
    page = files("scalabl.inference.report").joinpath("template.html").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{([^}]*)\}", page)[:2]
    parts, tallest = [], 0.0
    for i, (heading, svg) in enumerate(pictures):
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        assert box is not None
        height = _WIDTH * float(box[2]) / float(box[1])
        tallest, left = max(tallest, height), i * (_WIDTH + _GAP)
        parts.append(f'<text x="{left + 8}" y="20">{escape(heading)}</text>')
        place = f'x="{left}" y="{_TITLE}" width="{_WIDTH}" height="{height:.1f}"'
        parts.append(svg.replace("<svg ", f"<svg {place} ", 1))
    width, height = len(pictures) * (_WIDTH + _GAP) - _GAP, tallest + _TITLE
    style = (
        f":root{{{light}}} @media (prefers-color-scheme: dark){{:root{{{dark}}}}} "
        "text{font-family:sans-serif;fill:var(--ink)} svg>text{font-size:13px}"
    )
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return (
        f'<svg {names} viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" role="img">'
        f"<style>{style}</style>{''.join(parts)}</svg>\n"
    )
