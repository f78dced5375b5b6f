"""A benchmark from beginning to end: work, progress, and results, written anew whenever predictions are finished.

RESULTS/results.csv, .parquet    a row for each method, test set and seed
RESULTS/summary.csv              means, intervals, paired differences
RESULTS/tried.csv, pooled.csv    where settings are tried: their NLL of validation rows; differences over all tasks;
        detection.csv            how well each score tells errors and rows out of scope
RESULTS/README.md                the tables, with pictures beside it (*.svg); answer.md, written by hand, stands on top
RESULTS/results.tex, .html       the same tables
RESULTS/finished/                what finished cells came to (`kept.py`)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from scalabl.core.console import words_console
from scalabl.core.errors import UserError
from scalabl.core.files import require_place, write_bytes, write_text
from scalabl.core.outputs import require_writable
from scalabl.runs.registry import BASELINE
from scalabl.study.cells import PREDICTION, Cell, failure, finished, is_elsewhere
from scalabl.study.detection import detection_rows, detection_tables
from scalabl.study.frontier import frontier
from scalabl.study.kept import keep, restore
from scalabl.study.look import svg
from scalabl.study.page import Section, html, latex, layout, markdown
from scalabl.study.pictures import pictures
from scalabl.study.plan import TRIED, StudyPlan
from scalabl.study.pooled import differences, pooled_rows, pooled_tables
from scalabl.study.results import SCHEMA, csv_of, tidy, write_tables
from scalabl.study.run import run_here, run_ray, run_workers
from scalabl.study.study import Study
from scalabl.study.summary import Table, summarize, summary_rows
from scalabl.study.tried import COLUMNS, trials, tried_rows, tried_tables

_PAGES = {"README.md": markdown, "results.tex": latex, "results.html": html}
_WRITTEN = ("results.csv", "results.parquet", "summary.csv", TRIED, "pooled.csv", "detection.csv", *_PAGES)


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
        UserError: `results` holds files that are not a study's, or nothing can be written; no worker is left alive, or
            there is no such cluster.
        Interrupted, KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    require_place(output / "cells")  # first, since the results may lie in it
    open_results(results)
    take_up(output, results)
    with CellProgress(plan, output, 1 if ray else workers) as progress:

        def report() -> None:
            if any(cell.kind == PREDICTION for cell in progress()):
                write_tables(tidy(study, progress.plan, output), results)
                keep(progress.plan, output, results)

        if ray is not None:
            run_ray(plan, output, ray, report=report)
        elif workers > 1:
            run_workers(plan, output, workers, report=report)
        else:
            run_here(plan, output, report=report)
        report()
    plan = plan.renewed(output)
    rows = tidy(study, plan, output)
    write_results(study, plan, output, results, rows, command)
    return rows


def take_up(output: Path, results: Path) -> None:
    """Make the place of the cells, with those in it that the results keep from another machine.

    Raises:
        UserError: it cannot be written.
    """
    _make(output / "cells", "output")
    restore(output, results)


def open_results(directory: Path) -> None:
    """Make a study's directory of results; one whose files of these names are not a study's, by the table that every
    study begins with, is refused.

    Raises:
        UserError: another's file would be overwritten, the directory cannot be written, or its answer is no text.
    """
    _make(directory, "results")
    answer_in(directory)
    table, header = directory / "results.csv", ",".join(SCHEMA.names[:4])
    if table.is_file():
        with table.open(encoding="utf-8", errors="replace") as lines:
            if lines.readline().startswith(f"{header},"):
                return
    foreign = next((name for name in _WRITTEN if (directory / name).exists()), None)
    if foreign is not None:
        raise UserError(f"{directory / foreign} is not of a study, and would be overwritten; choose another --results.")


def answer_in(results: Path) -> str:
    """What a person has written on top of a study's page, in `answer.md`; nothing where there is none.

    Raises:
        UserError: it is no UTF-8.
    """
    path = results / "answer.md"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from None


def _make(directory: Path, option: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); choose another --{option}.") from error
    require_writable(directory / "results.csv")


def write_results(
    study: Study, plan: StudyPlan, output: Path, results: Path, rows: list[dict[str, Any]], command: str
) -> None:
    """Everything that lies in `results`, from the rows of `tidy`; each file whole or not at all.

    Raises:
        UserError: as `open_results`.
    """
    open_results(results)
    write_tables(rows, results)
    keep(plan, output, results)
    found = trials(plan, output)
    if not rows and not found:
        return
    tables = summarize(study, plan, output, rows)
    if summary := summary_rows(tables):
        write_text(results / "summary.csv", csv_of(summary, list(summary[0])))
    drawn, overall, tried = pictures(study, tables), _overall(study, plan, output, results, tables), []
    if found:
        write_text(results / TRIED, csv_of(tried_rows(found, study.seeds[0]), COLUMNS))
        tried = [Section("Settings that were tried", [], tried_tables(found))]
    for picture in [*drawn, *(picture for section in overall for picture in section.pictures)]:
        write_bytes(results / f"{picture.name}.svg", svg(picture))
    facts = facts_of(study, plan, output, rows, command)
    document = layout(
        study.name, study.about, facts, tables, drawn, answer=answer_in(results), first=overall, last=tried
    )
    for name, render in _PAGES.items():
        write_text(results / name, render(document))


def _overall(study: Study, plan: StudyPlan, output: Path, results: Path, tables: Sequence[Table]) -> list[Section]:
    """Of a study on which settings were tried: every method against plain LoRA over all tasks, and NLL against cost."""
    baseline = next((variant for variant in study.variants if variant.method == BASELINE and variant.chooses), None)
    if baseline is None:
        return []
    found = differences(study, plan, output, baseline.name)
    if not found:
        return []
    lines = pooled_rows(found)
    write_text(results / "pooled.csv", csv_of(lines, list(lines[0])))
    picture, told = frontier(tables, baseline.name), detection_rows(plan, output)
    write_text(results / "detection.csv", csv_of(told, list(told[0])))
    grids = [*pooled_tables(found), *detection_tables(told)]
    return [Section("Over all tasks", [picture] if picture else [], grids)]


def facts_of(study: Study, plan: StudyPlan, output: Path, rows: list[dict[str, Any]], command: str) -> dict[str, str]:
    """What stands below the tables: model, data, training, seeds, versions, device, command."""
    facts = {"model": study.model}
    predicted = [(entry, done) for entry in plan.entries if (done := finished(output, entry.prediction)) is not None]
    for task in study.tasks:
        of_task = [(entry, done) for entry, done in predicted if entry.task == task]
        if not of_task:
            continue
        trained = finished(output, of_task[0][0].training[0])
        if trained is None:  # damaged since
            facts[f"data, {task}"] = "what it was trained on is not on record"
            continue
        leaked = max(max(done["rows_also_tuned_on"].values(), default=0) for _, done in of_task)
        facts[f"data, {task}"] = (
            f"{trained['rows']['train']:,} training, {trained['rows']['validation']:,} validation rows "
            f"({trained['task']['source']}; {trained['task']['licence']}), scored by {trained['scoring']}; "
            f"test rows that are also training or validation rows: {leaked}"
        )
    # of results that an earlier call wrote their own, of settings that were tried alone those of their cells
    machines = rows or [done for a in plan.attempts if (done := finished(output, a.prediction)) is not None]
    return facts | {
        "training": ", ".join(f"{name} {value}" for name, value in study.settings.items()) or "defaults",
        "particles": f"{study.samples} where a method samples",
        "seeds": ", ".join(map(str, study.seeds)),
        "finished": _finished(study, plan, output, len(predicted)),
        **{name: "; ".join(dict.fromkeys(str(made[name]) for made in machines)) for name in ("versions", "device")},
        "command": command,
    }


def _finished(study: Study, plan: StudyPlan, output: Path, done: int) -> str:
    """Of all runs that the recipe has, those that wait for a choice too; and of the settings tried."""
    every = sum(len(study.runs_on(variant, task)) for variant in study.variants for task in study.tasks)
    tried = sum(plan.figures(output, attempt) is not None for attempt in plan.attempts)
    return f"{done} of {every} runs" + (f", {tried} of {len(plan.attempts)} settings tried" if plan.attempts else "")


def time_left(plan: StudyPlan, output: Path, workers: int = 1) -> float | None:
    """Seconds that the open cells will take: each as long as finished ones of its kind and method, or of its kind, or
    of any; None before the first is finished."""
    taken: dict[tuple[str, ...], list[float]] = defaultdict(list)
    left: list[Cell] = []
    for address, cell in plan.cells.items():
        done = finished(output, address)
        if done is None:
            left.append(cell)
        else:
            for key in _keys(cell):
                taken[key].append(done["wall"])
    if not taken and left:
        return None
    return sum(next(mean(taken[key]) for key in _keys(cell) if key in taken) for cell in left) / workers


def _keys(cell: Cell) -> list[tuple[str, ...]]:
    method = cell.settings["recipe"]["method"] if "recipe" in cell.settings else cell.settings["method"]
    return [(cell.kind, method), (cell.kind,), ()]


def in_words(seconds: float) -> str:
    """About how long: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class CellProgress(Progress):
    """A bar of cells on a terminal; in a log file a line for each cell that is finished.

    Args:
        plan, output: what is looked at.
        workers: how many cells at a time.
    """

    def __init__(self, plan: StudyPlan, output: Path, workers: int = 1) -> None:
        self.plan, self.output, self.workers = plan, output, workers
        console = words_console(stderr=True)
        # a cell's own words go to its log: the bar keeps the stream that is there now
        console.file = console.file
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        super().__init__(
            TextColumn("cells"), *columns,
            console=console, transient=True, disable=not console.is_terminal, redirect_stderr=False,
        )  # fmt: skip
        known = {address: done for address in plan.cells if (done := finished(output, address))}
        self._seen = set(known)
        self._elsewhere = {address for address, done in known.items() if is_elsewhere(done)}
        self._failed: set[str] = set()
        self._started = time.time()
        self._bar = self.add_task("", total=len(plan.cells), completed=len(self._seen))

    def stop(self) -> None:
        """In a log nothing was begun: older Rich would put an empty line there."""
        if not self.disable:
            super().stop()

    def _done_again(self, address: str) -> bool:
        """Whether a cell of another machine was finished here since the last look: an open one needed what it made."""
        if address not in self._elsewhere:
            return False
        written = self.plan.cells[address].directory(self.output) / "finished.json"
        if not written.is_file() or written.stat().st_mtime < self._started:  # hundreds of them: not read at every look
            return False
        if is_elsewhere(finished(self.output, address)):
            return False
        self._elsewhere.discard(address)
        return True

    def __call__(self) -> list[Cell]:
        """Look again, and give the cells that were finished since the last look."""
        new = []
        self.plan = self.plan.renewed(self.output)
        begun = {path.name for path in (self.output / "cells").iterdir()}  # the others need no look each
        for address, cell in self.plan.cells.items():
            if address not in begun or (address in self._seen and not self._done_again(address)):
                continue
            if finished(self.output, address):
                self._seen.add(address)
                new.append(cell)
            elif address not in self._failed:
                failed = failure(self.output, address)
                written = cell.directory(self.output) / "failed.json"
                if failed and written.exists() and written.stat().st_mtime >= self._started:
                    self._failed.add(address)
                    self.console.print(Text.assemble(("failed", "bold yellow"), f": {cell.label}: {failed['error']}"))
        if not new:
            return new
        left = time_left(self.plan, self.output, self.workers)
        words = f"about {in_words(left)} left" if left else ""
        last = f"{words}, last: {new[-1].label}"
        self.update(self._bar, total=len(self.plan.cells), completed=len(self._seen), description=last)
        if not self.console.is_terminal:
            for cell in new:
                done = finished(self.output, cell.address) or {}
                line = f"{len(self._seen)}/{len(self.plan.cells)} {cell.label}: {in_words(done.get('wall', 0))}"
                self.console.print(f"{line}; {words}".rstrip("; "), highlight=False, soft_wrap=True)
        return new
