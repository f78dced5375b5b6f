"""The table and the picture of `open_answers.py`: AUROC, PRR and cost of each score, over seeds."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from _common import markdown_facts, markdown_table, write_results, write_text
from over_seeds import mean_with_interval
from polygraph_scores import SAME
from polygraph_scores import SAMPLED as SAMPLED_BY_POLYGRAPH

METRICS = {"auroc": "AUROC ↑", "prr": "PRR ↑", "aurc": "AURC ↓"}
# what each method's answers are scored by in the table; every score is in the JSON file
SCORES = {
    "mle": ("log_probability", "mean_log_probability", "mean_entropy", "self_consistency", "semantic_entropy",
            "discrete_semantic_entropy"),
    "scalabl mean": ("log_probability", "mean_log_probability", "mean_entropy"),
    None: ("log_probability", "mean_log_probability", "mean_entropy", "mean_epistemic", "mean_intersection",
           "first_token_epistemic", "std_mean_log_probability"),
}  # fmt: skip
SAMPLED = ("self_consistency", "semantic_entropy", "discrete_semantic_entropy")
POLYGRAPH = "lm-polygraph "  # begins the names of its scores; those that are ours by another name are left out


def write(directory: Path, content: dict[str, Any]) -> None:
    """Write open_answers.json, .csv, .md and .svg."""
    table = summarized(content)
    page = markdown(content, table)
    write_results(directory, "open_answers", content, page)
    write_text(directory / "open_answers.csv", as_csv(table))
    picture(table, directory / "open_answers.svg")
    print(page)


def summarized(content: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a task, method and score, with every figure's mean, sd and interval over seeds."""
    table = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    medians = content["costs"]["medians"]
    for (task, method), seeds in groups.items():
        shared = {
            "task": task,
            "method": method,
            "accuracy": mean_with_interval([row["accuracy"] for row in seeds]),
            "f1": mean_with_interval([row["f1"] for row in seeds]),
        }
        for score in seeds[0]["scores"]:
            figures = {m: mean_with_interval([row["scores"][score][m]["value"] for row in seeds]) for m in METRICS}
            cost = medians[f"{method} + samples" if score in _sampled(seeds[0]) else method]
            tokens = mean_with_interval([row["scores"][score]["tokens"] for row in seeds])
            table.append({**shared, "score": score, **figures, "ece": None, "cost": cost, "tokens": tokens})
        if all("confidence" in row for row in seeds):
            figures = {
                m: mean_with_interval([row["confidence"][m]["value"] for row in seeds]) for m in (*METRICS, "ece")
            }
            tokens = mean_with_interval([row["tokens_an_answer"] for row in seeds])
            table.append({**shared, "score": "confidence", **figures, "cost": medians[method], "tokens": tokens})
    return table


def _sampled(row: dict[str, Any]) -> set[str]:
    """Scores that took more tokens than the answer."""
    return {name for name, figures in row["scores"].items() if figures["tokens"] > row["tokens_an_answer"] + 1e-9}


def markdown(content: dict[str, Any], table: list[dict[str, Any]]) -> str:
    """The results as a page."""
    parts = ["# Open answers: which score tells that an answer is wrong", "![AUROC and cost](open_answers.svg)"]
    for task in dict.fromkeys(row["task"] for row in table):
        rows = [row for row in table if row["task"] == task and _is_shown(row)]
        best = max((row["auroc"]["mean"] for row in rows if row["auroc"]["mean"] is not None), default=None)
        lines = [
            [
                f"{row['method']}, {row['score'].replace('_', ' ')}",
                _number(row["accuracy"], 100, 1),
                *(_bold(row, m, best) for m in METRICS),
                _number(row["ece"], 100, 1) if row["ece"] else "",
                f"{row['cost']:.2f}",
                f"{row['tokens']['mean']:.0f}",
            ]
            for row in rows
        ]
        header = ["method, score", "ACC % ↑", *METRICS.values(), "ECE % ↓", "cost", "tokens"]
        parts += [f"## {task}", markdown_table(header, lines)]
    parts += [
        "Mean ± standard deviation over seeds; bold: the highest mean AUROC of a task. ACC: exact match with one of "
        "the answers that count. Cost: time beside plain LoRA's greedy decode, medians of paired rounds with a fixed "
        'number of tokens; "tokens": generated for an answer with its score. confidence: of the scores that one decode '
        "gives, the one (isotonic or Platt) with the lowest left-out NLL on validation questions. lm-polygraph: by its "
        "own code, of plain LoRA's answers and samples; those that are ours by another name are in the JSON file only.",
        markdown_facts(content["facts"]),
    ]
    return "\n\n".join(parts) + "\n"


def _is_shown(row: dict[str, Any]) -> bool:
    score = row["score"]
    if score.startswith(POLYGRAPH):
        return score.removeprefix(POLYGRAPH) not in SAME
    return score == "confidence" or score in SCORES.get(row["method"], SCORES[None])


def _took_samples(score: str) -> bool:
    return score in SAMPLED or score.removeprefix(POLYGRAPH).startswith(SAMPLED_BY_POLYGRAPH)


def _bold(row: dict[str, Any], metric: str, best: float | None) -> str:
    text = _number(row[metric], 1, 3)
    return f"**{text}**" if metric == "auroc" and best is not None and row["auroc"]["mean"] == best else text


def _number(figure: dict[str, float | None], scale: float, digits: int) -> str:
    mean, sd = figure["mean"], figure["sd"]
    if mean is None:
        return "–"
    return f"{scale * mean:.{digits}f}" + ("" if sd is None else f" ± {scale * sd:.{digits}f}")


def as_csv(table: list[dict[str, Any]]) -> str:
    """One line a task, method and score."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ("accuracy", "f1", *METRICS, "ece", "tokens")
    writer.writerow(["task", "method", "score", "cost", *(f"{n}{end}" for n in figures for end in ("", "_sd"))])
    for row in table:
        pairs = [(row[name] or {"mean": None, "sd": None}) for name in figures]
        line = [pair[key] for pair in pairs for key in ("mean", "sd")]
        writer.writerow([row["task"], row["method"], row["score"], row["cost"], *line])
    return text.getvalue()


def picture(table: list[dict[str, Any]], path: Path) -> None:
    """AUROC of each score, a panel a task and a colour a method; bars: standard deviations over seeds."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    shown = [row for row in table if _is_shown(row) and row["auroc"]["mean"] is not None]
    tasks = list(dict.fromkeys(row["task"] for row in table))
    methods = list(dict.fromkeys(row["method"] for row in shown))
    # one decode's scores first, then those of sampled answers
    scores = sorted(dict.fromkeys(row["score"] for row in shown), key=_took_samples)
    tab10: Any = matplotlib.colormaps["tab10"]
    size = (3.6 * len(tasks) + 2.4, 0.42 * len(scores) + 1.3)
    figure, axes = plt.subplots(1, len(tasks), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for i, method in enumerate(methods):
            rows = [row for row in shown if (row["task"], row["method"]) == (task, method)]
            # a method's points lie a little below the method's before it
            y = [scores.index(row["score"]) + 0.11 * (i - (len(methods) - 1) / 2) for row in rows]
            x = [row["auroc"]["mean"] for row in rows]
            bars = [row["auroc"]["sd"] or 0.0 for row in rows]
            costs = sorted({row["cost"] for row in rows})
            label = f"{method} ({', with samples '.join(f'{cost:.1f}' for cost in costs)} ×)" if costs else method
            shape: dict[str, Any] = {"fmt": "o", "color": tab10.colors[i], "markersize": 4, "elinewidth": 0.8}
            axis.errorbar(x, y, xerr=bars, label=label, **shape)
        for line in range(1, len(scores)):
            axis.axhline(line - 0.5, color="0.92", linewidth=0.8, zorder=0)
        axis.axvline(0.5, color="0.7", linewidth=0.8, zorder=0)
        axis.set_title(task)
        axis.set_xlabel("AUROC of wrong answers")
    axes[0][0].set_yticks(range(len(scores)), [name.replace("_", " ") for name in scores], fontsize=8)
    axes[0][0].set_ylim(max(len(scores), 1) - 0.5, -0.5)  # the first score on top
    handles, labels = axes[0][0].get_legend_handles_labels()
    legend: dict[str, Any] = {"ncols": 3, "fontsize": 8, "frameon": False, "loc": "lower center"}
    figure.legend(handles, labels, title="method (cost in greedy decodes of plain LoRA)", title_fontsize=8, **legend)
    figure.tight_layout(rect=(0, 0.85 / size[1], 1, 1))
    figure.savefig(path)
    plt.close(figure)
