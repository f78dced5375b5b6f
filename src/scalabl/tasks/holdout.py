"""Seeded choices of rows that are the same on every machine and in every row order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from scalabl.errors import UserError


class Row(Protocol):
    """A row that says what it asks."""

    @property
    def id(self) -> str: ...

    @property
    def content(self) -> tuple[Any, ...]: ...


R = TypeVar("R", bound=Row)


def shuffled(examples: Sequence[R], seed: int) -> list[R]:
    """The rows in the order of a seeded hash of their content.

    A hash and not a random generator: the order then depends on neither the library's version nor the order
    in which the rows came, so the Hub and the wheel give the same subset.
    """
    return sorted(examples, key=lambda example: (_digest(example, seed), example.id))


def holdout(
    examples: Sequence[R], fraction: float = 0.1, seed: int = 0, *, most: int = 500
) -> tuple[tuple[R, ...], tuple[R, ...]]:
    """Split a validation part off labelled rows.

    Args:
        examples: n rows; their order is kept in both parts.
        fraction: share of the rows that is held out, between 0 and 1.
        seed: another seed holds out other rows.
        most: at most so many rows are held out.

    Returns:
        ``(rest, held_out)`` with ``len(held_out) = min(most, round(fraction * n))``, but at least one row each.

    Raises:
        UserError: fraction outside (0, 1), or fewer than two rows.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}; it must lie between 0 and 1, for instance 0.1.")
    if len(examples) < 2:
        raise UserError("a validation part needs at least two rows to split; add rows or give a validation file.")
    count = min(most, max(1, round(fraction * len(examples))), len(examples) - 1)
    order = sorted(range(len(examples)), key=lambda i: (_digest(examples[i], seed), i))
    held = set(order[:count])
    rest = tuple(example for i, example in enumerate(examples) if i not in held)
    return rest, tuple(example for i, example in enumerate(examples) if i in held)


def _digest(example: Row, seed: int) -> bytes:
    content = json.dumps([seed, *example.content], ensure_ascii=True)
    return hashlib.sha256(content.encode()).digest()
