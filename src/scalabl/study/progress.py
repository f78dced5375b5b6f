"""How far a benchmark is, and how long it will still take by what its finished cells took."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from scalabl.study.cells import Cell, failure, finished
from scalabl.study.plan import StudyPlan


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


class CellProgress:
    """A bar of cells on a terminal; in a log file a line for each cell that is finished.

    Args:
        plan, output: what is looked at.
        workers: how many cells at a time.
    """

    def __init__(self, plan: StudyPlan, output: Path, workers: int = 1) -> None:
        self.plan, self.output, self.workers = plan, output, workers
        self.console = Console(stderr=True)
        # a cell's own words go to its log: the bar keeps the stream that is there now
        self.console.file = self.console.file
        self._seen = {address for address in plan.cells if finished(output, address)}
        self._failed: set[str] = set()
        self._started = time.time()
        self._bar = Progress(
            TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console, transient=True, disable=not self.console.is_terminal, redirect_stderr=False,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=len(plan.cells), completed=len(self._seen))

    def __enter__(self) -> CellProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self) -> list[Cell]:
        """Look again, and give the cells that were finished since the last look."""
        new = []
        for address, cell in self.plan.cells.items():
            if address not in self._seen and finished(self.output, address):
                self._seen.add(address)
                new.append(cell)
            elif address not in self._seen | self._failed:
                failed = failure(self.output, address)
                written = cell.directory(self.output) / "failed.json"
                if failed and written.exists() and written.stat().st_mtime >= self._started:
                    self._failed.add(address)
                    self.console.print(f"[bold yellow]failed[/]: {cell.label}: {failed['error']}", highlight=False)
        if not new:
            return new
        left = time_left(self.plan, self.output, self.workers)
        words = f"about {in_words(left)} left" if left else ""
        self._bar.update(self._task, completed=len(self._seen), description=f"{words}, last: {new[-1].label}")
        if not self.console.is_terminal:
            for cell in new:
                done = finished(self.output, cell.address) or {}
                line = f"{len(self._seen)}/{len(self.plan.cells)} {cell.label}: {in_words(done.get('wall', 0))}"
                self.console.print(f"{line}; {words}".rstrip("; "), highlight=False, soft_wrap=True)
        return new
