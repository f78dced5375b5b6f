"""The user's own rows as JSONL: ``{"question", "choices", "answer"}``, ``{"text", "label"}``, or ``{"text", "labels"}``
with a list of all labels that a row has, which may be none.

A text row may have a second text, ``"text_pair"`` (a premise and its hypothesis, two sentences to compare); then all
rows of its file have one.
Either kind may carry an ``"id"``; without one the row is called ``stem:line``. One file holds one kind. A file that is
called ``.parquet`` holds the same fields as columns. An ``"image"`` of either kind is a path, or a list of paths,
relative to the file.
A ``"score"``, which ``scalabl acquire`` adds, is read over.

A row that is to be scored may be a prompt already, ``{"prompt", "completion"}``: the completions of a file are its
labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.locations import Location
from scalabl.data.example import LETTERS, Example, Task, check, few, first_duplicate, images_of
from scalabl.data.fields import (
    COMPLETION,
    PAIR,
    PROMPT,
    SEVERAL,
    answer_index,
    check_keys,
    check_prompt_keys,
    choices_of,
    is_prompt_row,
    is_text_row,
    label_of,
    row_id,
    several_of,
    text_of,
    unstripped_text,
)
from scalabl.data.records import Ids, name_of, read_fields, split_files

_ANSWERS = ("answer", "label", SEVERAL, COMPLETION)


@dataclass(frozen=True)
class _Row:
    """A parsed line whose label or labels, if it is a text row, still wait for the file's label set."""

    where: str
    id: str
    question: str
    choices: tuple[str, ...] | None  # None: a text row
    answer: int | None
    label: str | None
    images: tuple[str, ...] = ()
    pair: str | None = None
    several: tuple[str, ...] | None = None  # the labels of a row that may have several
    rendered: bool = False  # a prompt already

    @property
    def named(self) -> tuple[str, ...]:
        """The labels that the row names."""
        return self.several or ((self.label,) if self.label else ())

    @property
    def kind(self) -> str | None:
        """The key of a text row's labels; None of an unlabelled one."""
        return SEVERAL if self.several is not None else "label" if self.label is not None else None


def load_rows(
    path: str | Path, labels: Sequence[str] | None = None, require_answer: bool = True, *, foreign: bool = False
) -> tuple[Example, ...]:
    """Read one JSONL or Parquet file.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        labels: the class words of text rows, in the order of their indices; without them the sorted distinct
            labels of the file.
        require_answer: ``False`` for prediction rows, which may leave out ``answer`` or ``label``, or have it null.
        foreign: take a label that is none of ``labels`` for no label, as of rows out of scope, or to be predicted.

    Raises:
        UserError: see :func:`load_jsonl_task`; also text rows without labels of their own when none are given.
    """
    rows = _parse_file(Path(path), require_answer)
    known = _label_set(rows, labels, Path(path))
    if foreign and known is not None:
        rows = [_known(row, known) for row in rows]
    return _finish(rows, known)


@dataclass(frozen=True)
class PlacedRow:
    """An unlabelled or labelled row and where it stands.

    Attributes:
        place: where reading may begin again: the byte offset of its line, or the row of a Parquet file.
        number: its line or row, counted from 1.
        example: the row.
    """

    place: int
    number: int
    example: Example


def stream_rows(
    path: Location, labels: Sequence[str] | None, *, name: str | None = None, place: int = 0, number: int = 1
) -> Iterator[PlacedRow]:
    """Read the prediction rows of a file one by one, from its beginning or from a row's place on; a label that is none
    of the class words is none.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        labels: the class words of text rows.
        name: what rows without an id are called after, as ``name:number``; the file's stem if left out.
        place: where to begin, as a :class:`PlacedRow` says it.
        number: the number of the row there.

    Raises:
        UserError: see :func:`load_jsonl_task`; also text rows where there are no labels.
    """
    for at, row in _parse(path, path.stem if name is None else name, require_answer=False, place=place, line=number):
        yield PlacedRow(at, int(row.where.rpartition(":")[2]), _unlabelled(row, labels))


def row_of(raw: dict[str, Any], labels: Sequence[str] | None, *, where: str, name: str) -> Example:
    """A prediction row that is at hand, read as a line of a file is; a label that is none of the class words is none.

    Args:
        raw: its fields.
        labels: the class words of text rows.
        where: how a refusal names it.
        name: what it is called without an id.

    Raises:
        UserError: see :func:`load_jsonl_task`; also a text row where there are no labels.
    """
    return _unlabelled(_parse_row(raw, where, name, require_answer=False, folder=Path()), labels)


def _unlabelled(row: _Row, labels: Sequence[str] | None) -> Example:
    if row.choices is None and labels is None:
        raise UserError(f'{row.where}: a text row, but there are no labels; write "question" and "choices".')
    return _example(row if labels is None else _known(row, labels), None if labels is None else tuple(labels))


def _known(row: _Row, labels: Sequence[str]) -> _Row:
    """The row, without a label that is none of these."""
    return row if set(row.named) <= set(labels) else replace(row, label=None, several=None)


def load_jsonl_task(path: str | Path) -> Task:
    """Read a user's data as a task.

    ``path`` is a directory with ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (those that exist; each may be
    ``.parquet``), or one file, whose rows become the ``"train"`` split; :func:`scalabl.data.assemble` splits a
    seeded validation part off it. The labels of text rows are the sorted distinct words of the train split (of all
    splits where there is no train split).

    Raises:
        UserError: missing or empty data, validation rows under another name, a line that is not a JSON object,
            missing or unknown keys, a row without an answer or with an answer outside its choices, fewer than two
            choices or labels, duplicate choices, labels or ids, a label that the train split does not have.
    """
    path = Path(path)
    files = split_files(path)
    parsed = {split: _parse_file(file, require_answer=True) for split, file in files.items()}
    if len({rows[0].choices is None for rows in parsed.values()}) > 1:
        raise UserError(f'{path} mixes {{"text", "label"}} and {{"question", ...}} splits; keep to one kind of row.')
    if len({rows[0].pair is None for rows in parsed.values()}) > 1:
        raise UserError(f'{path} has splits with and without "{PAIR}"; give the rows of all of them one, or none.')
    if len({rows[0].kind for rows in parsed.values()}) > 1:
        raise UserError(f'{path} has splits with "label" and with "{SEVERAL}"; keep to one of them in all.')
    reference = parsed.get("train") or [row for rows in parsed.values() for row in rows]
    labels = _label_set(reference, None, files.get("train", path))
    splits = {split: _finish(rows, labels) for split, rows in parsed.items()}
    return Task(name=name_of(path), splits=splits, labels=labels, source=str(path), licence="unknown")


def _parse_file(path: Path, require_answer: bool) -> list[_Row]:
    return [row for _, row in _parse(path, path.stem, require_answer)]


def _parse(
    path: Location, name: str, require_answer: bool, *, place: int = 0, line: int = 1
) -> Iterator[tuple[int, _Row]]:
    ids = Ids()
    first: _Row | None = None
    kind: str | None = None
    for at, number, raw in read_fields(path, place=place, line=line):
        where = f"{path}:{number}"
        row = _parse_row(raw, where, f"{name}:{number}", require_answer, path.parent)
        ids.add(row.id, where)
        first = first or row
        if (row.choices is None) != (first.choices is None):
            raise UserError(f"{where}: text rows and question rows in one file; keep to one kind of row.")
        if (row.pair is None) != (first.pair is None):
            raise UserError(f'{where}: rows with and without "{PAIR}" in one file; give all of them one, or none.')
        if row.rendered != first.rendered:
            raise UserError(f'{where}: rows with "{PROMPT}" and rows without in one file; keep to one kind of row.')
        kind = kind or row.kind
        if row.kind not in (None, kind):
            raise UserError(f'{where}: rows with "label" and rows with "{SEVERAL}" in one file; keep to one of them.')
        yield at, row


def _parse_row(raw: dict[str, Any], where: str, name: str, require_answer: bool, folder: Location) -> _Row:
    if not require_answer:  # where nothing is known yet, a null stands for it
        raw = {key: value for key, value in raw.items() if value is not None or key not in _ANSWERS}
    if is_prompt_row(raw):
        return _parse_prompt(raw, where, name, require_answer)
    text_row = is_text_row(raw, where)
    check_keys(raw, where, text_row, require_answer)
    name = row_id(raw, where, name)
    if text_row:
        label = label_of(raw, where) if "label" in raw else None
        several = several_of(raw, where) if SEVERAL in raw else None
        pair = text_of(raw, PAIR, where) if PAIR in raw else None
        text, images = text_of(raw, "text", where), images_of(raw, folder, where)
        return _Row(where, name, text, None, None, label, images, pair, several)
    choices = choices_of(raw, where)
    question = text_of(raw, "question", where)
    check(Example(name, question, choices, None), where)
    answer = answer_index(raw["answer"], choices, where) if "answer" in raw else None
    return _Row(where, name, question, choices, answer, None, images_of(raw, folder, where))


def _parse_prompt(raw: dict[str, Any], where: str, name: str, require_answer: bool) -> _Row:
    check_prompt_keys(raw, where, require_answer)
    for key in (PROMPT, COMPLETION):
        if isinstance(raw.get(key), list):
            raise UserError(f'{where}: "{key}" is a list of messages, which is not scored here; write it as a text.')
    label = text_of(raw, COMPLETION, where) if COMPLETION in raw else None
    prompt = unstripped_text(raw[PROMPT], f'"{PROMPT}"', where)
    return _Row(where, row_id(raw, where, name), prompt, None, None, label, rendered=True)


def _label_set(rows: Iterable[_Row], given: Sequence[str] | None, path: Path) -> tuple[str, ...] | None:
    rows = list(rows)
    if rows[0].choices is not None:
        return None
    labels = tuple(given) if given is not None else tuple(sorted({label for row in rows for label in row.named}))
    if not labels and any(row.several is not None for row in rows):
        raise UserError(f'{path}: no row has a label, every "{SEVERAL}" is empty; give rows that have some.')
    if not labels:
        raise UserError(f"{path}: rows without a label and no labels given; say which there are (--labels).")
    if given is None and rows[0].rendered and len(labels) > max(len(LETTERS), len(rows) // 2):
        raise UserError(
            f"{path}: {len(labels):,} different completions in {len(rows):,} rows are free text and no labels; "
            'judge it by rows {"question", "answers"}.'
        )
    if len(labels) < 2:
        raise UserError(f"{path}: only one label, {labels[0]!r}; a classifier needs at least two.")
    twice = first_duplicate(label.casefold() for label in labels)
    if twice is not None:
        raise UserError(f"{path}: the label {twice!r} is there twice (or in two spellings); keep one of them.")
    check(Example("labels", "labels", labels, None), str(path), most=None)
    return labels


def _finish(rows: Iterable[_Row], labels: tuple[str, ...] | None) -> tuple[Example, ...]:
    return tuple(_example(row, labels) for row in rows)


def _example(row: _Row, labels: tuple[str, ...] | None) -> Example:
    if row.choices is not None:
        return Example(row.id, row.question, row.choices, row.answer, row.images)
    assert labels is not None  # text rows always come with their label set
    for label in row.named:
        if label not in labels:
            raise UserError(
                f"{row.where}: the label {label!r} is none of {few(labels)}; "
                "mend the label or add training rows that have it."
            )
    answer = None if row.label is None else labels.index(row.label)
    answers = None if row.several is None else tuple(sorted(map(labels.index, row.several)))
    return Example(row.id, row.question, labels, answer, row.images, row.pair, answers, row.rendered)
