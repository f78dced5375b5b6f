"""What is about benchmarks: `scalabl benchmark`, `scalabl demo` and `scalabl data`.

`benchmark`: methods x tasks x seeds from a recipe, resumable cell by cell. `demo`: methods at the same budget, on a
real model and real rows. `data`: which benchmarks there are, and fetching them.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.cli import options
from scalabl.cli.app import app, data, fail
from scalabl.core.console import quiet, say, words_console
from scalabl.core.errors import UserError
from scalabl.core.files import write_json
from scalabl.core.outputs import require_writable
from scalabl.study.demos import LANGUAGE, ROUTING, SAMPLES, check_demo

if TYPE_CHECKING:
    from scalabl.study.plan import StudyPlan
    from scalabl.study.study import Study


@app.command()
def benchmark(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="Model, tasks, methods, seeds, settings.")],
    output: Annotated[Path, typer.Option(help="Cells, which studies may share; the same command resumes them.")] = Path(
        "runs/benchmark"
    ),
    results: Annotated[
        Path | None, typer.Option(help="Tables and pictures; as the recipe says, or else OUTPUT/NAME.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Use a Ray cluster that shares the output: its address, or local."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and what is finished.")] = False,
    tables_only: Annotated[
        bool, typer.Option("--tables-only", help="Do no cell; write the tables of those that are finished.")
    ] = False,
) -> None:
    """Compare methods: train, predict, and write tables with intervals and paired comparisons."""
    from scalabl.serving.ray_address import require_ray
    from scalabl.study.plan import make_plan
    from scalabl.study.study import read_study

    options.require_counts(workers=workers)
    if ray is not None:
        require_ray()
    study = read_study(recipe)
    results = results or study.results or output / study.name
    plan = make_plan(study, output, results)
    if dry_run:
        _list(plan, output, results)
        return
    command = shlex.join(["scalabl", "benchmark", str(recipe)])
    if tables_only:
        _tables(study, plan, output, results, command)
        return
    _run(study, plan, output, results, workers, ray, command)


def _run(
    study: Study, plan: StudyPlan, output: Path, results: Path, workers: int, ray: str | None, command: str
) -> None:

    from scalabl.study.benchmark import run_benchmark
    from scalabl.study.run import failures, open_cells

    quiet()
    rows = run_benchmark(study, plan, output, results, workers=workers, ray=ray, command=command)
    words_console().print(
        f"{len(rows):,} rows in {results}/results.csv; tables and pictures in README.md and results.html",
        soft_wrap=True,
    )
    plan = plan.renewed(output)
    failed = failures(plan, output)
    if failed:
        first, why = next(iter(failed.items()))
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        fail(f"Not done: {first}{more}: {why} The rest is in the tables; run the same command again to retry.", code=1)
    left = len(open_cells(plan, output, ""))
    if left:
        fail(f"{left} cells are not done; another call may hold them. Run the same command again.", code=1)


def _tables(study: Study, plan: StudyPlan, output: Path, results: Path, command: str) -> None:
    from scalabl.study.benchmark import take_up, write_results
    from scalabl.study.kept import kept
    from scalabl.study.results import tidy
    from scalabl.study.tried import trials

    if next(kept(results), None) is not None:
        take_up(output, results)
    rows = tidy(study, plan, output)
    if not rows and not trials(plan, output):
        raise UserError(f"No prediction of this study is finished in {output}; run it without --tables-only first.")
    write_results(study, plan, output, results, rows, command)
    say(f"{len(rows):,} rows in {results}/results.csv; tables and pictures in README.md and results.html")


def _list(plan: StudyPlan, output: Path, results: Path) -> None:
    from scalabl.study.cells import finished
    from scalabl.study.kept import kept

    elsewhere = {address for _, cells in kept(results) for address in cells}
    done = {address: address in elsewhere or finished(output, address) is not None for address in plan.cells}
    for address, cell in plan.cells.items():
        say(f"{address}  {'finished' if done[address] else 'to do':8}  {cell.label}")
    say(f"{sum(done.values())} of {len(done)} cells are finished.")


@app.command()
def demo(
    task: Annotated[
        str, typer.Option(help=f"{ROUTING}: an encoder routes questions; {LANGUAGE}: a language model answers them.")
    ] = ROUTING,
    output: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/demo"),
    report: Annotated[Path, typer.Option(help="The HTML report.")] = Path("report.html"),
    seed: Annotated[int, typer.Option(help="Of all runs.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of each; as the demo has them.")] = None,
    test_rows: Annotated[int | None, typer.Option(help="Test rows; as the demo has them.")] = None,
    samples: Annotated[int, typer.Option(help="Particles.")] = SAMPLES,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
) -> None:
    """Train plain LoRA, baselines and ScalaBL at one budget, compare them in and out of scope; writes report.html."""
    check_demo(task, output, steps=steps, test_rows=test_rows, samples=samples)
    require_writable(report, json, reads=(output,))

    from rich.text import Text

    from scalabl.inference.report.render import write
    from scalabl.inference.report.table import print_table, table
    from scalabl.study.demo import run_demo

    quiet()
    # each has the model in memory
    workers = min(4, os.cpu_count() or 1)
    made = run_demo(output, task=task, seed=seed, steps=steps, test_rows=test_rows, samples=samples, workers=workers)
    figures = table(made)
    write(made, report)
    if json is not None:
        write_json(json, {"facts": made.facts, "methods": figures})
    console = words_console()
    for name, text in made.facts.items():
        console.print(Text.assemble((f"{name}:", "dim"), f" {text}"))
    print_table(figures, console)
    console.print(f"report: {report.resolve()}", highlight=False)


@data.command("list")
def list_benchmarks() -> None:
    """The benchmarks that are known by name."""
    from scalabl.data.registry import BENCHMARKS, OPEN_BENCHMARKS

    for name in (*BENCHMARKS, *OPEN_BENCHMARKS):
        say(name)


@data.command("get")
def get_benchmarks(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Benchmarks; see scalabl data list.")],
) -> None:
    """Fetch benchmarks once, so that they load at once and without a network."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from scalabl.data.load import get

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        console=words_console(stderr=True),
        transient=True,
    ) as progress:
        bar = progress.add_task("", total=None)
        tasks = get(
            names,
            progress=lambda what, done, total: progress.update(
                bar, description=what, completed=done, total=total or None
            ),
        )
    for task in tasks:
        splits = ", ".join(f"{len(rows):,} {name}" for name, rows in task.splits.items())
        say(f"{task.name}: {splits} ({task.source}; {task.licence})")
