"""The demo's table over several seeds: plain LoRA and ScalaBL at the same budget.

    python benchmarks/demo_seeds.py

Resumable: runs that are finished are not trained again, and a seed whose figures are known is not predicted again.
Needs the development environment (make dev).
"""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import json
from pathlib import Path
from typing import Any

from _common import RESULTS, ROOT, facts, markdown_facts, markdown_table, write_results, write_text
from over_seeds import TEST, summarize, told_apart

from scalabl.core.files import ADAPTER, sha256
from scalabl.inference.report.table import ARROWS, heading, number, table
from scalabl.metrics import METRICS
from scalabl.study import demo
from scalabl.study.demo import demo_recipe, run_demo

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(run_demo).parameters.items()
    if name in ("steps", "test_rows", "samples")
}
SHIFTED = ("accuracy", "nll", "ece")
TOLD = {"auroc_total": "AUROC, total ↑", "auroc_epistemic": "AUROC, epistemic ↑"}


def of_seed(directory: Path, seed: int, settings: dict[str, int]) -> dict[str, Any]:
    """The facts and figures of one seed, kept in `directory` together with what they were made from."""
    kept = directory / ("figures-" + "-".join(f"{name}{value}" for name, value in settings.items()) + ".json")
    if kept.is_file():
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if known["adapters"] == _adapters(directory) and known["made_from"] == _made_from(seed, settings):
            print(f"seed {seed}: known, {kept}")
            return known
    directory.mkdir(parents=True, exist_ok=True)
    report = run_demo(directory, seed=seed, **settings)
    made = {
        "facts": report.facts,
        "made_from": _made_from(seed, settings),
        "adapters": _adapters(directory),
        "methods": table(report),
    }
    write_text(kept, json.dumps(made, indent=1, allow_nan=False) + "\n")
    return made


def _adapters(directory: Path) -> dict[str, str]:
    """Run -> hash of its adapter: figures are those of these very adapters."""
    return {path.parent.name: sha256(path) for path in sorted(directory.glob(f"*/{ADAPTER}"))}


def _made_from(seed: int, settings: dict[str, int]) -> dict[str, Any]:
    """Everything that decides the figures of a seed: the recipes of both methods, and the demo's constants."""
    recipes = {name: demo_recipe(name, seed=seed, steps=settings["steps"]).as_dict() for name in ("mle", "scalabl")}
    constants = {name: value for name, value in vars(demo).items() if name.isupper() and not isinstance(value, bool)}
    content: dict[str, Any] = json.loads(json.dumps({"recipes": recipes, "constants": constants, "settings": settings}))
    return content


def main() -> None:
    """Run what is missing, and write demo.json, demo.md and demo.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo-seeds", help="where the runs go")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    a = parser.parse_args()
    settings = {name: getattr(a, name) for name in DEFAULTS}
    seeds = {seed: of_seed(a.runs / f"seed{seed}", seed, settings) for seed in a.seeds}
    summary = summarize({seed: made["methods"] for seed, made in seeds.items()})
    content = {
        "facts": _facts(seeds),
        "summary": summary,
        "notes": _notes(seeds),
        "seeds": {str(seed): made for seed, made in seeds.items()},
    }
    write_results(a.output, "demo", content, markdown(content))
    write_text(a.output / "demo.csv", as_csv(summary, a.seeds))
    print(markdown(content))


def _facts(seeds: dict[int, dict[str, Any]]) -> dict[str, str]:
    """The facts that all seeds share, and this command's own."""
    first, *others = (made["facts"] for made in seeds.values())
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    shared = {key: value for key, value in shared.items() if key not in ("seed", "command", "versions", "device")}
    return facts(**shared, seeds=", ".join(map(str, seeds)))


def _notes(seeds: dict[int, dict[str, Any]]) -> dict[str, list[str]]:
    """Method -> its notes, with the seed in front."""
    notes: dict[str, list[str]] = {}
    for seed, made in seeds.items():
        for row in made["methods"]:
            notes.setdefault(row["method"], []).extend(f"seed {seed}: {note}" for note in row["notes"])
    return {method: said for method, said in notes.items() if said}


def as_csv(summary: dict[str, dict[str, dict[str, Any]]], seeds: list[int]) -> str:
    """One line a data set, method and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    differences = [f"minus_first_{end}" for end in ("mean", "low", "high")]
    writer.writerow(
        ["data", "method", "metric", "mean", "sd", "low", "high", *differences, "best", "collapsed_seeds"]
        + [f"seed_{seed}" for seed in seeds]
    )
    for data, methods in summary.items():
        for method, figures in methods.items():
            for metric, figure in figures.items():
                if not isinstance(figure, dict):
                    continue
                difference = figure["difference"] or dict.fromkeys(("mean", "low", "high"))
                line = [data, method, metric, *(figure[key] for key in ("mean", "sd", "low", "high"))]
                line += [difference[key] for key in ("mean", "low", "high")]
                line += [int(metric in figures["best"]), " ".join(map(str, figures["collapsed"])), *figure["values"]]
                writer.writerow(line)
    return text.getvalue()


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    summary, number_of_seeds = content["summary"], len(content["seeds"])
    parts = ["# The demo over seeds", _table(summary[TEST], list(METRICS), number_of_seeds)]
    if number_of_seeds > 1:
        parts += [
            "Mean ± standard deviation over seeds. Bold: the best mean, and those whose paired difference from it over "
            "seeds has a 95 % interval (Student's) with zero in it; nothing is bold where that holds for all. Seeds "
            "share their training and test rows: the spread is that of training, not of the choice of rows.",
            f"Difference from {next(iter(summary[TEST]))}, paired by seed: mean and 95 % interval; * where it leaves "
            "out zero.",
            _differences(summary[TEST]),
        ]
    for data, methods in summary.items():
        if data != TEST:
            parts += [
                f"## Shifted: {data}",
                _table(methods, [*SHIFTED, *TOLD], number_of_seeds),
                "AUROC: of the uncertainty between test rows and shifted rows; 0.5 is blind, – where it has no such "
                "part.",
            ]
    if content["notes"]:
        parts += ["## Notes", "\n".join(f"- {method}: {'; '.join(said)}" for method, said in content["notes"].items())]
    return "\n\n".join([*parts, markdown_facts(content["facts"])]) + "\n"


def _table(methods: dict[str, dict[str, Any]], metrics: list[str], number_of_seeds: int) -> str:
    rows = []
    for method, figures in methods.items():
        collapsed = len(figures["collapsed"])
        warning = f" (**at chance** in {collapsed} of {number_of_seeds} seeds)" if collapsed else ""
        rows.append([method + warning, *(_cell(figures, metric) for metric in metrics)])
    return markdown_table(["method", *(_heading(metric) for metric in metrics)], rows)


def _heading(metric: str) -> str:
    return TOLD.get(metric) or f"{heading(metric)} {ARROWS[metric]}"


def _cell(figures: dict[str, Any], metric: str) -> str:
    figure = figures.get(metric)
    if figure is None or figure["mean"] is None:
        return "–"
    text = number(figure["mean"], metric)
    if figure["sd"] is not None:
        text += f" ± {number(figure['sd'], metric)}"
    return f"**{text}**" if metric in figures["best"] else text


def _differences(methods: dict[str, dict[str, Any]]) -> str:
    rows = []
    for method, figures in methods.items():
        cells = []
        for metric in METRICS:
            difference = figures[metric]["difference"]
            if difference is None or difference["mean"] is None:
                cells.append("–")
                continue
            mean, low, high = (number(difference[key], metric, signed=True) for key in ("mean", "low", "high"))
            cells.append(f"{mean} ({low} to {high}){'*' if told_apart(difference) else ''}")
        if any(cell != "–" for cell in cells):
            rows.append([method, *cells])
    return markdown_table(["method", *(_heading(metric) for metric in METRICS)], rows)


if __name__ == "__main__":
    main()
