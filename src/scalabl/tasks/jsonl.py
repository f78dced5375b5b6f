"""The user's own rows as JSONL: ``{"question", "choices", "answer"}`` or ``{"text", "label"}``.

Either kind may carry an ``"id"``; without one the row is called ``stem:line``. One file holds one kind.
A ``"score"``, which ``scalabl acquire`` adds, is read over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.errors import UserError
from scalabl.tasks.example import Example, check, first_duplicate
from scalabl.tasks.json_lines import read_objects
from scalabl.tasks.jsonl_fields import answer_index, check_keys, choices_of, is_text_row, label_of, text_of
from scalabl.tasks.task import Task

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class _Row:
    """A parsed line whose label, if it is a text row, still waits for the file's label set."""

    where: str
    id: str
    question: str
    choices: tuple[str, ...] | None  # None: a text row
    answer: int | None
    label: str | None


def load_rows(
    path: str | Path, labels: Sequence[str] | None = None, require_answer: bool = True
) -> tuple[Example, ...]:
    """Read one JSONL file.

    Args:
        path: a ``.jsonl`` file.
        labels: the class words of text rows, in the order of their indices; without them the sorted distinct
            labels of the file.
        require_answer: ``False`` for prediction rows, which may leave out ``answer`` or ``label``.

    Raises:
        UserError: see :func:`load_jsonl_task`; also text rows without labels of their own when none are given.
    """
    rows = _parse_file(Path(path), require_answer)
    return _finish(rows, _label_set(rows, labels, Path(path)))


def load_jsonl_task(path: str | Path) -> Task:
    """Read a user's data as a task.

    ``path`` is a directory with ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (those that exist), or one
    file, whose rows become the ``"train"`` split; :func:`scalabl.tasks.holdout` splits a seeded validation part
    off it. The labels of text rows are the sorted distinct words of the train split (of all splits where there
    is no train split).

    Raises:
        UserError: missing or empty data, a line that is not a JSON object, missing or unknown keys, a row
            without an answer or with an answer outside its choices, fewer than two choices or labels, duplicate
            choices, labels or ids, a label that the train split does not have.
    """
    path = Path(path)
    files = _split_files(path)
    parsed = {split: _parse_file(file, require_answer=True) for split, file in files.items()}
    kinds = {split: rows[0].choices is None for split, rows in parsed.items()}
    if len(set(kinds.values())) > 1:
        raise UserError(f'{path} mixes {{"text", "label"}} and {{"question", ...}} splits; keep to one kind of row.')
    reference = parsed.get("train") or [row for rows in parsed.values() for row in rows]
    labels = _label_set(reference, None, files.get("train", path))
    splits = {split: _finish(rows, labels) for split, rows in parsed.items()}
    name = path.resolve().name if path.is_dir() else path.stem
    return Task(name=name, splits=splits, labels=labels, source=str(path), licence="unknown")


def _split_files(path: Path) -> dict[str, Path]:
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .jsonl file or a directory that holds train.jsonl.")
    if not path.is_dir():
        return {"train": path}
    files = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").exists()}
    if not files:
        raise UserError(f"{path} holds none of train.jsonl, validation.jsonl, test.jsonl; name your files so.")
    return files


def _parse_file(path: Path, require_answer: bool) -> list[_Row]:
    rows: list[_Row] = []
    seen: dict[str, str] = {}
    for number, (where, raw) in enumerate(read_objects(path)):
        row = _parse_row(raw, where, f"{path.stem}:{where.rpartition(':')[2]}", require_answer)
        if row.id in seen:
            raise UserError(f"{where}: the id {row.id!r} is also that of {seen[row.id]}; give every row its own.")
        if number and (row.choices is None) != (rows[0].choices is None):
            raise UserError(f"{where}: text rows and question rows in one file; keep to one kind of row.")
        seen[row.id] = where
        rows.append(row)
    return rows


def _parse_row(raw: dict[str, Any], where: str, name: str, require_answer: bool) -> _Row:
    text_row = is_text_row(raw, where)
    check_keys(raw, where, text_row, require_answer)
    if "id" in raw:
        # a whole number is a fair id; everything else has to be a text
        name = str(raw["id"]) if type(raw["id"]) is int else text_of(raw, "id", where)
    if text_row:
        label = label_of(raw, where) if "label" in raw else None
        return _Row(where, name, text_of(raw, "text", where), None, None, label)
    choices = choices_of(raw, where)
    question = text_of(raw, "question", where)
    check(Example(name, question, choices, None), where)
    answer = answer_index(raw["answer"], choices, where) if "answer" in raw else None
    return _Row(where, name, question, choices, answer, None)


def _label_set(rows: Iterable[_Row], given: Sequence[str] | None, path: Path) -> tuple[str, ...] | None:
    rows = list(rows)
    if rows[0].choices is not None:
        return None
    labels = tuple(given) if given is not None else tuple(sorted({row.label for row in rows if row.label}))
    if not labels:
        raise UserError(f"{path}: rows without a label and no labels given; say which labels there are.")
    if len(labels) < 2:
        raise UserError(f"{path}: only one label, {labels[0]!r}; a classifier needs at least two.")
    twice = first_duplicate(label.casefold() for label in labels)
    if twice is not None:
        raise UserError(f"{path}: the label {twice!r} is there twice (or in two spellings); keep one of them.")
    check(Example("labels", "labels", labels, None), str(path))
    return labels


def _finish(rows: Iterable[_Row], labels: tuple[str, ...] | None) -> tuple[Example, ...]:
    return tuple(_example(row, labels) for row in rows)


def _example(row: _Row, labels: tuple[str, ...] | None) -> Example:
    if row.choices is not None:
        return Example(row.id, row.question, row.choices, row.answer)
    assert labels is not None  # text rows always come with their label set
    if row.label is not None and row.label not in labels:
        raise UserError(
            f"{row.where}: the label {row.label!r} is none of {', '.join(map(repr, labels))}; "
            "mend the label or add training rows that have it."
        )
    return Example(row.id, row.question, labels, None if row.label is None else labels.index(row.label))
