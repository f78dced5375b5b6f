"""The page of a study: its tables of means as grids of text in sections, written as Markdown, LaTeX and HTML.

One table a task that was trained on, with what it cost; one a metric for the shifted sets. Intervals and paired
differences stand behind, folded.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from scalabl.core.console import visible
from scalabl.core.pages import page_style
from scalabl.inference.report.table import ARROWS, MINUS, heading, number
from scalabl.metrics.figures import METRICS
from scalabl.runs.registry import METHODS
from scalabl.study import look
from scalabl.study.look import Picture, svg
from scalabl.study.summary import BASELINES, Figure, Gap, Line, Table

SHOWN = ("accuracy", "nll", "ece", "brier", "auroc")
COSTS = ("temperature", "extra_parameters", "train_cost", "predict_cost", "peak_memory")
SHIFTED = ("nll", "ece", "accuracy", "ood_auroc", "ood_auroc_total")
DETAILED = ("nll", "ece", "accuracy")
_HEADINGS = {
    "ood_auroc": "OOD AUROC, epistemic ↑",
    "ood_auroc_total": "OOD AUROC, total ↑",
    "temperature": "T",
    "extra_parameters": "+ numbers",
    "train_cost": "train ×",
    "predict_cost": "predict ×",
    "peak_memory": "MiB",
}
_MARKS = dict(zip(((name, way) for name in BASELINES for way in ("better", "worse")), "▲▼△▽", strict=True))
CHANCE = "†"
_MANY = 30  # rows that are folded away beneath a picture

NOTES = (
    "±: standard deviation over seeds. Intervals over seeds are Student's, 95 %.",
    "Bold: best, or not told apart from it. ▲ better, ▼ worse than MLE; △ better, ▽ worse than MLE with a temperature: "
    "the 95 % interval of the paired bootstrap over rows and seeds leaves out zero. With few seeds it is narrower than "
    "it should be. MLE is the one with the same settings, where there are several.",
    "+ T: with a temperature (T) on the class logits, fitted on the same validation rows for every method.",
    "† at chance: with at least one seed its accuracy is not reliably above random guessing or the commonest answer; "
    "its other figures say nothing, and it is never best.",
    "+ numbers: kept beyond a plain LoRA's. train ×, predict ×: ratios to MLE's wall time of the same task on the same "
    "machine (steps, fits and passes alone, without loading and without the frozen layers, which are computed once for "
    "all); single measurements, so differences of a tenth mean nothing. MiB: the highest peak of the process or the "
    "accelerator in any of its cells.",
    "OOD AUROC: how well the epistemic part of the uncertainty, or all of it, tells the shifted rows from the trained "
    "task's test rows; 0.5 is blind, – has no such part.",
)


@dataclass(frozen=True)
class PageCell:
    """A figure as text with how it is set."""

    text: str
    spread: str = ""
    bold: bool = False
    marks: str = ""


@dataclass(frozen=True)
class PageTable:
    """One table to be written down.

    Attributes:
        caption: above it.
        columns: headings; the first is the method's.
        rows: the method's name and the cells.
        warning: a sentence below it, or nothing.
        folded: whether it is shown on demand.
    """

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[PageCell]]]
    warning: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """Pictures and the tables that they show."""

    title: str
    pictures: list[Picture]
    grids: list[PageTable]


@dataclass(frozen=True)
class Document:
    """Everything that the page shows.

    Attributes:
        title: its heading.
        about: the question.
        facts: model, data, seeds, versions, device, command.
        sections: pictures and tables.
        answer: Markdown written by hand, or nothing.
    """

    title: str
    about: str
    facts: dict[str, str]
    sections: list[Section]
    answer: str = ""


def layout(
    title: str,
    about: str,
    facts: dict[str, str],
    tables: Sequence[Table],
    pictures: Sequence[Picture] = (),
    *,
    answer: str = "",
    first: Sequence[Section] = (),
    last: Sequence[Section] = (),
) -> Document:
    """Tables of means and pictures as the sections of a page, between other sections; the tables are folded where an
    answer says what they come to."""
    short, folded = look.of_tables(tables), bool(answer)
    sections, behind = [], []
    for table in (table for table in tables if not table.shifted):
        title_ = f"{short[table.task]} ({table.n:,} test rows)"
        sections.append(Section(title_, [p for p in pictures if p.table is table], _quality(table, folded)))
        shifted = [other for other in tables if other.shifted and other.trained_on == table.task]
        if shifted:
            grids = [_shift(metric, table, shifted, short, folded) for metric in SHIFTED]
            drawn = [picture for other in shifted for picture in pictures if picture.table is other]
            behind.append(Section(f"Shift: trained on {short[table.task]}", drawn, grids))
    return Document(title, about, facts, [*first, *sections, *behind, *last], answer)


def _quality(table: Table, folded: bool) -> list[PageTable]:
    """Every method's figures and costs, and behind them the intervals of some metrics."""
    columns = (*SHOWN, *COSTS)
    rows = [(_name(line, table), [_cell(line.figures[c], c, line.tempered) for c in columns]) for line in table.lines]
    chance = [f"{look.method(line.variant, tempered=line.tempered)} ({line.collapsed} of {line.seeds} seeds)"
              for line in table.lines if line.collapsed]  # fmt: skip
    warning = f"{CHANCE} at chance: {', '.join(chance)}." if chance else ""
    heads = ("method", *map(heading_of, columns))
    main = PageTable("Quality and cost", heads, rows, warning, folded or len(rows) > _MANY)
    return [main, *(_intervals(metric, table) for metric in DETAILED)]


def _intervals(metric: str, table: Table) -> PageTable:
    """Intervals over seeds and paired differences of one metric."""
    rows = []
    for line in table.lines:
        figure = line.figures[metric]
        own = PageCell(span(figure.low, figure.high, metric))
        gaps = [_gap_cell(figure.versus.get(name, Gap()), metric, name) for name in BASELINES]
        rows.append((_name(line, table), [_cell(figure, metric, line.tempered), own, *gaps]))
    columns = ("method", heading_of(metric), "95 % interval", f"{MINUS} MLE", f"{MINUS} MLE + T")
    return PageTable(f"{heading_of(metric)}: intervals over seeds and paired differences", columns, rows, folded=True)


def _gap_cell(gap: Gap, metric: str, baseline: str) -> PageCell:
    ends = span(gap.low, gap.high, metric, signed=True)
    if gap.value is None or ends == "–":
        return PageCell("–")
    text = f"{number(gap.value, metric, signed=True)} ({ends})"
    return PageCell(text, marks=_MARKS.get((baseline, gap.verdict), ""))


def _shift(metric: str, known: Table, shifted: Sequence[Table], short: dict[str, str], folded: bool) -> PageTable:
    """One metric on the trained task's own test rows and on every shifted set."""
    shown = [known, *shifted] if metric in METRICS else shifted
    rows = []
    for line in known.lines:
        same = [other for table in shown for other in table.lines if other.method == line.method]
        cells = [_cell(other.figures[metric], metric, other.tempered, other.collapsed) for other in same]
        if any(cell.text != "–" for cell in cells):
            rows.append((_name(line, known), cells))
    heads = (short[table.task] + (" (trained)" if table is known else f" ({table.n:,})") for table in shown)
    return PageTable(heading_of(metric), ("method", *heads), rows, folded=folded)


def _name(line: Line, table: Table) -> str:
    name = look.method(line.variant, tempered=line.tempered) + (f" {CHANCE}" if line.collapsed else "")
    most = max(other.seeds for other in table.lines)
    if METHODS[line.variant.method].members or line.seeds == most:
        return name
    return f"{name} ({line.seeds} of {most} seeds)"


def heading_of(column: str) -> str:
    """A column's heading, with an arrow to where it is better."""
    return f"{heading(column)} {ARROWS[column]}" if column in METRICS else _HEADINGS[column]


def _cell(figure: Figure, column: str, tempered: bool, collapsed: int = 0) -> PageCell:
    # a temperature costs nothing that could be measured: its figures are those of the row without it
    if figure.mean is None or (tempered and column in ("train_cost", "predict_cost", "peak_memory")):
        return PageCell("–" if figure.mean is None else "")
    marks = "".join(_MARKS.get((name, gap.verdict), "") for name, gap in figure.versus.items())
    spread = "" if figure.sd is None or column in COSTS else _text(figure.sd, column)
    return PageCell(_text(figure.mean, column), spread, figure.best, marks + (CHANCE if collapsed else ""))


def _text(value: float, column: str) -> str:
    if column in ("extra_parameters", "peak_memory"):
        return f"{value:,.0f}".replace("-", MINUS)
    if column in ("temperature", "train_cost", "predict_cost"):
        return f"{value:.2f}"
    return number(value, column)


def span(low: float | None, high: float | None, metric: str, *, signed: bool = False) -> str:
    """The two ends of an interval."""
    if low is None or high is None:
        return "–"
    return f"{number(low, metric, signed=signed)} to {number(high, metric, signed=signed)}"


def markdown(document: Document) -> str:
    """GitHub's Markdown; the pictures lie beside it. Only the answer is Markdown by itself."""
    lines = [f"# {_plain(document.title)}", ""]
    lines += [part for text in (_plain(document.about), document.answer.strip()) if text for part in (text, "")]
    for section in document.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for picture in section.pictures:
            lines += [f"![{_plain(picture.description)}]({quote(picture.name)}.svg)", ""]
            lines += [_plain(picture.words), ""] if picture.words else []
        for grid in section.grids:
            lines += _markdown_table(grid)
    lines += ["## How to read it", "", *(f"- {note}" for note in NOTES), "", "## How it was made", ""]
    return "\n".join([*lines, *(f"- {_plain(name)}: {_plain(text)}" for name, text in document.facts.items()), ""])


def _plain(text: str) -> str:
    """Text of a recipe, a task or a run in Markdown: no link, picture, code, HTML, cell or line of its own."""
    return re.sub(r"[\\`\[\]<|]", r"\\\g<0>", visible(" ".join(text.split())))


def _markdown_table(grid: PageTable) -> list[str]:
    # between HTML's tags nothing of Markdown is read
    opening = [f"<details><summary>{escape(grid.caption)}</summary>" if grid.folded else f"**{_plain(grid.caption)}**"]
    table = [f"| {' | '.join(map(_plain, grid.columns))} |", f"|---|{'---:|' * (len(grid.columns) - 1)}"]
    table += [f"| {_plain(name)} | {' | '.join(map(_markdown_cell, cells))} |" for name, cells in grid.rows]
    closing = [*([_plain(grid.warning), ""] if grid.warning else []), *(["</details>", ""] if grid.folded else [])]
    return [*opening, "", *table, "", *closing]


def _markdown_cell(cell: PageCell) -> str:
    figure = f"**{cell.text}**" if cell.bold else cell.text
    return " ".join(part for part in (figure, f"±{cell.spread}" if cell.spread else "", cell.marks) if part)


_LATEX_MARKS = {
    "▲": r"\blacktriangle", "▼": r"\blacktriangledown", "△": r"\vartriangle", "▽": r"\triangledown", "†": r"\dagger",
    look.CHOSEN: r"\checkmark",
}  # fmt: skip


def latex(document: Document) -> str:
    """Tables for a paper that loads booktabs and amssymb."""
    lines = ["% " + " ".join(document.title.split()), r"% \usepackage{booktabs,amssymb}"]
    lines += [f"% {' '.join(f'{name}: {text}'.split())}" for name, text in document.facts.items()]
    for section in document.sections:
        for grid in section.grids:
            lines += [
                r"\begin{table}", r"\centering\small", rf"\caption{{{_escaped(f'{section.title}: {grid.caption}')}}}",
                rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}", r"\toprule",
                " & ".join(map(_escaped, grid.columns)) + r" \\", r"\midrule",
            ]  # fmt: skip
            lines += [" & ".join([_escaped(name), *map(_latex_cell, cells)]) + r" \\" for name, cells in grid.rows]
            lines += [r"\bottomrule", r"\end{tabular}"]
            lines += [rf"\par {_escaped(grid.warning)}"] if grid.warning else []
            lines += [r"\end{table}"]
    return "\n".join([*lines, *(f"% {note}" for note in NOTES), ""])


def _latex_cell(cell: PageCell) -> str:
    figure = rf"\textbf{{{_escaped(cell.text)}}}" if cell.bold else _escaped(cell.text)
    spread = rf" {{\scriptsize$\pm${_escaped(cell.spread)}}}" if cell.spread else ""
    marks = f"$^{{{''.join(_LATEX_MARKS[mark] for mark in cell.marks)}}}$" if cell.marks else ""
    return figure + spread + marks


def _escaped(text: str) -> str:
    special = {c: "\\" + c for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MINUS: "$-$", "–": "--",
        "↑": r"$\uparrow$", "↓": r"$\downarrow$", "×": r"$\times$", "±": r"$\pm$", "†": r"$\dagger$",
    }  # fmt: skip
    return "".join(special.get(character, character) for character in text)


def html(document: Document) -> str:
    """One page that needs nothing beside it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data"] = lambda picture: f"data:image/svg+xml;base64,{base64.b64encode(svg(picture)).decode()}"
    source = files("scalabl.study").joinpath("results.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(document=document, notes=NOTES, style=Markup(page_style()))
