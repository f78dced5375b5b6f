"""The plan of a run that is about to begin, of its own rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scalabl.models import load_tokenizer
from scalabl.planning.memory import in_words, machine_device, machine_memory
from scalabl.planning.plan import Planner, Training
from scalabl.planning.refusal import refuse_what_cannot_fit
from scalabl.planning.rows import Rows, rows_like
from scalabl.scoring import Encoded
from scalabl.tasks import load_training_task
from scalabl.training.choose_scoring import candidates
from scalabl.training.recipe import Recipe
from scalabl.training.rows import select_rows
from scalabl.trunk_store import LARGEST

_LONGEST, _SPREAD = 256, 64  # rows with the most text, whose tokens are counted; and rows for the average length


@dataclass(frozen=True)
class RunPlan:
    """What a run takes, and what there is.

    Attributes:
        planner: of its recipe.
        rows: its largest batch.
        training: a step of it.
        memory: bytes that there are.
    """

    planner: Planner
    rows: Rows
    training: Training
    memory: int

    def in_words(self) -> str:
        """One line."""
        counts, rows = self.planner.counts, self.rows
        small = counts.adapter + counts.gradients + self.planner.optimizer
        parts = {
            "weights": counts.weights,
            "adapter, gradients and optimiser": small,
            "stored rows": rows.stored,
            "activations": self.training.peak - counts.weights - small - rows.stored,
        }
        listed = ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size)
        return (
            f"memory: about {in_words(self.training.peak)} of {in_words(self.memory)} ({listed}) at {rows.batch} rows "
            f"of {rows.length} tokens"
        )


def plan_run(recipe: Recipe, *, ignore_memory: bool = False) -> RunPlan:
    """Plan a training on this machine, and refuse one that cannot fit; no weights are read.

    Args:
        recipe: what is to be trained.
        ignore_memory: refuse nothing.

    Raises:
        UserError: it cannot fit, or the run would refuse its settings, model or rows.
        CannotPlanError: it may run, but what it takes cannot be told.
    """
    task = load_training_task(recipe.data)
    rows: Any = select_rows(task, recipe)
    tokenizer = load_tokenizer(recipe.model)
    options = candidates(recipe, tokenizer, (*rows.train, *rows.validation), task.labels)
    longest = sorted((*rows.train, *rows.validation), key=_characters, reverse=True)[:_LONGEST]
    encoded = [option.encode(row) for option in {x.name: x for x in options}.values() for row in longest]

    device = machine_device()
    planner = Planner(recipe, device)
    largest = rows_like(encoded, min(recipe.batch_size, len(rows.train)))
    if device == "cpu" and planner.stores_rows:
        some = rows.train[:: max(1, len(rows.train) // _SPREAD)]
        stored = _stored(planner, [options[-1].encode(row) for row in some], len(rows.train))
        largest = replace(largest, stored=stored)
    memory = machine_memory(device)
    if device == "cpu":  # the processes of a machine share it
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    training = planner.training(largest)
    if not ignore_memory:
        refuse_what_cannot_fit(recipe, largest, training.peak, device=device, memory=memory)
    return RunPlan(planner, largest, training, memory)


def _stored(planner: Planner, some: Sequence[Encoded], number: int) -> int:
    """Bytes of the frozen layers' output for all rows, as these few are long; 0 where it is too much to be kept."""
    tokens = number * sum(len(row.input_ids) for row in some) // len(some)
    size = tokens * planner.bytes_per_token
    return 0 if size > LARGEST else size


def _characters(row: Any) -> int:
    """How much text a row has, of any kind."""
    return len(str(row))
