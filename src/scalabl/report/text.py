"""Figures as text: names, units, digits."""

from typing import Any

NAMES = {"accuracy": "ACC", "nll": "NLL", "ece": "ECE", "brier": "Brier", "auroc": "AUROC", "aurc": "AURC"}
PERCENT = ("accuracy", "ece")
ARROWS = {"accuracy": "↑", "nll": "↓", "ece": "↓", "brier": "↓", "auroc": "↑", "aurc": "↓"}
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
