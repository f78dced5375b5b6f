"""The table of a report in a terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scalabl.inference.report.table import ARROWS, heading, plus_minus
from scalabl.metrics.figures import METRICS

_SHIFTED = ("accuracy", "nll", "ece")


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the rows that `report.table` gives: figures with half their interval, the best in bold.

    Below stand a warning for each collapsed method, the notes, and one table for each shifted data set.
    """
    grid = _grid(f"{rows[0]['n']:,} rows" if rows else None, [f"{heading(m)} {ARROWS[m]}" for m in METRICS])
    for row in rows:
        grid.add_row(_name(row["method"], row), *(_cell(row, metric) for metric in METRICS))
    console.print(grid)
    for name in dict.fromkeys(name for row in rows for name in row["ood"]):
        _print_shifted(name, [row for row in rows if name in row["ood"]], console)
    if len(rows) > 1:
        console.print(Text("± half the 95% bootstrap interval; bold: best, or not told apart from it.", "dim"))
    else:
        console.print(Text("± half the 95% bootstrap interval.", "dim"))
    for row in rows:
        for sentence in [row["collapsed"]] if row["collapsed"] else []:
            console.print(Text(f"warning: {row['method']}: {sentence}", style="bold yellow"))
        for note in row["notes"]:
            console.print(Text(f"note: {row['method']}: {note}", style="dim"))


def _print_shifted(name: str, rows: list[dict[str, Any]], console: Console) -> None:
    columns = [f"{heading(m)} {ARROWS[m]}" for m in _SHIFTED]
    grid = _grid(f"shifted: {name}, {rows[0]['ood'][name]['n']:,} rows", [*columns, "told by entropy", "by epistemic"])
    for row in rows:
        shifted = row["ood"][name]
        cells = [_cell(shifted, metric) if metric in shifted else Text("–") for metric in _SHIFTED]
        auroc = [Text(plus_minus(shifted[f"auroc_{part}"], "auroc")) for part in ("total", "epistemic")]
        grid.add_row(_name(row["method"], shifted), *cells, *auroc)
    console.print(grid)
    console.print(Text("told by ...: AUROC of that uncertainty between the two data sets; 0.5 is blind.", "dim"))


def _grid(title: str | None, columns: list[str]) -> Table:
    grid = Table(title=Text(title, "bold") if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    grid.add_column("method")
    for column in columns:
        grid.add_column(Text(column), justify="right")
    return grid


def _name(name: str, figures: dict[str, Any]) -> Text:
    text = Text(name)
    if figures.get("collapsed"):
        text.append(" (at chance)", style="yellow")
    return text


def _cell(figures: dict[str, Any], metric: str) -> Text:
    return Text(plus_minus(figures[metric], metric), style="bold" if metric in figures["best"] else "")
