"""A benchmark from beginning to end: plan, work, and results that are written anew whenever predictions are finished.

RESULTS/results.csv, .parquet    a row for each method, test set and seed
RESULTS/summary.csv              means, intervals, paired differences
RESULTS/README.md                the tables, with pictures beside it (*.svg); answer.md, written by hand, stands on top
RESULTS/results.tex, .html       the same tables
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalabl.study.cells import PREDICTION, finished
from scalabl.study.drawing import svg
from scalabl.study.layout import layout
from scalabl.study.pictures import pictures
from scalabl.study.plan import StudyPlan
from scalabl.study.progress import CellProgress
from scalabl.study.render import html, latex, markdown
from scalabl.study.results import csv_of, tidy, write_tables, write_whole
from scalabl.study.run import run_here, run_ray, run_workers
from scalabl.study.study import Study
from scalabl.study.summary import summarize, summary_rows


def run_benchmark(
    study: Study,
    plan: StudyPlan,
    output: Path,
    results: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    command: str,
) -> list[dict[str, Any]]:
    """Do what is left of a plan and write its results.

    Args:
        study, plan: what to do.
        output: where the cells are; studies may share it.
        results: where the results go.
        workers: processes on this machine.
        ray: address of a Ray cluster, or "local"; `workers` is then not read.
        command: as it is printed under the tables.

    Returns:
        the rows of the tidy table.

    Raises:
        UserError: no worker is left alive, or there is no such cluster.
        Interrupted, KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    results.mkdir(parents=True, exist_ok=True)
    with CellProgress(plan, output, 1 if ray else workers) as progress:

        def report() -> None:
            if any(cell.kind == PREDICTION for cell in progress()):
                write_tables(tidy(study, plan, output), results)

        if ray is not None:
            run_ray(plan, output, ray, report=report)
        elif workers > 1:
            run_workers(plan, output, workers, report=report)
        else:
            run_here(plan, output, report=report)
        report()
    rows = tidy(study, plan, output)
    write_results(study, plan, output, results, rows, command)
    return rows


def write_results(
    study: Study, plan: StudyPlan, output: Path, results: Path, rows: list[dict[str, Any]], command: str
) -> None:
    """Everything that lies in `results`, from the rows of `tidy`; each file whole or not at all."""
    write_tables(rows, results)
    if not rows:
        return
    tables = summarize(study, plan, output, rows)
    summary = summary_rows(tables)
    write_whole(results / "summary.csv", csv_of(summary, list(summary[0])))
    drawn = pictures(study, tables)
    for picture in drawn:
        write_whole(results / f"{picture.name}.svg", svg(picture))
    written = results / "answer.md"
    answer = written.read_text(encoding="utf-8") if written.is_file() else ""
    facts = facts_of(study, plan, output, rows, command)
    document = layout(study.name, study.about, facts, tables, drawn, answer=answer)
    for name, text in (
        ("README.md", markdown(document)),
        ("results.tex", latex(document)),
        ("results.html", html(document)),
    ):
        write_whole(results / name, text.encode())


def facts_of(study: Study, plan: StudyPlan, output: Path, rows: list[dict[str, Any]], command: str) -> dict[str, str]:
    """What stands above the tables: model, data, training, seeds, versions, device, command."""

    def all_of(column: str) -> str:
        return "; ".join(dict.fromkeys(str(row[column]) for row in rows))

    facts = {"model": study.model}
    for task in study.tasks:
        entries = [entry for entry in plan.entries if entry.task == task and finished(output, entry.prediction)]
        if entries:
            trained = finished(output, entries[0].training[0]) or {}
            predicted = [finished(output, entry.prediction) or {} for entry in entries]
            tuned_on = max(max(done["rows_also_tuned_on"].values()) for done in predicted)
            facts[f"data, {task}"] = (
                f"{trained['rows']['train']:,} training, {trained['rows']['validation']:,} validation rows "
                f"({trained['task']['source']}; {trained['task']['licence']}), scored by {trained['scoring']}; "
                f"test rows that are also training or validation rows: {tuned_on}"
            )
    finished_entries = sum(finished(output, entry.prediction) is not None for entry in plan.entries)
    return {
        **facts,
        "training": ", ".join(f"{name} {value}" for name, value in study.settings.items()) or "defaults",
        "particles": f"{study.samples} where a method samples",
        "seeds": ", ".join(map(str, study.seeds)),
        "finished": f"{finished_entries} of {len(plan.entries)} runs",
        "versions": all_of("versions"),
        "device": all_of("device"),
        "command": command,
    }
