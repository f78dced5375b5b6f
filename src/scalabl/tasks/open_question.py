"""Open questions: a question and every answer that counts as right, ``{"question", "answers"}`` as JSONL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.errors import UserError
from scalabl.tasks.jsonl import name_of, read_fields, split_files
from scalabl.tasks.jsonl_fields import Ids, row_id, text_of, unstripped_text
from scalabl.tasks.task import Splits
from scalabl.tasks.text_rows import TextRow, TextTask

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
