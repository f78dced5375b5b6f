"""The pictures on top of a report, in the page or as one file: is a confidence true, are rows out of scope told."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

from scalabl.core.pages import page_style
from scalabl.inference.report import figures
from scalabl.inference.report.results import MethodResult, Report
from scalabl.metrics.uncertainty import average

Heading: TypeAlias = str
SVG: TypeAlias = str
_SCORES = ("distance", "entropy")  # of scope, the first that there is


def lead_pictures(report: Report, rows: Sequence[dict[str, Any]]) -> list[tuple[Heading, SVG]]:
    """Reliability of the first method and of the one that leads beside it; in scope against the first shifted set.

    Args:
        report: with its methods.
        rows: what `table(report)` gave.
    """
    leads = range(len(report.methods))[report.lead]
    found = []
    for i in sorted({0, leads}):
        method = report.methods[i]
        svg = figures.reliability_diagram(f"lead-{i}", method.name, average(method.log_probs), method.labels)
        found.append((method.name, svg))
    return found + [_scope(report.methods[leads], name, of["scores"]) for name, of in [*rows[leads]["ood"].items()][:1]]


def _scope(method: MethodResult, other: str, scores: Mapping[str, Any]) -> tuple[Heading, SVG]:
    score = next(score for score in _SCORES if score in scores)
    sets = [("in distribution", method.scope_scores()[score]), (other, method.scope_scores(other)[score])]
    svg = figures.score_histograms("lead-scope", score, sets)
    return f"{other} (dashed): AUROC {scores[score]['auroc']['value']:.3f}", svg


_WIDTH, _GAP, _TITLE = 330, 24, 34  # of one picture in a file, in pixels


def as_file(pictures: Sequence[tuple[Heading, SVG]]) -> str:
    """Pictures side by side as one SVG file, in the page's own colours, light and dark."""
    light, dark = re.findall(r":root \{([^}]*)\}", page_style())
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
