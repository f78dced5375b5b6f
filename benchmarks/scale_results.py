"""The results of `scale.py`: rows of one measurement each, the page, and the picture."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from _common import markdown_facts, markdown_table, median_with_interval, write_results, write_text
from matplotlib.figure import Figure
from shapes import SHAPES

TITLES = {"train": "Training", "predict": "Prediction", "decode": "Decoding"}
BASELINES = {"train": "lora", "predict": "one pass", "decode": "lora"}
AIMS = {"time_ratio": 1.02, "memory_ratio": 1.01}  # of a training step of ScalaBL, over plain LoRA's
COLUMNS = (
    "part", "model", "bits", "method", "batch", "step_seconds", "tokens_per_second", "peak_bytes", "time_ratio",
    "time_ratio_low", "time_ratio_high", "memory_ratio", "decode_tokens_per_second", "particles", "rounds", "note",
)  # fmt: skip
LOOKS = {"lora": ("#000000", "x"), "scalabl": ("#0072b2", "o"), "blob": ("#d55e00", "s")}  # Okabe and Ito's colours
STYLE: Any = {"svg.fonttype": "none", "font.size": 9, "text.parse_math": False, "svg.hashsalt": "scale"}


def write(directory: Path, cells: dict[str, Any], facts: dict[str, str]) -> None:
    """scale.json with every cell, scale.csv, scale.md, and scale.svg where there is more than one size."""
    found = rows(cells)
    drawn = len({row["model"] for row in found if row["part"] == "train"}) > 1
    page = markdown(found, cells, facts, drawn)
    write_results(directory, "scale", {"facts": facts, "rows": found, "cells": cells}, page)
    write_text(directory / "scale.csv", as_csv(found))
    if drawn:
        write_text(directory / "scale.svg", picture(found))


def rows(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a line of a finished cell, with the columns of `COLUMNS`; ratios are paired by round."""
    return [
        _row(cell, name, line, cell["lines"][BASELINES[cell["part"]]])
        for cell in cells.values()
        if cell["status"] == "done"
        for name, line in cell["lines"].items()
        if "seconds" in line
    ]


def _row(cell: dict[str, Any], name: str, line: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    seconds = statistics.median(line["seconds"])
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {key: cell[key] for key in ("part", "model", "bits", "batch")}
    row |= {"method": name, "step_seconds": seconds, "peak_bytes": line["peak"], "rounds": len(line["seconds"])}
    if cell["part"] == "decode":
        row |= {"particles": line["particles"], "decode_tokens_per_second": line["particles"] / seconds}
    else:
        row["tokens_per_second"] = cell["batch"] * cell["settings"]["length"] / seconds
    if "seconds" in base:
        ratio = median_with_interval([a / b for a, b in zip(line["seconds"], base["seconds"], strict=True)])
        row |= {"time_ratio": ratio["median"], "time_ratio_low": ratio["low"], "time_ratio_high": ratio["high"]}
        row["memory_ratio"] = line["peak"] / base["peak"]
    if "choice" in line:
        row["note"] = f"{line['choice']}; chosen in {line['choice_seconds']:.1f} s"
    return row


def as_csv(found: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def markdown(found: list[dict[str, Any]], cells: dict[str, Any], facts: dict[str, str], drawn: bool) -> str:
    """The results as a page."""
    parts = ["# Cost at the shapes of Qwen2.5"]
    if drawn:
        parts.append("![Step time and peak memory over plain LoRA's, a mark a method](scale.svg)")
    for part, title in TITLES.items():
        of_part = [row for row in found if row["part"] == part]
        if of_part:
            parts += [f"## {title}", _table(part, of_part)]
    parts += [_aims(found), _reasons(cells)]
    parts.append(
        "Times are medians over rounds, in each of which every line was measured once, in random order; a ratio is the "
        "median of the ratios of one round to its first line, with its 95 % bootstrap interval. Peak: of the device's "
        "tensors, base included (on a CPU: of the process), measured apart with one adapter on the base at a time. The "
        "time of `auto` is that of what it chose, which it does once for all rows. New tokens a second are those of "
        "all particles together, behind the first token."
    )
    return "\n\n".join([part for part in parts if part] + [markdown_facts(facts)])


def _table(part: str, found: list[dict[str, Any]]) -> str:
    speed = "decode_tokens_per_second" if part == "decode" else "tokens_per_second"
    heads = {"train": ("method", "step"), "predict": ("predictive", "a batch"), "decode": ("method", "a token")}[part]
    header = ["model", "bits", "batch", heads[0], f"{heads[1]}, ms", f"time over {BASELINES[part]}", "tokens / s"]
    body = [
        [
            title(row["model"]), str(row["bits"]), str(row["batch"]),
            row["method"] + (f" ({row['note']})" if row["note"] else ""), f"{1000 * row['step_seconds']:,.1f}",
            _ratio(row), f"{row[speed]:,.0f}", f"{row['peak_bytes'] / 2**30:,.2f}", _number(row["memory_ratio"]),
        ]
        for row in found
    ]  # fmt: skip
    return markdown_table([*header, "peak, GiB", "memory over it"], body)


def title(shape: str) -> str:
    return SHAPES[shape].title


def _ratio(row: dict[str, Any]) -> str:
    if row["time_ratio"] is None:
        return ""
    if row["method"] == BASELINES[row["part"]]:
        return "1"
    return f"{row['time_ratio']:.3f} ({row['time_ratio_low']:.3f} to {row['time_ratio_high']:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _aims(found: list[dict[str, Any]]) -> str:
    """Whether a training step of ScalaBL costs no more than it may."""
    steps = [row for row in found if row["part"] == "train" and row["method"] == "scalabl"]
    lines = []
    for name, most in AIMS.items():
        missed = [
            f"{title(r['model'])} at {r['bits']} bit, batch {r['batch']} ({r[name]:.3f})"
            for r in steps
            if r[name] > most
        ]
        what = f"{'Time' if name == 'time_ratio' else 'Memory'} of a ScalaBL step within {most} of plain LoRA's"
        lines.append(
            f"- {what}: {len(steps) - len(missed)} of {len(steps)}{'; not ' if missed else ''}{', '.join(missed)}."
        )
    return "\n".join(lines) if steps else ""


def _reasons(cells: dict[str, Any]) -> str:
    """What was not measured, and why not."""
    lines = [f"- {key}: {cell['status']}, {cell['reason']}" for key, cell in cells.items() if "reason" in cell]
    for key, cell in cells.items():
        for name, line in cell.get("lines", {}).items():
            if "reason" in line:
                lines.append(f"- {key}, {name}: {line['reason']}")
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def picture(found: list[dict[str, Any]]) -> str:
    """Ratios of a training step's time and memory against the model, a mark a method and number of bits, as SVG."""
    steps = [row for row in found if row["part"] == "train" and row["method"] != BASELINES["train"]]
    batch = max(row["batch"] for row in steps)
    models = [name for name in SHAPES if name in {row["model"] for row in steps}]
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(7.0, 3.0), layout="constrained", facecolor="white")
        panels = drawing.subplots(1, 2)
        for axes, (name, most) in zip(panels, AIMS.items(), strict=True):
            for row in (row for row in steps if row["batch"] == batch):
                colour, marker = LOOKS[row["method"]]
                place = models.index(row["model"]) + (0.12 if row["bits"] == 4 else -0.12)
                if name == "time_ratio":
                    axes.plot([place] * 2, [row["time_ratio_low"], row["time_ratio_high"]], color=colour, linewidth=1)
                axes.plot(
                    place, row[name], color=colour, marker=marker, markersize=5, linestyle="",
                    fillstyle="none" if row["bits"] == 4 else "full", label=f"{row['method']}, {row['bits']} bit",
                )  # fmt: skip
            axes.axhline(1, color="#000000", linewidth=0.8)
            axes.axhline(most, color="#6b7075", linewidth=0.8, linestyle=":")
            axes.set_xticks(range(len(models)), [title(model) for model in models])
            axes.set_title(f"{'Step time' if name == 'time_ratio' else 'Peak memory'} over plain LoRA's", fontsize=9)
            axes.grid(True, axis="y", color="#d3d7db", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        handles = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
        drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
        out = io.StringIO()
        drawing.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
