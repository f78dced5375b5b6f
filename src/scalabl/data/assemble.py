"""Seeded choices of rows that are the same on every machine and in every row order.

Official rows -> the splits of a Task: the same rules whatever the source.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from scalabl.core.errors import UserError
from scalabl.data.example import Example, Splits, check
from scalabl.data.registry import Benchmark, Part, RawRow


class Row(Protocol):
    """A row with a name and a content."""

    @property
    def id(self) -> str: ...

    @property
    def content(self) -> tuple[Any, ...]: ...


R = TypeVar("R", bound=Row)
SUBSET_SEED = 0


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
    chosen = set(order[:count])
    rest = tuple(example for i, example in enumerate(examples) if i not in chosen)
    return rest, tuple(example for i, example in enumerate(examples) if i in chosen)


def _digest(example: Row, seed: int) -> bytes:
    content = json.dumps([seed, *example.content], ensure_ascii=True)
    return hashlib.sha256(content.encode()).digest()


VALIDATION_FRACTION = 0.1  # of the train rows, at most 500, where the official validation serves as test


def part_examples(benchmark: Benchmark, part: Part, split: str, rows: Iterable[RawRow]) -> list[Example]:
    """Normalise the raw rows of one official split of one part, in their order."""
    named = ((f"{part.prefix}{split}-{index}", row) for index, row in enumerate(rows))
    return [check(benchmark.normaliser(row, name), f"{benchmark.name} {name}") for name, row in named]


def assemble(benchmark: Benchmark, official: Mapping[str, list[Example]]) -> dict[str, tuple[Example, ...]]:
    """Splits of a benchmark from its official ones.

    - A row whose question and choices stand in a later split too (train < validation < test) is dropped from the
      earlier one: two of ARC-Easy's train rows, six of MMLU college physics' eleven validation rows.
    - WinoGrande-S and -M take their train rows as a seeded subset of XL, S within M.
    - Where the official validation serves as test, 10 % (at most 500) as many rows as there are train rows
      become ``"validation"``: from XL's unused rows for WinoGrande, off the train rows otherwise.

    - MMLU's subjects as labels: see `Benchmark.per_class`.

    Args:
        benchmark: the table row.
        official: official split name -> all its rows.
    """
    if benchmark.per_class is not None:
        return _by_class(official["test"], benchmark.per_class)
    splits: dict[str, tuple[Example, ...]] = {}
    later: set[tuple[str, tuple[str, ...]]] = set()
    for name in ("test", "validation", "train"):
        if name in benchmark.splits:
            rows = official[benchmark.splits[name]]
            splits[name] = tuple(row for row in rows if _prompt(row) not in later)
            later.update(map(_prompt, rows))
    if "train" not in splits:
        return {"validation": splits["validation"], "test": splits["test"]}
    train = splits["train"]
    if benchmark.train_rows is not None:
        count = benchmark.train_rows
        order = shuffled(train, SUBSET_SEED)
        spare = min(500, round(VALIDATION_FRACTION * count))
        chosen, rest = {row.id for row in order[:count]}, {row.id for row in order[count : count + spare]}
        splits["validation"] = tuple(row for row in train if row.id in rest)
        train = tuple(row for row in train if row.id in chosen)
    elif benchmark.carves_validation:
        train, splits["validation"] = holdout(train, VALIDATION_FRACTION, SUBSET_SEED)
    return {"train": train, "validation": splits["validation"], "test": splits["test"]}


def _by_class(rows: Sequence[Example], counts: tuple[int, int, int]) -> dict[str, tuple[Example, ...]]:
    """So many rows of every class a split, of those whose text stands once."""
    often = Counter(row.question.casefold() for row in rows)
    taken: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for answer in sorted({row.answer for row in rows if row.answer is not None}):
        order = shuffled(
            [row for row in rows if row.answer == answer and often[row.question.casefold()] == 1], SUBSET_SEED
        )
        for split, count in zip(taken, counts, strict=True):
            taken[split] += order[:count]
            order = order[count:]
    return {split: tuple(chosen) for split, chosen in taken.items() if chosen}


def _prompt(row: Example) -> tuple[str, tuple[str, ...]]:
    return row.question, row.choices


def cut(rows: Sequence[R], seed: int = SUBSET_SEED) -> dict[str, tuple[R, ...]]:
    """Splits of a set whose official validation rows alone are at hand: 60, 10 and 30 %, within each in their order.

    No figure on such a test part can be compared with one on the official split.
    """
    ends = [round(0.6 * len(rows)), round((0.6 + 0.1) * len(rows))]
    order = [row.id for row in shuffled(rows, seed)]
    parts = {"train": order[: ends[0]], "validation": order[ends[0] : ends[1]], "test": order[ends[1] :]}
    chosen = {split: frozenset(ids) for split, ids in parts.items()}
    return {split: tuple(row for row in rows if row.id in ids) for split, ids in chosen.items()}


def repeated(rows: Sequence[R], others: Sequence[R]) -> list[R]:
    """Those of the rows that stand among others too, by what they hold: whatever they are called or labelled there."""
    known = {row.content for row in others}
    return [row for row in rows if row.content in known]


@dataclass(frozen=True)
class TrainingRows(Generic[R]):
    """The rows of a run: trained on, and held out for every choice that is made before the test."""

    train: tuple[R, ...]
    validation: tuple[R, ...]


class RowLimits(Protocol):
    """The most rows of a run; None for all."""

    @property
    def train_rows(self) -> int | None: ...

    @property
    def rows_per_class(self) -> int | None: ...

    @property
    def validation_rows(self) -> int: ...


def select_rows(task: Splits[R], limits: RowLimits) -> TrainingRows[R]:
    """Training and validation rows: the task's own, or a tenth of training rows held out.

    Which rows are taken depends on the limits alone, never on a seed: seeds share their data.

    Args:
        task: the rows.
        limits: the most rows of each, as a recipe has them.

    Raises:
        UserError: so many rows of each label, of rows that have no one label.
    """
    train_rows = task.split("train")
    if "validation" in task.splits:
        validation = task.split("validation")
    else:
        train_rows, validation = holdout(train_rows, fraction=0.1, seed=0)
    if limits.rows_per_class is not None:
        train_rows = _of_each_label(task, train_rows, limits.rows_per_class)
    return TrainingRows(_subset(train_rows, limits.train_rows), _subset(validation, limits.validation_rows))


def _of_each_label(task: Splits[R], rows: Sequence[R], number: int) -> tuple[R, ...]:
    """So many rows of every label, in the rows' order; all rows of a label that has fewer."""
    answers: list[int | None] = [getattr(row, "answer", None) for row in rows]
    if task.labels is None or None in answers:
        raise UserError(
            f"rows_per_class is {number}, but the rows of {task.name} have no one label that all share; leave it out, "
            "or give rows of a text and its label."
        )
    taken: set[str] = set()
    for label in range(len(task.labels)):
        of_label = [row for row, answer in zip(rows, answers, strict=True) if answer == label]
        taken |= {row.id for row in shuffled(of_label, SUBSET_SEED)[:number]}
    return tuple(row for row in rows if row.id in taken)


def _subset(rows: Sequence[R], number: int | None) -> tuple[R, ...]:
    if number is None or number >= len(rows):
        return tuple(rows)
    return tuple(random.Random(0).sample(list(rows), number))
