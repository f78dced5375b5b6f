"""The tables of means as Markdown, LaTeX and HTML: one layout, three ways of writing it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from scalabl.benchmark.summary import Figure, Line, Table
from scalabl.metrics import METRICS
from scalabl.report.text import ARROWS, MINUS, heading, number

_SHIFTED_METRICS = ("accuracy", "nll", "ece", "brier")
_COSTS = ("extra_parameters", "train_cost", "predict_cost", "peak_memory")
_HEADINGS = {
    "ood_auroc": "told by entropy ↑",
    "ood_auroc_epistemic": "by epistemic ↑",
    "temperature": "T",
    "extra_parameters": "extra parameters",
    "train_cost": "training ×",
    "predict_cost": "prediction ×",
    "peak_memory": "memory MiB",
}
_MARKS = {
    ("mle", "better"): "▲",
    ("mle", "worse"): "▼",
    ("mle+temperature", "better"): "△",
    ("mle+temperature", "worse"): "▽",
}
_LATEX_MARKS = {"▲": r"\blacktriangle", "▼": r"\blacktriangledown", "△": r"\vartriangle", "▽": r"\triangledown"}

NOTES = (
    "±: half the 95 % interval over seeds (Student's t). Bold: best, or not told apart from it.",
    "▲ better, ▼ worse than MLE; △ better, ▽ worse than MLE with a temperature: the 95 % interval of the paired "
    "bootstrap over rows and seeds leaves out zero. With few seeds it is narrower than it should be.",
    "Each method is there raw and with a temperature (T) on its class logits, fitted on the same validation rows.",
    "At chance: accuracy not reliably above random guessing or the commonest answer; such a method is never best.",
    "Costs are ratios to MLE's wall time of the same task and seed (steps, fits and passes alone, without loading and "
    "without the frozen layers, which are computed once for all); single measurements, so differences of a tenth mean "
    "nothing. Memory: the highest peak of the process or the accelerator in any of its cells.",
    "Told by entropy, by epistemic: AUROC of the total uncertainty and of its epistemic part between the trained "
    "task's test rows and the shifted ones; 0.5 is blind.",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """A figure as text with how it is set."""

    text: str
    spread: str = ""
    bold: bool = False
    marks: str = ""


@dataclass(frozen=True)
class Grid:
    """One table to be written down.

    Attributes:
        caption: above it.
        columns: headings; the first is the method's.
        rows: the method's name, whether it is at chance, and the cells.
        warnings: sentences below it.
    """

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[str, str, list[Cell]]]
    warnings: list[str]


@dataclass(frozen=True)
class Document:
    """Everything that a rendering shows.

    Attributes:
        title: its heading.
        facts: model, data, seeds, versions, device, command.
        grids: the tables.
    """

    title: str
    facts: dict[str, str]
    grids: list[Grid]


def layout(title: str, facts: dict[str, str], tables: Sequence[Table]) -> Document:
    """Tables of means as grids of text."""
    return Document(title, facts, [grid for table in tables for grid in _grids(table)])


def _grids(table: Table) -> list[Grid]:
    where = f"trained on {table.trained_on}, tested on {table.task} ({table.n:,} rows)"
    reasons = dict.fromkeys(line.why for line in table.lines if line.why)
    warnings = [f"{', '.join(line.method for line in table.lines if line.why == why)}: {why}" for why in reasons]
    if table.shifted:
        columns = (*_SHIFTED_METRICS, "ood_auroc", "ood_auroc_epistemic")
        return [_grid(f"Shift: {where}", columns, table.lines, warnings)]
    costs = [line for line in table.lines if line.figures["train_cost"].mean is not None]
    grids = [_grid(f"Quality: {where}", (*METRICS, "temperature"), table.lines, warnings)]
    raw = [line for line in costs if line.figures["temperature"].mean is None]
    return [*grids, _grid(f"Cost: {where}", _COSTS, raw, [])] if raw else grids


def _grid(caption: str, columns: tuple[str, ...], lines: Sequence[Line], warnings: list[str]) -> Grid:
    heads = tuple(f"{heading(c)} {ARROWS[c]}" if c in METRICS else _HEADINGS[c] for c in columns)
    rows = [
        (line.method, f"at chance in {line.collapsed} of {line.seeds}" if line.collapsed else "",
         [Cell(str(line.seeds)), *(_cell(line.figures[column], column) for column in columns)])
        for line in lines
    ]  # fmt: skip
    return Grid(caption, ("method", "seeds", *heads), rows, warnings)


def _cell(figure: Figure, column: str) -> Cell:
    if figure.mean is None:
        return Cell("–")
    marks = "".join(_MARKS[rival, verdict] for rival, verdict in figure.versus.items() if verdict)
    counted = column in ("extra_parameters", "peak_memory")
    spread = "" if figure.half is None or counted else _text(figure.half, column)
    return Cell(_text(figure.mean, column), spread, figure.best, marks)


def _text(value: float, column: str) -> str:
    if column in ("extra_parameters", "peak_memory"):
        return f"{value:,.0f}".replace("-", MINUS)
    if column in ("temperature", "train_cost", "predict_cost"):
        return f"{value:.2f}"
    return number(value, column)


def markdown(document: Document) -> str:
    """GitHub's Markdown."""
    lines = [f"# {document.title}", "", *(f"- {name}: {text}" for name, text in document.facts.items()), ""]
    for grid in document.grids:
        lines += [
            f"## {grid.caption}",
            "",
            f"| {' | '.join(grid.columns)} |",
            f"|---|{'---:|' * (len(grid.columns) - 1)}",
        ]
        for name, chance, cells in grid.rows:
            label = f"{name} (*{chance}*)" if chance else name
            lines.append(f"| {label} | {' | '.join(map(_markdown_cell, cells))} |")
        lines += ["", *(f"- {warning}" for warning in grid.warnings), *([""] if grid.warnings else [])]
    return "\n".join([*lines, *(f"- {note}" for note in NOTES), ""])


def _markdown_cell(cell: Cell) -> str:
    figure = f"**{cell.text}**" if cell.bold else cell.text
    return " ".join(part for part in (figure, f"±{cell.spread}" if cell.spread else "", cell.marks) if part)


def latex(document: Document) -> str:
    """Tables for a paper that loads booktabs and amssymb."""
    lines = ["% " + document.title, r"% \usepackage{booktabs,amssymb}"]
    lines += [f"% {name}: {text}" for name, text in document.facts.items()]
    for grid in document.grids:
        lines += [
            r"\begin{table}", r"\centering\small", rf"\caption{{{_escaped(grid.caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}", r"\toprule",
            " & ".join(map(_escaped, grid.columns)) + r" \\", r"\midrule",
        ]  # fmt: skip
        for name, chance, cells in grid.rows:
            label = _escaped(name) + (rf" \emph{{({_escaped(chance)})}}" if chance else "")
            lines.append(" & ".join([label, *map(_latex_cell, cells)]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join([*lines, *(f"% {note}" for note in NOTES), ""])


def _latex_cell(cell: Cell) -> str:
    figure = rf"\textbf{{{_escaped(cell.text)}}}" if cell.bold else _escaped(cell.text)
    spread = rf" {{\scriptsize$\pm${_escaped(cell.spread)}}}" if cell.spread else ""
    marks = f"$^{{{''.join(_LATEX_MARKS[mark] for mark in cell.marks)}}}$" if cell.marks else ""
    return figure + spread + marks


def _escaped(text: str) -> str:
    special = {c: "\\" + c for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MINUS: "$-$", "–": "--",
        "↑": r"$\uparrow$", "↓": r"$\downarrow$", "×": r"$\times$", "±": r"$\pm$",
    }  # fmt: skip
    return "".join(special.get(character, character) for character in text)


def html(document: Document) -> str:
    """One page that needs nothing beside it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("scalabl.benchmark").joinpath("results.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(document=document, notes=NOTES)
