"""A page of tables and pictures as Markdown, LaTeX and HTML: one layout, three ways of writing it down."""

from __future__ import annotations

import base64
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from scalabl.inference.report.table import MINUS
from scalabl.study.drawing import svg
from scalabl.study.layout import NOTES, Document, TableCell, TableGrid

_LATEX_MARKS = {
    "▲": r"\blacktriangle", "▼": r"\blacktriangledown", "△": r"\vartriangle", "▽": r"\triangledown", "†": r"\dagger",
}  # fmt: skip


def markdown(document: Document) -> str:
    """GitHub's Markdown; the pictures lie beside it."""
    lines = [f"# {document.title}", ""]
    lines += [part for text in (document.about, document.answer.strip()) if text for part in (text, "")]
    for section in document.sections:
        lines += [f"## {section.title}", ""]
        for picture in section.pictures:
            lines += [
                f"![{picture.description}]({picture.name}.svg)",
                "",
                *([picture.words, ""] if picture.words else []),
            ]
        for grid in section.grids:
            lines += _markdown_grid(grid)
    lines += ["## How to read it", "", *(f"- {note}" for note in NOTES), "", "## How it was made", ""]
    return "\n".join([*lines, *(f"- {name}: {text}" for name, text in document.facts.items()), ""])


def _markdown_grid(grid: TableGrid) -> list[str]:
    opening = [f"<details><summary>{grid.caption}</summary>"] if grid.folded else [f"**{grid.caption}**"]
    table = [f"| {' | '.join(grid.columns)} |", f"|---|{'---:|' * (len(grid.columns) - 1)}"]
    table += [f"| {name} | {' | '.join(map(_markdown_cell, cells))} |" for name, cells in grid.rows]
    closing = [*([grid.warning, ""] if grid.warning else []), *(["</details>", ""] if grid.folded else [])]
    return [*opening, "", *table, "", *closing]


def _markdown_cell(cell: TableCell) -> str:
    figure = f"**{cell.text}**" if cell.bold else cell.text
    return " ".join(part for part in (figure, f"±{cell.spread}" if cell.spread else "", cell.marks) if part)


def latex(document: Document) -> str:
    """Tables for a paper that loads booktabs and amssymb."""
    lines = ["% " + document.title, r"% \usepackage{booktabs,amssymb}"]
    lines += [f"% {name}: {text}" for name, text in document.facts.items()]
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


def _latex_cell(cell: TableCell) -> str:
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
    return environment.from_string(source).render(document=document, notes=NOTES)
