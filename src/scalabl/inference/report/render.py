"""A report as one HTML file that needs nothing else: no network, no script, no font, no picture beside it."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from scalabl.core.errors import UserError
from scalabl.core.files import write_text
from scalabl.core.pages import page_style
from scalabl.inference.report import figures
from scalabl.inference.report import results as examples
from scalabl.inference.report import table as text
from scalabl.inference.report.figures import key
from scalabl.inference.report.lead import lead_pictures
from scalabl.inference.report.results import MethodResult, Report
from scalabl.inference.report.table import ood_names, table
from scalabl.inference.report.verdict import in_short, pure_guess
from scalabl.metrics.figures import METRICS
from scalabl.metrics.uncertainty import average

SHIFTED = ("accuracy", "nll", "ece")


@dataclass(frozen=True)
class ReportPicture:
    """A picture under its heading; the SVG is ours, so it is not escaped."""

    heading: str
    svg: Markup


def write(report: Report, path: Path, rows: list[dict[str, Any]] | None = None) -> None:
    """Write the report to `path`, whole or not at all (a file beside it is renamed over it), its baseline first.

    Args:
        rows: what `table(report)` gave, where it was computed already.

    Raises:
        UserError: as `table`, and when the file cannot be written.
    """
    path = Path(path)
    if report.baseline is not None:
        report, rows = report.with_baseline(), None
    html = render(report, table(report) if rows is None else rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, html)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {path} ({error.strerror or error}); choose another place or make room."
        ) from error


def render(report: Report, rows: list[dict[str, Any]]) -> str:
    """The page as text. `rows`: of `table(report)`."""
    report.check()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        metrics=list(METRICS), shifted_metrics=SHIFTED, heading=text.heading, arrows=text.ARROWS,
        number=text.number, span=text.span, verdict=verdict, key=key, first_rows=figures.FIRST_ROWS,
        num_bins=figures.NUM_BINS, share=text.share, worst_first=text.worst_first, in_words=text.in_words,
        set_names=text.SET_NAMES, plus_minus=text.plus_minus,
    )  # fmt: skip
    source = files("scalabl.inference.report").joinpath("template.html").read_text(encoding="utf-8")
    probs = [average(method.log_probs) for method in report.methods]
    return environment.from_string(source).render(
        style=Markup(page_style()),
        report=report,
        rows=rows,
        in_short=in_short(report, rows),
        guess=pure_guess(report.methods[0]),
        ood=ood_names(report),
        lead=[ReportPicture(heading, Markup(svg)) for heading, svg in lead_pictures(report, rows)],
        reliability=[
            ReportPicture(
                method.name,
                Markup(figures.reliability_diagram(f"reliability-{i}", method.name, probs[i], method.labels)),
            )
            for i, method in enumerate(report.methods)
        ],
        risk=Markup(
            figures.risk_coverage_curves(
                "risk",
                [(m.name, p, m.labels) for m, p in zip(report.methods, probs, strict=True)],
                [m.threshold for m in report.methods],
            )
        ),
        entropy=[picture for i, method in enumerate(report.methods) for picture in _entropy(i, method)],
        scope=_scope(report, rows),
        detection=text.DETECTION_NAMES,
        detection_arrows=text.DETECTION_ARROWS,
        opened=max((i for i, row in enumerate(rows) if not row["collapsed"]), default=len(rows) - 1),
        training=[Markup(svg) for svg in figures.training_curves("training", report.training)],
        examples=[
            (method.name, *examples.notable(method, report.questions))
            for method in (report.methods if report.questions else [])
        ],
    )


def verdict(row: dict[str, Any], metric: str) -> str:
    """'better', 'worse' or 'not told apart' from the first method, by the interval of the difference.

    What a method at chance does better ("at chance") is no merit.
    """
    difference = row["versus_first"][metric]
    if difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return "not told apart"
    if (difference["value"] > 0) != METRICS[metric]:
        return "worse"
    return "at chance" if row["collapsed"] else "better"


def _scope(report: Report, rows: list[dict[str, Any]]) -> list[ReportPicture]:
    """For each shifted set the score, of any method, that tells it best from the rows in distribution."""
    pictures = []
    for number, name in enumerate(ood_names(report)):
        areas = [
            (figures["auroc"]["value"], -i, score)
            for i, row in enumerate(rows)
            if name in row["ood"]
            for score, figures in row["ood"][name]["scores"].items()
        ]
        area, i, score = max(areas)
        method = report.methods[-i]
        sets = [("in distribution", method.scope_scores()[score]), (name, method.scope_scores(name)[score])]
        svg = figures.score_histograms(f"scope-{number}", score, sets)
        pictures.append(ReportPicture(f"{name}: {score} of {method.name}, AUROC {area:.3f}", Markup(svg)))
    return pictures


def _entropy(index: int, method: MethodResult) -> list[ReportPicture]:
    parts = [("in distribution", method.uncertainty())]
    parts += [(name, method.uncertainty(name)) for name in method.ood]
    pictures = []
    for part, label in (("total", "total entropy"), ("epistemic", "epistemic part")):
        if part == "epistemic" and method.log_probs.shape[0] == 1:
            continue
        sets = [(name, getattr(values, part)) for name, values in parts]
        svg = figures.entropy_histograms(f"entropy-{index}-{part}", method.name, label, sets)
        pictures.append(ReportPicture(f"{method.name}: {label}", Markup(svg)))
    return pictures
