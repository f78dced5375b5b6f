"""The tables of means as grids of text, in the sections of a page: what a rendering shows, before it is written down.

One table a task that was trained on, with what it cost; one a metric for the shifted sets. Intervals and paired
differences stand behind, folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scalabl.inference.report.table import ARROWS, MINUS, heading, number
from scalabl.metrics.figures import METRICS
from scalabl.study import names
from scalabl.study.drawing import Picture
from scalabl.study.summary import RIVALS, Figure, Line, Table

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
_MARKS = {(RIVALS[0], "better"): "▲", (RIVALS[0], "worse"): "▼", (RIVALS[1], "better"): "△", (RIVALS[1], "worse"): "▽"}
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
    "+ numbers: kept beyond a plain LoRA's. train ×, predict ×: ratios to MLE's wall time of the same task and seed "
    "(steps, fits and passes alone, without loading and without the frozen layers, which are computed once for all); "
    "single measurements, so differences of a tenth mean nothing. MiB: the highest peak of the process or the "
    "accelerator in any of its cells.",
    "OOD AUROC: how well the epistemic part of the uncertainty, or all of it, tells the shifted rows from the trained "
    "task's test rows; 0.5 is blind, – has no such part.",
)


@dataclass(frozen=True)
class TableCell:
    """A figure as text with how it is set."""

    text: str
    spread: str = ""
    bold: bool = False
    marks: str = ""


@dataclass(frozen=True)
class TableGrid:
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
    rows: list[tuple[str, list[TableCell]]]
    warning: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """Pictures and the tables that they show."""

    title: str
    pictures: list[Picture]
    grids: list[TableGrid]


@dataclass(frozen=True)
class Document:
    """Everything that a rendering shows.

    Attributes:
        title: its heading.
        about: the question.
        answer: Markdown written by hand, or nothing.
        facts: model, data, seeds, versions, device, command.
        sections: pictures and tables.
    """

    title: str
    about: str
    facts: dict[str, str]
    sections: list[Section]
    answer: str = field(default="", kw_only=True)


def layout(
    title: str,
    about: str,
    facts: dict[str, str],
    tables: Sequence[Table],
    pictures: Sequence[Picture] = (),
    *,
    answer: str = "",
) -> Document:
    """Tables of means and pictures as the sections of a page."""
    short = names.tasks(list(dict.fromkeys(name for table in tables for name in (table.trained_on, table.task))))
    inside = [table for table in tables if not table.shifted]
    sections = [
        Section(f"{short[table.task]} ({table.n:,} test rows)", _of(pictures, [table]), _inside(table))
        for table in inside
    ]
    for table in inside:
        shifted = [other for other in tables if other.shifted and other.trained_on == table.task]
        if shifted:
            grids = [_shift(metric, [table, *shifted], short) for metric in SHIFTED]
            sections.append(Section(f"Shift: trained on {short[table.task]}", _of(pictures, shifted), grids))
    return Document(title, about, facts, sections, answer=answer)


def _of(pictures: Sequence[Picture], tables: Sequence[Table]) -> list[Picture]:
    return [picture for table in tables for picture in pictures if picture.table is table]


def _inside(table: Table) -> list[TableGrid]:
    columns = (*SHOWN, *COSTS)
    rows = [
        (_name(line, table), [_cell(line.figures[column], column, line.tempered) for column in columns])
        for line in table.lines
    ]
    chance = [f"{names.method(line.variant, tempered=line.tempered)} ({line.collapsed} of {line.seeds} seeds)"
              for line in table.lines if line.collapsed]  # fmt: skip
    warning = f"{CHANCE} at chance: {', '.join(chance)}." if chance else ""
    heads = ("method", *map(_heading, columns))
    main = TableGrid("Quality and cost", heads, rows, warning, folded=len(rows) > _MANY)
    return [main, *(_detail(metric, table) for metric in DETAILED)]


def _detail(metric: str, table: Table) -> TableGrid:
    """Intervals over seeds and paired differences of one metric."""
    columns = ("method", _heading(metric), "95 % interval", f"{MINUS} MLE", f"{MINUS} MLE + T")
    rows = []
    for line in table.lines:
        figure = line.figures[metric]
        cells = [_cell(figure, metric, line.tempered), TableCell("–")]
        if figure.low is not None and figure.high is not None:
            cells[1] = TableCell(_span(figure.low, figure.high, metric))
        for rival in RIVALS:
            gap = figure.versus.get(rival)
            if gap is None or gap.value is None or gap.low is None or gap.high is None:
                cells.append(TableCell("–"))
                continue
            text = f"{number(gap.value, metric, signed=True)} ({_span(gap.low, gap.high, metric, signed=True)})"
            cells.append(TableCell(text, marks=_MARKS.get((rival, gap.verdict), "")))
        rows.append((_name(line, table), cells))
    return TableGrid(f"{_heading(metric)}: intervals over seeds and paired differences", columns, rows, folded=True)


def _shift(metric: str, tables: Sequence[Table], short: dict[str, str]) -> TableGrid:
    """One metric on the trained task's own test rows and on every shifted set."""
    known, *shifted = tables
    shown = tables if metric in METRICS else shifted
    rows = []
    for line in known.lines:
        cells = []
        for table in shown:
            same = [other for other in table.lines if other.method == line.method]
            cells += [_cell(other.figures[metric], metric, other.tempered, other.collapsed) for other in same]
        if any(cell.text != "–" for cell in cells):
            rows.append((_name(line, known), cells))
    heads = (short[table.task] + (" (trained)" if table is known else f" ({table.n:,})") for table in shown)
    return TableGrid(_heading(metric), ("method", *heads), rows, folded=False)


def _name(line: Line, table: Table) -> str:
    name = names.method(line.variant, tempered=line.tempered) + (f" {CHANCE}" if line.collapsed else "")
    most = max(other.seeds for other in table.lines)
    if line.variant.method == "ensemble" or line.seeds == most:
        return name
    return f"{name} ({line.seeds} of {most} seeds)"


def _heading(column: str) -> str:
    return f"{heading(column)} {ARROWS[column]}" if column in METRICS else _HEADINGS[column]


def _cell(figure: Figure, column: str, tempered: bool, collapsed: int = 0) -> TableCell:
    # a temperature costs nothing that could be measured: its figures are those of the row without it
    if figure.mean is None or (tempered and column in ("train_cost", "predict_cost", "peak_memory")):
        return TableCell("–" if figure.mean is None else "")
    marks = "".join(_MARKS.get((rival, gap.verdict), "") for rival, gap in figure.versus.items())
    spread = "" if figure.sd is None or column in COSTS else _text(figure.sd, column)
    return TableCell(_text(figure.mean, column), spread, figure.best, marks + (CHANCE if collapsed else ""))


def _text(value: float, column: str) -> str:
    if column in ("extra_parameters", "peak_memory"):
        return f"{value:,.0f}".replace("-", MINUS)
    if column in ("temperature", "train_cost", "predict_cost"):
        return f"{value:.2f}"
    return number(value, column)


def _span(low: float, high: float, metric: str, *, signed: bool = False) -> str:
    return f"{number(low, metric, signed=signed)} to {number(high, metric, signed=signed)}"
