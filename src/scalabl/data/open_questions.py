"""Open questions: a question and every answer that counts as right, ``{"question", "answers"}`` as JSONL.

Prompts to answer are ``{"prompt"}``, taken as it is, or ``{"question"}``, put as an open question.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import Splits
from scalabl.data.fields import require_keys, row_id, text_of, unstripped_text
from scalabl.data.records import Ids, name_of, rows_in, split_files
from scalabl.data.text_rows import TextRow, TextTask


@dataclass(frozen=True, slots=True)
class OpenQuestion:
    """A question that is answered in words.

    Attributes:
        id: name of the row, unique within a split.
        question: its text.
        answers: at least one; each counts as right, the first is the one that is trained on.
    """

    id: str
    question: str
    answers: tuple[str, ...]

    @property
    def content(self) -> tuple[Any, ...]:
        """The row's text, without its name and its answers."""
        return (self.question,)

    @property
    def prompt(self) -> str:
        """What a model is given; with a chat template, the user's turn."""
        return f"Question: {self.question}\nAnswer:"

    def as_text(self) -> TextRow:
        """The row to train on: the prompt, and the first answer behind a space."""
        return TextRow(self.id, self.prompt, f" {self.answers[0]}")


class OpenTask(Splits[OpenQuestion]):
    """Open questions of one data set."""

    def as_text(self) -> TextTask:
        """Its questions as rows to train on."""
        splits = {split: tuple(row.as_text() for row in rows) for split, rows in self.splits.items()}
        return TextTask(self.name, splits, None, self.source, self.licence)


def open_question(raw: Mapping[str, Any], where: str, name: str) -> OpenQuestion:
    """The row of a JSON object.

    Args:
        raw: ``{"question", "answers"}``, perhaps with an ``"id"``.
        where: how a message names the row.
        name: the row's id if it has none of its own.

    Raises:
        UserError: missing or unknown keys, a blank text, no answer.
    """
    require_keys(raw, ("question", "answers"), where)
    answers = raw["answers"]
    if not isinstance(answers, list) or not answers:
        raise UserError(f'{where}: "answers" is not a list of texts; write ["first", "another spelling"].')
    texts = [unstripped_text(answer, f"answer {i}", where) for i, answer in enumerate(answers)]
    return OpenQuestion(row_id(raw, where, name), text_of(raw, "question", where), distinct(texts))


def distinct(answers: Iterable[str]) -> tuple[str, ...]:
    """Answers without surrounding blanks, each once, in their order."""
    return tuple(dict.fromkeys(stripped for answer in answers if (stripped := answer.strip())))


def load_open_questions(path: str | Path) -> tuple[OpenQuestion, ...]:
    """Read one JSONL or Parquet file.

    Raises:
        UserError: see :func:`load_open_jsonl`.
    """
    rows: list[OpenQuestion] = []
    ids = Ids()
    for where, name, raw in rows_in(Path(path)):
        rows.append(open_question(raw, where, name))
        ids.add(rows[-1].id, where)
    return tuple(rows)


def load_open_jsonl(path: str | Path) -> OpenTask:
    """A user's open questions: one file, whose rows are the ``"train"`` split, or a directory of them.

    Raises:
        UserError: missing or empty data, a line that is not a JSON object, missing or unknown keys, a blank text, a
            row without an answer.
    """
    path = Path(path)
    splits = {split: load_open_questions(file) for split, file in split_files(path).items()}
    return OpenTask(name_of(path), splits, None, str(path), "unknown")


def load_prompts(path: str | Path) -> list[str]:
    """The prompts, in the file's order; what else a row holds is read over.

    Raises:
        UserError: the file cannot be read, or a row has neither key, both, or a blank text.
    """
    prompts = []
    for where, _, raw in rows_in(Path(path)):
        if ("prompt" in raw) == ("question" in raw):
            raise UserError(f'{where}: a row needs "prompt" or "question", one of the two.')
        key = "prompt" if "prompt" in raw else "question"
        text = unstripped_text(raw[key], f'"{key}"', where)
        prompts.append(text if key == "prompt" else OpenQuestion("", text.strip(), ("",)).prompt)
    return prompts
