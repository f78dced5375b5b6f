"""The figures of a report, computed once, for the HTML file, the terminal and `--json` alike; and the terminal's table.

Figures as text: names, units, digits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from scalabl.inference.report.results import MethodResult, Report, count_choices
from scalabl.metrics import evaluate
from scalabl.metrics.bootstrap import Metric
from scalabl.metrics.detection import DETECTION_METRICS, judge_detection
from scalabl.metrics.figures import METRICS, is_collapsed, paired_difference
from scalabl.metrics.per_class import ClassFigures, per_class, per_label
from scalabl.metrics.several_labels import evaluate_sets, label_probs
from scalabl.metrics.uncertainty import average, mean_particles

NAMES = {"accuracy": "ACC", "nll": "NLL", "ece": "ECE", "brier": "Brier", "auroc": "AUROC", "aurc": "AURC"}
PERCENT = ("accuracy", "ece")
ARROWS = {"accuracy": "↑", "nll": "↓", "ece": "↓", "brier": "↓", "auroc": "↑", "aurc": "↓"}
DETECTION_NAMES = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95 %"}
DETECTION_ARROWS = {name: "↑" if higher else "↓" for name, higher in DETECTION_METRICS.items()}
MINUS = "\N{MINUS SIGN}"


def heading(metric: str) -> str:
    """'ACC %': the short name with its unit."""
    return NAMES[metric] + (" %" if metric in PERCENT else "")


def number(value: float, metric: str, *, signed: bool = False) -> str:
    """A figure in the metric's unit: 60.8 (per cent) or 0.983."""
    scale, digits = (100, 1) if metric in PERCENT else (1, 3)
    text = f"{value * scale:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def span(figure: dict[str, Any], metric: str, *, signed: bool = False) -> str:
    """The interval of {value, low, high}: '58.9 to 62.7', or nothing where there is none."""
    if figure["low"] is None:
        return ""
    return f"{number(figure['low'], metric, signed=signed)} to {number(figure['high'], metric, signed=signed)}"


def plus_minus(figure: dict[str, Any], metric: str) -> str:
    """'60.8 ±1.9', half the interval's width after the figure; a dash where the figure is undefined."""
    if figure["value"] is None:
        return "–"
    text = number(figure["value"], metric)
    if figure["low"] is None:
        return text
    return f"{text} ±{number((figure['high'] - figure['low']) / 2, metric)}"


def table(report: Report, *, bootstrap: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """One row of figures a method, made of plain dicts, lists, strings and numbers (ready for JSON).

    Keys of a row:
        method, n, notes; n counts rows
        labels_per_row: C, where rows may have several of C labels: accuracy to aurc are then those of n C questions,
            whether a row has a label, with intervals over rows
        sets: of such rows: subset_accuracy, micro_f1, macro_f1 (`scalabl.metrics.several_labels`), likewise
        particles: N; under adaptive N, the mean number that a row took
        accuracy, nll, ece, brier, auroc, aurc: {value, low, high, reason}; value None where undefined
        entropy: {total, aleatoric, epistemic}: means over the rows, in nats
        collapsed: a sentence, or None
        best: names of the metrics in which this method is best, or not told apart from the best by the
            paired interval; a collapsed method is never best, and with one method there is no best
        versus_first: metric -> {value, low, high, reason} of this method minus the first; None in row one
        ood: name -> {n, auroc_total, auroc_epistemic: {value, low, high, reason}, scores} and, with labels, the
            metrics, best and collapsed as above; scores: probability, entropy, epistemic, energy, distance, those that
            there are -> {auroc, aupr, fpr95: {value, low, high, reason}}, the shifted rows being what is to be found
        per_class: where rows share their labels, of each: {label, support, precision, recall, ece}, the last four as in
            `scalabl.metrics.per_class`

    Raises:
        UserError: for a report without methods, methods on different rows, or predictions that are none.
    """
    report.check()
    rows = [_row(method, bootstrap, seed) for method in report.methods]
    probs = [average(method.log_probs) for method in report.methods]
    labels, per_row = report.methods[0].labels, report.methods[0].per_row
    if report.labels is not None:
        for row, method in zip(rows, report.methods, strict=True):
            figures = zip(report.labels, _of_labels(method), strict=True)
            row["per_class"] = [{"label": label, **asdict(of_label)} for label, of_label in figures]
    compared: dict[str, Any] = {"bootstrap": bootstrap, "seed": seed, "per_row": per_row}
    _mark_best(rows, probs, labels, compared)
    for row, p in zip(rows[1:], probs[1:], strict=True):
        row["versus_first"] = {
            metric: asdict(paired_difference(p, probs[0], labels, metric, **compared)) for metric in METRICS
        }
    for name in ood_names(report):
        chosen = [i for i, method in enumerate(report.methods) if name in method.ood and name in method.ood_labels]
        if chosen:
            shifted = [average(report.methods[i].ood[name]) for i in chosen]
            ood_labels = report.methods[chosen[0]].ood_labels[name]
            _mark_best([rows[i]["ood"][name] for i in chosen], shifted, ood_labels, compared)
    return rows


def ood_names(report: Report) -> list[str]:
    """The shifted data sets of a report, in the order of first mention."""
    return list(dict.fromkeys(name for method in report.methods for name in method.ood))


def _of_labels(method: MethodResult) -> list[ClassFigures]:
    if method.per_row == 1:
        return per_class(average(method.log_probs), method.labels)
    return per_label(label_probs(method.log_probs, method.per_row), method.labels.unflatten(0, (-1, method.per_row)))


def _row(method: MethodResult, bootstrap: int, seed: int) -> dict[str, Any]:
    known, per_row = method.uncertainty(), method.per_row
    row: dict[str, Any] = {
        "method": method.name,
        "n": len(method.labels) // per_row,
        **({"labels_per_row": per_row} if per_row > 1 else {}),
        "particles": mean_particles(method.log_probs),
        **_figures(method.log_probs, method.labels, bootstrap, seed, per_row),
        "entropy": {part: getattr(known, part).mean().item() for part in ("total", "aleatoric", "epistemic")},
        "versus_first": None,
        "notes": list(method.notes),
        "ood": {},
    }
    if per_row > 1:
        marks = method.labels.unflatten(0, (-1, per_row))
        sets = evaluate_sets(label_probs(method.log_probs, per_row), marks, bootstrap=bootstrap, seed=seed)
        row["sets"] = {name: asdict(metric) for name, metric in sets.items()}
    for name, log_probs in method.ood.items():
        others = method.scope_scores(name)
        scores = {
            score: {
                figure: asdict(metric)
                for figure, metric in judge_detection(values, others[score], bootstrap=bootstrap, seed=seed).items()
            }
            for score, values in method.scope_scores().items()
            if score in others
        }
        single = {"auroc": asdict(Metric(None, None, None, "a single prediction has no epistemic part"))}
        row["ood"][name] = {
            "n": log_probs.shape[1] // per_row,
            "auroc_total": scores["entropy"]["auroc"],
            "auroc_epistemic": scores.get("epistemic", single)["auroc"],
            "scores": scores,
        }
        if name in method.ood_labels:
            row["ood"][name] |= _figures(log_probs, method.ood_labels[name], bootstrap, seed, per_row)
    return row


def _figures(log_probs: Tensor, labels: Tensor, bootstrap: int, seed: int, per_row: int) -> dict[str, Any]:
    metrics = evaluate(average(log_probs), labels, bootstrap=bootstrap, seed=seed, per_row=per_row)
    collapsed = is_collapsed(metrics["accuracy"], labels, count_choices(log_probs))
    return {name: asdict(metric) for name, metric in metrics.items()} | {"collapsed": collapsed, "best": []}


def _mark_best(rows: list[dict[str, Any]], probs: list[Tensor], labels: Tensor, compared: Mapping[str, Any]) -> None:
    """Enter in row["best"] the metrics in which a method is best, or tied with the best, `compared` so."""
    if len(rows) < 2:
        return
    for metric, higher in METRICS.items():
        standing = [i for i, row in enumerate(rows) if row["collapsed"] is None and row[metric]["value"] is not None]
        if not standing:
            continue
        sign = 1 if higher else -1
        best = max(standing, key=lambda i: sign * rows[i][metric]["value"])
        for i in standing:
            gap = paired_difference(probs[i], probs[best], labels, metric, **compared)
            tied = gap.low is not None and gap.high is not None and gap.low <= 0 <= gap.high
            if i == best or tied:
                rows[i]["best"].append(metric)


SET_NAMES = {"subset_accuracy": "all right %", "micro_f1": "micro-F1 %", "macro_f1": "macro-F1 %"}
_SHIFTED = ("accuracy", "nll", "ece")
WORST = 10  # labels that the terminal shows
_WORD = 10  # characters


def print_table(rows: list[dict[str, Any]], console: Console, metrics: Sequence[str] = tuple(METRICS)) -> None:
    """Print the rows that `report.table` gives: some figures with half their interval, the best in bold.

    Below stand a warning for each collapsed method, the notes, and one table for each shifted data set.
    """
    grid = _grid(in_words(rows[0]) if rows else None, [f"{heading(m)} {ARROWS[m]}" for m in metrics], console)
    for row in rows:
        grid.add_row(_name(row["method"], row), *(_cell(row, metric) for metric in metrics))
    console.print(grid)
    if rows and "sets" in rows[0]:
        sets = _grid("the labels of a row together", [f"{name} ↑" for name in SET_NAMES.values()], console)
        for row in rows:
            sets.add_row(Text(row["method"]), *(Text(plus_minus(row["sets"][m], "accuracy")) for m in SET_NAMES))
        console.print(sets)
    if rows and "per_class" in rows[0]:
        _print_labels(rows[0], console)
    for name in dict.fromkeys(name for row in rows for name in row["ood"]):
        _print_shifted(name, [row for row in rows if name in row["ood"]], console)
    if len(rows) > 1:
        console.print(Text("± half the 95% bootstrap interval; bold: best, or not told apart from it.", "dim"))
    else:
        console.print(Text("± half the 95% bootstrap interval.", "dim"))
    # what holds for several methods is said once
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for kind, sentences in (("warning", [row["collapsed"]] if row["collapsed"] else []), ("note", row["notes"])):
            for sentence in sentences:
                said.setdefault((kind, sentence), []).append(row["method"])
    for (kind, sentence), methods in said.items():
        named = "all" if 1 < len(methods) == len(rows) else ", ".join(methods)
        console.print(Text(f"{kind}: {named}: {sentence}", style="bold yellow" if kind == "warning" else "dim"))


def in_words(row: dict[str, Any]) -> str:
    """ "300 rows", or "300 rows, each of 6 labels a question": what a row of figures is over."""
    rows = f"{row['n']:,} {'row' if row['n'] == 1 else 'rows'}"
    return f"{rows}, each of {row['labels_per_row']} labels a question" if "labels_per_row" in row else rows


def worst_first(per_class: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Labels by rising recall, those without a row last."""
    return sorted(per_class, key=lambda of: (of["recall"] is None, of["recall"] or 0, -of["ece"]))


def share(value: float | None) -> str:
    """A share in per cent, a dash where it is undefined."""
    return "–" if value is None else number(value, "accuracy")


def _print_labels(row: dict[str, Any], console: Console) -> None:
    """The labels of one method that do worst; all of them are in the report and the JSON."""
    labels = worst_first(row["per_class"])
    few = f", the {WORST} of lowest recall" if len(labels) > WORST else ""
    columns = ["rows", "precision % ↑", "recall % ↑", "ECE % ↓"]
    grid = _grid(f"{len(labels)} labels{few}: {row['method']}", columns, console, first="label")
    for of in labels[:WORST]:
        grid.add_row(
            Text(of["label"]), f"{of['support']:,}", share(of["precision"]), share(of["recall"]), share(of["ece"])
        )
    console.print(grid)


def _print_shifted(name: str, rows: list[dict[str, Any]], console: Console) -> None:
    columns = [f"{heading(m)} {ARROWS[m]}" for m in _SHIFTED]
    grid = _grid(
        f"shifted: {name}, {rows[0]['ood'][name]['n']:,} rows", [*columns, "told by entropy", "by epistemic"], console
    )
    for row in rows:
        shifted = row["ood"][name]
        cells = [_cell(shifted, metric) if metric in shifted else Text("–") for metric in _SHIFTED]
        auroc = [Text(plus_minus(shifted[f"auroc_{part}"], "auroc")) for part in ("total", "epistemic")]
        grid.add_row(_name(row["method"], shifted), *cells, *auroc)
    console.print(grid)
    console.print(Text("told by ...: AUROC of that uncertainty between the two data sets; 0.5 is blind.", "dim"))
    _print_scores([(row["method"], row["ood"][name]["scores"]) for row in rows], console)


def _print_scores(rows: list[tuple[str, dict[str, Any]]], console: Console) -> None:
    """How well each score tells shifted rows; of many methods the AUROC alone."""
    if len(rows) > 2:
        names = list(dict.fromkeys(score for _, scores in rows for score in scores))
        grid = _grid(None, [f"by {name}" for name in names], console)
        for method, scores in rows:
            of_method = [plus_minus(scores[n]["auroc"], "auroc") if n in scores else "–" for n in names]
            grid.add_row(Text(method), *map(Text, of_method))
        console.print(grid)
        console.print(Text("by ...: AUROC of that score between the two data sets; 0.5 is blind.", "dim"))
        return
    grid = _grid(None, ["score", *(f"{DETECTION_NAMES[m]} {DETECTION_ARROWS[m]}" for m in DETECTION_METRICS)], console)
    for method, scores in rows:
        for score, figures in scores.items():
            cells = [Text(plus_minus(figures[m], "ece" if m == "fpr95" else "auroc")) for m in DETECTION_METRICS]
            grid.add_row(Text(method), Text(score), *cells)
    console.print(grid)
    sentence = (
        "AUPR: shifted rows are to be found; FPR95: share of the others that is flagged where 95 % of them are found."
    )
    console.print(Text(sentence, "dim"))


def _grid(title: str | None, columns: list[str], console: Console, *, first: str = "method") -> Table:
    # a narrow console folds a long name, and cuts no figure
    grid = Table(
        title=Text(title, "bold") if title else None, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True,
        pad_edge=False,
    )  # fmt: skip
    # wide enough for "calibrated", where figures leave room
    grid.add_column(first, overflow="fold", min_width=_WORD if console.width >= 80 else None)
    for column in columns:
        grid.add_column(Text(column), justify="right", overflow="fold")
    return grid


def _name(name: str, figures: dict[str, Any]) -> Text:
    text = Text(name)
    if figures.get("collapsed"):
        text.append(" (at chance)", style="yellow")
    return text


def _cell(figures: dict[str, Any], metric: str) -> Text:
    return Text(plus_minus(figures[metric], metric), style="bold" if metric in figures["best"] else "")
