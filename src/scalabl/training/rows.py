"""The rows of a run: trained on, and held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from scalabl.tasks import holdout
from scalabl.tasks.holdout import R
from scalabl.tasks.task import Splits
from scalabl.training.recipe import Recipe


@dataclass(frozen=True)
class Rows(Generic[R]):
    """The rows of a run: trained on, and held out for every choice that is made before the test."""

    train: tuple[R, ...]
    validation: tuple[R, ...]


def select_rows(task: Splits[R], recipe: Recipe) -> Rows[R]:
    """Training and validation rows: the task's own, or a tenth of training rows held out.

    Which rows are taken depends on the recipe's sizes, never on its seed: seeds share their data.
    """
    train_rows = task.split("train")
    if "validation" in task.splits:
        validation = task.split("validation")
    else:
        train_rows, validation = holdout(train_rows, fraction=0.1, seed=0)
    return Rows(_subset(train_rows, recipe.train_rows), _subset(validation, recipe.validation_rows))


def _subset(rows: Sequence[R], number: int | None) -> tuple[R, ...]:
    if number is None or number >= len(rows):
        return tuple(rows)
    return tuple(random.Random(0).sample(list(rows), number))
