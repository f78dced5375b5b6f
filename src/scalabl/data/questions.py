"""Questions that Python gives: texts, rows as JSONL has them, and `Example`s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import LETTERS, Example, check
from scalabl.data.fields import PROMPT, choices_of, unstripped_text
from scalabl.data.jsonl import row_of

Question = str | Mapping[str, Any] | Example


def rows_of(
    questions: Question | Sequence[Question], labels: tuple[str, ...] | None, *, prompts: bool = False
) -> list[Example]:
    """Questions as rows, read as a file's and a server's are, so that the same text is the same tokens.

    Args:
        questions: texts (with label words), or rows {"text"}, {"prompt"} or {"question", "choices"}, with an "image" or
            not, or `Example`s; one, or several. Answers are ignored.
        labels: the label words of a classifier that has them.
        prompts: whether texts are prompts already, as {"prompt"} is.

    Raises:
        UserError: no questions, what is none, a key that no row has, a text where the scoring needs choices, or choices
            other than the labels.
    """
    if questions is None:
        raise UserError("There are no questions to answer; pass at least one.")
    given = [questions] if isinstance(questions, str | Mapping | Example) else questions
    rows = [_row(index, question, labels, prompts) for index, question in enumerate(given)]
    if not rows:
        raise UserError("There are no questions to answer; pass at least one.")
    return rows


def _row(index: int, question: Question, labels: tuple[str, ...] | None, prompts: bool) -> Example:
    where = f"question {index}"
    if isinstance(question, Example):
        if labels is not None and question.choices != labels:
            raise _other_choices(question.id, labels)
        return check(question, f"question {question.id}", most=len(LETTERS) if labels is None else None)
    if isinstance(question, str):
        if labels is None:
            raise UserError('This classifier scores choices; pass rows {"question": ..., "choices": [...]}.')
        text = unstripped_text(question, "the prompt", where)
        return Example(str(index), text if prompts else text.strip(), labels, None, rendered=prompts)
    if not isinstance(question, Mapping):
        kind = "None" if question is None else f"a {type(question).__name__}"
        raise UserError(f'Question {index} is {kind}; give a text, or a row {{"question": ..., "choices": [...]}}.')
    raw = {key: _as_json(value) for key, value in question.items()}
    if labels is not None and "question" in raw and not {"text", PROMPT} & raw.keys():
        raw = _of_labels(raw, labels, index, PROMPT if prompts else "text")
    return replace(row_of(raw, labels, where=where, name=str(index)), answer=None, answers=None)


def _as_json(value: Any) -> Any:
    """Tuples and arrays as the list that JSON would have."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value


def _of_labels(raw: dict[str, Any], labels: tuple[str, ...], index: int, key: str) -> dict[str, Any]:
    """A {"question"} row of a classifier whose rows share their labels: another name of the text."""
    where = f"question {index}"
    if "choices" in raw and set(choices_of(raw, where)) != set(labels):
        raise _other_choices(str(index), labels)
    others = {name: value for name, value in raw.items() if name not in ("question", "choices", "answer")}
    return others | {key: unstripped_text(raw["question"], '"question"', where)}


def _other_choices(name: str, labels: tuple[str, ...]) -> UserError:
    return UserError(f"Question {name} has choices of its own, but this classifier answers {labels}.")
