"""Questions as a Python program gives them, read as strictly as the rows of a file. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import LETTERS, Example, check, images_of
from scalabl.data.fields import unstripped_text

Question = str | Mapping[str, Any] | Example


def rows_of(questions: Question | Sequence[Question], labels: tuple[str, ...] | None) -> list[Example]:
    """Questions as rows.

    Args:
        questions: prompts (with label words), or rows {"question", "choices"}, with an "image" or not, or `Example`s;
            one, or several.
        labels: the label words of a classifier that has them.

    Raises:
        UserError: no questions, what is none, a prompt where the scoring needs choices, or choices other than the
            labels.
    """
    if questions is None:
        raise UserError("There are no questions to answer; pass at least one.")
    given = [questions] if isinstance(questions, str | Mapping | Example) else questions
    rows = [_row(index, question, labels) for index, question in enumerate(given)]
    if not rows:
        raise UserError("There are no questions to answer; pass at least one.")
    return rows


def _row(index: int, question: Question, labels: tuple[str, ...] | None) -> Example:
    where = f"question {index}"
    if isinstance(question, Example):
        return _checked(question, labels)
    if isinstance(question, str):
        if labels is None:
            raise UserError('This classifier scores choices; pass rows {"question": ..., "choices": [...]}.')
        return Example(str(index), unstripped_text(question, "the prompt", where), labels, None)
    if not isinstance(question, Mapping):
        kind = "None" if question is None else f"a {type(question).__name__}"
        raise UserError(f'Question {index} is {kind}; give a text, or a row {{"question": ..., "choices": [...]}}.')
    key = "question" if "question" in question else "text"
    text, choices = question.get(key), question.get("choices", labels)
    if text is None or choices is None:
        raise UserError(f'Question {index} lacks "question" or "choices"; give both.')
    if isinstance(choices, str | Mapping) or not isinstance(choices, Iterable):
        raise UserError(f'{where}: "choices" is not a list; write ["first", "second"].')
    texts = tuple(unstripped_text(choice, f"choice {i}", where) for i, choice in enumerate(choices))
    images = images_of(question, Path(), where)
    return _checked(Example(str(index), unstripped_text(text, f'"{key}"', where), texts, None, images), labels)


def _checked(row: Example, labels: tuple[str, ...] | None) -> Example:
    if labels is not None and row.choices != labels:
        raise UserError(f"Question {row.id} has choices of its own, but this classifier answers {labels}.")
    return check(row, f"question {row.id}", most=len(LETTERS) if labels is None else None)
