"""The rows that a plan is for: how many at a time, how long, and at how many positions logits are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scalabl.core.errors import UserError
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.text import EncodedText

MOST = 2**26  # tokens at a time, which are kept as numbers: no device takes so many
LOSSES = ("letters", "continuation", "tokens")


@dataclass(frozen=True)
class PlannedRows:
    """A batch of rows that are all of the greatest length.

    Args:
        batch: rows of a batch.
        length: tokens of a row.
        loss: "letters" reads the last position alone, "continuation" those that predict the choices' tokens, and
            "tokens" (plain supervised fine-tuning, no task of this program) all of them.
        scored: tokens of all choices of a row together.
        choices: of a row.
        stored: bytes of the frozen layers' output for all rows of a run, which is kept; 0 where it is not known.

    Raises:
        UserError: a number is out of its range.
    """

    batch: int
    length: int
    loss: str = "continuation"
    scored: int = 32
    choices: int = 4
    stored: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}.")
        for name in ("batch", "length", "scored", "choices"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def in_a_row(self) -> int:
        """Tokens of a row's choices: they stand behind a prompt of at least one token, each choice having one."""
        if self.loss != "continuation":
            return 0
        return max(1, min(self.scored, self.length - 1))

    def require_few(self, batch: int) -> None:
        """Refuse so many of these rows that their numbers would not fit into memory.

        Raises:
            UserError: they are too many.
        """
        if batch * self.length > MOST:
            raise UserError(
                f"{batch:,} rows of {self.length:,} tokens are more than a plan is made for ({MOST:,} tokens at a "
                "time); lower --batch, --seq or --samples."
            )

    def of(self, batch: int) -> Batch:
        """So many of these rows, on the CPU; the numbers in them mean nothing.

        Raises:
            UserError: they are too many.
        """
        self.require_few(batch)
        prompt = max(1, self.length - self.in_a_row)
        choices = max(1, min(self.choices, self.in_a_row))
        sizes = [self.in_a_row // choices + (i < self.in_a_row % choices) for i in range(choices)]
        segments, positions = [0] * prompt, list(range(prompt))
        for number, size in enumerate(sizes, start=1):
            segments += [number] * size
            positions += range(prompt, prompt + size)
        return Batch(
            input_ids=torch.zeros(batch, len(segments), dtype=torch.long),
            position_ids=torch.tensor([positions]).repeat(batch, 1),
            segments=torch.tensor([segments]).repeat(batch, 1),
            num_choices=torch.full((batch,), choices if self.in_a_row else self.choices),
            answers=torch.zeros(batch, dtype=torch.long),
            keep=1 + self.in_a_row,
        )


def rows_like(encoded: Sequence[Encoded], batch: int) -> PlannedRows:
    """The batch that a run's longest rows make.

    Args:
        encoded: the longest of them, in every way in which they may be scored.
        batch: rows of a batch.
    """
    scored = max(_scored(row) for row in encoded)
    return PlannedRows(
        batch=batch,
        length=max(len(row.input_ids) for row in encoded),
        loss="continuation" if scored else "letters",
        scored=max(1, scored),
        choices=max(row.num_choices for row in encoded),
    )


def _scored(row: Encoded) -> int:
    """Tokens whose log-likelihoods are read: those of choices, or the trained ones of a text."""
    return row.trained if isinstance(row, EncodedText) else sum(segment > 0 for segment in row.segments)
