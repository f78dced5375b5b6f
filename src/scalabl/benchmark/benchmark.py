"""A benchmark from beginning to end: plan, work, and tables that are written anew whenever predictions are finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalabl.benchmark.cells import PREDICTION, finished
from scalabl.benchmark.plan import Plan
from scalabl.benchmark.progress import CellProgress
from scalabl.benchmark.ray_cluster import run_ray
from scalabl.benchmark.render import html, latex, layout, markdown
from scalabl.benchmark.results import tidy, write_tables, write_whole
from scalabl.benchmark.run import run_here, run_workers
from scalabl.benchmark.study import Study
from scalabl.benchmark.summary import summarize


def run_benchmark(
    study: Study, plan: Plan, output: Path, *, workers: int = 1, ray: str | None = None, command: str
) -> list[dict[str, Any]]:
    """Do what is left of a plan and write its tables: results.csv, .parquet, .md, .tex and .html.

    Args:
        study, plan: what to do.
        output: the benchmark's directory.
        workers: processes on this machine.
        ray: address of a Ray cluster, or "local"; `workers` is then not read.
        command: as it is printed under the tables.

    Returns:
        the rows of the tidy table.

    Raises:
        UserError: no worker is left alive, or there is no such cluster.
        Interrupted, KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    with CellProgress(plan, output, 1 if ray else workers) as progress:

        def report() -> None:
            if any(cell.kind == PREDICTION for cell in progress()):
                write_tables(tidy(study, plan, output), output)

        if ray is not None:
            run_ray(plan, output, ray, report=report)
        elif workers > 1:
            run_workers(plan, output, workers, report=report)
        else:
            run_here(plan, output, report=report)
        report()
    rows = tidy(study, plan, output)
    write_tables(rows, output)
    if rows:
        facts = facts_of(study, plan, output, rows, command)
        document = layout(study.name, facts, summarize(study, plan, output, rows))
        for name, text in (("md", markdown(document)), ("tex", latex(document)), ("html", html(document))):
            write_whole(output / f"results.{name}", text.encode())
    return rows


def facts_of(study: Study, plan: Plan, output: Path, rows: list[dict[str, Any]], command: str) -> dict[str, str]:
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
