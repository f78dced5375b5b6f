"""A demo's table over several seeds: plain LoRA, ScalaBL and others at the same budget.

    python benchmarks/demo_seeds.py
    python benchmarks/demo_seeds.py --task arc-easy --seeds 0 1 2 --name demo_arc_easy

A seed changes initialisation, order of rows and draws, while training and test rows stay the same: two methods are
compared seed by seed. Intervals are Student's. Resumable: runs that are finished are not trained again, and a seed
whose figures are known is not predicted again. Needs the development environment (make dev).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

from scalabl.core.files import ADAPTER, sha256, write_text
from scalabl.inference.report.lead import as_file, lead_pictures
from scalabl.inference.report.table import ARROWS, heading, number
from scalabl.inference.report.table import table as figures_of
from scalabl.metrics import METRICS
from scalabl.study.demo import run_demo
from scalabl.study.demos import DEMOS, ROUTING, SAMPLES, demo_settings

TEST = "test"
SHIFTED = ("accuracy", "nll", "ece")
TITLES = {"auroc_total": "AUROC, total ↑", "auroc_epistemic": "AUROC, epistemic ↑"}
HIGHER = METRICS | dict.fromkeys(TITLES, True)  # metric -> whether higher is better
Rows = Sequence[dict[str, Any]]  # of one seed, as the report's table gives them
Methods = dict[str, dict[str, Any]]  # method -> its figures over seeds


def of_seed(directory: Path, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The facts and figures of one seed, kept in `directory` together with what they were made from."""

    def made_from() -> list[Any]:
        task = settings["task"]
        recipes = [
            demo_settings(task, name, seed=seed, steps=settings["steps"]).as_dict() for name in DEMOS[task].methods
        ]
        # figures are those of these very adapters
        adapters = {path.parent.name: sha256(path) for path in sorted(directory.glob(f"*/{ADAPTER}"))}
        return [recipes, settings, DEMOS[task].shifted_rows, adapters]

    def make() -> dict[str, Any]:
        report = run_demo(directory, seed=seed, **settings)
        methods = figures_of(report)
        write_text(directory / "lead.svg", as_file(lead_pictures(report, methods)))
        return {"facts": report.facts, "methods": methods}

    directory.mkdir(parents=True, exist_ok=True)
    return harness.kept(directory / "figures.json", made_from, make)


def summarize(tables: Mapping[int, Rows]) -> dict[str, dict[str, dict[str, Any]]]:
    """Data set ("test" or a shifted one) -> method -> its figures over seeds.

    A method's figures: "collapsed" (the seeds at which it is at chance), "best" (metrics), and for every metric
    {values, mean, sd, low, high, difference}: sd and interval of the mean are None with one seed, `difference` is
    {mean, low, high} of this method minus the reference, the first with a temperature; None in the reference.

    Raises:
        ValueError: the seeds' tables have other methods.
    """
    names = {seed: [row["method"] for row in table] for seed, table in tables.items()}
    if len({tuple(of_seed) for of_seed in names.values()}) != 1:
        raise ValueError(f"the seeds have other methods: {names}")
    shifted = list(dict.fromkeys(name for table in tables.values() for row in table for name in row["ood"]))
    return {data: _of_data(tables, data) for data in (TEST, *shifted)}


def _of_data(tables: Mapping[int, Rows], data: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    rows = next(iter(tables.values()))
    reference = _reference([row["method"] for row in rows])
    values = [_values(tables, position, data) for position in range(len(rows))]
    compared = next(own for row, own in zip(rows, values, strict=True) if row["method"] == reference)
    for position, row in enumerate(rows):
        by_seed = {seed: _figures(table[position], data) for seed, table in tables.items()}
        collapsed = [seed for seed, figures in by_seed.items() if figures.get("collapsed")]
        found[row["method"]] = {"collapsed": collapsed, "best": []} | {
            metric: {
                "values": own,
                **harness.mean_with_interval(own),
                "difference": None
                if row["method"] == reference
                else harness.mean_with_interval(_minus(own, compared[metric])),
            }
            for metric, own in values[position].items()
        }
    _mark_best(found)
    return found


def _reference(methods: Sequence[str]) -> str:
    """What the others are compared with: the first method with a temperature, where it has one, as all can have."""
    first, *others = methods
    return next((name for name in others if name in (f"{first}, calibrated", f"{first} + T")), first)


def _values(tables: Mapping[int, Rows], position: int, data: str) -> dict[str, list[float | None]]:
    """Metric -> the values of a method over seeds, of the metrics that it has with every seed."""
    by_seed = [_figures(table[position], data) for table in tables.values()]
    metrics = [metric for metric in HIGHER if all(metric in figures for figures in by_seed)]
    return {metric: [figures[metric]["value"] for figures in by_seed] for metric in metrics}


def _figures(row: dict[str, Any], data: str) -> dict[str, Any]:
    figures: dict[str, Any] = row if data == TEST else row["ood"].get(data, {})
    return figures


def _minus(values: Sequence[float | None], others: Sequence[float | None]) -> list[float | None]:
    pairs = zip(values, others, strict=True)
    return [None if value is None or other is None else value - other for value, other in pairs]


def _mark_best(methods: dict[str, dict[str, Any]]) -> None:
    """Enter in "best" the metrics in which a method is best, or not told apart from the best.

    Only where the paired interval tells at least one method apart from the best: where it does not, there is no best.
    A method at chance with any seed stands aside.
    """
    for metric, higher in HIGHER.items():
        standing = {
            name: figures[metric]
            for name, figures in methods.items()
            if not figures["collapsed"] and metric in figures and figures[metric]["sd"] is not None
        }
        if len(standing) < 2:
            continue
        best = max(standing, key=lambda name: (1 if higher else -1) * standing[name]["mean"])
        tied = [
            name
            for name, figure in standing.items()
            if not _apart(harness.mean_with_interval(_minus(figure["values"], standing[best]["values"])))
        ]
        if len(tied) < len(standing):
            for name in tied:
                methods[name]["best"].append(metric)


def _apart(difference: Mapping[str, float | None]) -> bool:
    return harness.excludes_zero(difference["low"], difference["high"])


def main() -> None:
    """Run what is missing, and write NAME.json, NAME.md and NAME.csv."""
    parser = harness.options(
        __doc__,
        task=(ROUTING, "which demo", tuple(DEMOS)),
        seeds=[0, 1, 2, 3, 4],
        steps=(0, "of each method; 0 for the demo's own"),
        test_rows=(0, "likewise"),
        samples=SAMPLES,
        runs=(harness.ROOT / "runs" / "demo-seeds", "where the runs go"),
        output=(harness.RESULTS, "directory of the results"),
        name=("demo", "of the files there"),
    )
    a = parser.parse_args()
    own = DEMOS[a.task]
    settings = {
        "task": a.task, "steps": a.steps or own.steps, "test_rows": a.test_rows or own.test_rows, "samples": a.samples,
    }  # fmt: skip
    seeds = {seed: of_seed(a.runs / f"seed{seed}", seed, settings) for seed in a.seeds}
    summary = summarize({seed: made["methods"] for seed, made in seeds.items()})
    content = {
        "facts": _facts(seeds),
        "summary": summary,
        "notes": _notes(seeds),
        "seeds": {str(seed): made for seed, made in seeds.items()},
    }
    harness.write_results(a.output, a.name, content, markdown(content), csv_of(summary, a.seeds))
    first = a.runs / f"seed{a.seeds[0]}" / "lead.svg"
    if first.exists():
        write_text(a.output / f"{a.name}.svg", first.read_text(encoding="utf-8"))


def _facts(seeds: dict[int, dict[str, Any]]) -> dict[str, str]:
    """The facts that all seeds share, and this command's own."""
    first, *others = (made["facts"] for made in seeds.values())
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    shared = {key: value for key, value in shared.items() if key not in ("seed", "command", "versions", "device")}
    return harness.facts(**shared, seeds=", ".join(map(str, seeds)))


def _notes(seeds: dict[int, dict[str, Any]]) -> dict[str, list[str]]:
    """Method -> its notes, with the seeds that have them in front where these are not all; once where several methods
    share them."""
    found: dict[str, dict[str, list[int]]] = {}
    for seed, made in seeds.items():
        for row in made["methods"]:
            for note in row["notes"]:
                found.setdefault(row["method"], {}).setdefault(note, []).append(seed)
    notes: dict[str, list[str]] = {}
    told: set[tuple[str, tuple[int, ...]]] = set()
    for method, own in found.items():
        for note, having in own.items():
            if (note, tuple(having)) not in told:
                told.add((note, tuple(having)))
                which = "" if len(having) == len(seeds) else f"seed {', '.join(map(str, having))}: "
                notes.setdefault(method, []).append(f"{which}{note}")
    return notes


def csv_of(summary: dict[str, Methods], seeds: Sequence[int]) -> str:
    """One line a data set, method and metric."""
    rows = []
    for data, methods in summary.items():
        for method, figures in methods.items():
            for metric in (name for name in HIGHER if name in figures):
                figure = figures[metric]
                difference = figure["difference"] or {}
                row: dict[str, Any] = {"data": data, "method": method, "metric": metric}
                row |= {key: figure[key] for key in ("mean", "sd", "low", "high")}
                row |= {f"minus_reference_{end}": difference.get(end) for end in ("mean", "low", "high")}
                row |= {"best": int(metric in figures["best"])}
                row |= {"collapsed_seeds": " ".join(map(str, figures["collapsed"]))}
                rows.append(row | {f"seed_{seed}": v for seed, v in zip(seeds, figure["values"], strict=True)})
    return harness.as_csv(rows)


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    summary, number_of_seeds = content["summary"], len(content["seeds"])
    parts = ["# The demo over seeds", _table(summary[TEST], list(METRICS), number_of_seeds)]
    if number_of_seeds > 1:
        rows = [{"method": method, **of} for method, of in summary[TEST].items()]
        columns = [(_heading(m), lambda row, m=m: _difference(row[m]["difference"], m)) for m in METRICS]
        others = [row for row in rows if any(row[m]["difference"] for m in METRICS)]
        parts += [
            "Mean ± standard deviation over seeds. Bold: the best mean, and those whose paired difference from it over "
            "seeds has a 95 % interval (Student's) with zero in it; nothing is bold where that holds for all. Seeds "
            "share their training and test rows: the spread is that of training, not of the choice of rows.",
            f"Difference from {_reference(list(summary[TEST]))}, paired by seed: mean and 95 % interval; * where it "
            "leaves out zero.",
            harness.table(others, ("method", "{method}"), *columns),
        ]
    for data, methods in summary.items():
        if data != TEST:
            parts += [
                f"## Shifted: {data}",
                _table(methods, [*SHIFTED, *TITLES], number_of_seeds),
                "AUROC: of the uncertainty between test rows and shifted rows; 0.5 is blind, – where it has no such "
                "part.",
            ]
    if content["notes"]:
        parts += ["## Notes", "\n".join(f"- {method}: {'; '.join(own)}" for method, own in content["notes"].items())]
    return "\n\n".join([*parts, harness.markdown_facts(content["facts"])]) + "\n"


def _table(methods: Methods, metrics: list[str], number_of_seeds: int) -> str:
    def name(row: dict[str, Any]) -> str:
        at_chance = f" (**at chance** in {len(row['collapsed'])} of {number_of_seeds} seeds)"
        return row["method"] + (at_chance if row["collapsed"] else "")

    columns = [(_heading(metric), lambda row, metric=metric: _cell(row, metric)) for metric in metrics]
    return harness.table([{"method": method, **of} for method, of in methods.items()], ("method", name), *columns)


def _heading(metric: str) -> str:
    return TITLES.get(metric) or f"{heading(metric)} {ARROWS[metric]}"


def _cell(figures: dict[str, Any], metric: str) -> str:
    figure = figures.get(metric)
    if figure is None or figure["mean"] is None:
        return "–"
    text = number(figure["mean"], metric)
    if figure["sd"] is not None:
        text += f" ± {number(figure['sd'], metric)}"
    return f"**{text}**" if metric in figures["best"] else text


def _difference(difference: dict[str, Any] | None, metric: str) -> str:
    if difference is None or difference["mean"] is None:
        return "–"
    mean, low, high = (number(difference[key], metric, signed=True) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high}){'*' if _apart(difference) else ''}"


if __name__ == "__main__":
    main()
