"""A training that cannot fit is refused before its weights are read, with what would make it fit.

The plan of a run that is about to begin, of its own rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.assemble import select_rows
from scalabl.data.class_balance import label_counts
from scalabl.data.example import Task
from scalabl.data.load import load_training_task
from scalabl.data.text_rows import TextTask
from scalabl.planning.memory import in_words, machine_device, machine_memory
from scalabl.planning.plan import Planner, StepUse
from scalabl.planning.step import PlannedRows, rows_like
from scalabl.runs.models import load_tokenizer, read_config
from scalabl.runs.settings import Settings, layer_fraction
from scalabl.scoring.base import Encoded
from scalabl.scoring.trunk_store import LARGEST
from scalabl.training.choose_scoring import candidates, takes_head

_LEAST = 0.02  # of the peak: what saves less is not worth naming


def refuse_what_cannot_fit(settings: Settings, rows: PlannedRows, peak: int, *, device: str, memory: int) -> None:
    """Refuse a training whose peak is more than there is.

    Args:
        settings: what is to be trained.
        rows: what its batches are like.
        peak: its bytes, as planned.
        device: "cpu" or "cuda".
        memory: bytes that there are.

    Raises:
        UserError: it names each setting that would help, with the peak that it would leave, the smallest first.
    """
    if peak <= memory:
        return
    helps = [f"{change} ({in_words(left)})" for left, change in savings(settings, rows, peak, device)]
    lower = f"change one or several of {', '.join(helps)}" if helps else "take a smaller model"
    where = "this GPU has" if device == "cuda" else "are available"
    raise UserError(
        f"This training needs about {in_words(peak)} of memory, but {in_words(memory)} {where}; {lower}, or try it all "
        "the same with --ignore-memory."
    )


def savings(settings: Settings, rows: PlannedRows, peak: int, device: str) -> list[tuple[int, str]]:
    """What would lower a peak: (the peak that it leaves, the option as one types it), what helps most first."""
    found = []
    for changed, fewer, option in _changes(settings, rows, device):
        try:
            labels = fewer.choices if fewer.loss == "head" else None
            left = Planner(changed, device, labels=labels).training(fewer).peak
        except UserError:  # a setting that this model does not take
            continue
        if left < peak * (1 - _LEAST):
            found.append((left, option))
    return sorted(found)


def _changes(settings: Settings, rows: PlannedRows, device: str) -> Iterator[tuple[Settings, PlannedRows, str]]:
    def change(option: str, **changed: Any) -> tuple[Settings, PlannedRows, str]:
        return settings.changed(**changed), rows, option

    if rows.batch > 1:
        half = rows.batch // 2
        yield settings, replace(rows, batch=half), f"--batch-size {half}"
    if rows.length > 1:
        shorter = math.ceil(rows.length / 2)
        fewer = replace(rows, length=shorter, stored=rows.stored * shorter // rows.length)
        yield settings, fewer, f"--max-length {shorter}"
    if not settings.optimisation.gradient_checkpointing:
        yield settings.changed(gradient_checkpointing=True), replace(rows, stored=0), "--gradient-checkpointing"
    if settings.machine.bits is None:
        yield change("--bits 8", bits=8)
    if settings.machine.bits != 4:
        yield change("--bits 4", bits=4, quantization="bitsandbytes")
    if settings.machine.dtype == "float32" or (settings.machine.dtype == "auto" and device == "cpu"):
        yield change("--dtype bfloat16", dtype="bfloat16")
    number = layer_fraction(settings.adapter.layers) or read_config(settings.model).get_text_config().num_hidden_layers
    if number > 1:
        yield change(f"--layers last:{number // 2}", layers=f"last:{number // 2}")
    if settings.adapter.r > 1:
        yield change(f"--rank {settings.adapter.r // 2}", r=settings.adapter.r // 2)
    if "8bit" not in settings.optimisation.optimizer:
        yield change("--optimizer adamw_8bit", optimizer="adamw_8bit")


_LONGEST, _SPREAD = 256, 64  # rows with the most text, whose tokens are counted; and rows for the average length


@dataclass(frozen=True)
class RunPlan:
    """What a run takes, and what there is.

    Attributes:
        planner: of its settings.
        rows: its largest batch.
        training: a step of it.
        memory: bytes that there are.
    """

    planner: Planner
    rows: PlannedRows
    training: StepUse
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


def plan_run(
    settings: Settings,
    task: Task | TextTask | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    ignore_memory: bool = False,
) -> RunPlan:
    """Plan a training on this machine, and refuse one that cannot fit; no weights are read.

    Args:
        settings: what is to be trained.
        task, tokenizer: the settings' own, where they are loaded already.
        ignore_memory: refuse nothing.

    Raises:
        UserError: it cannot fit, or the run would refuse its settings, model or rows.
        CannotPlanError: it may run, but what it takes cannot be planned.
    """
    task = task or load_training_task(settings.data)
    rows: Any = select_rows(task, settings.rows)
    tokenizer = tokenizer or load_tokenizer(settings.model)
    head = takes_head(settings, task, tokenizer)
    counts = label_counts(rows.train, task.labels) if head and task.labels else None
    both = (*rows.train, *rows.validation)
    options = candidates(settings, tokenizer, both, task.labels, head=head, counts=counts)
    longest = sorted((*rows.train, *rows.validation), key=_characters, reverse=True)[:_LONGEST]
    encoded = [option.encode(row) for option in {x.name: x for x in options}.values() for row in longest]

    device = machine_device()
    planner = Planner(settings, device, labels=len(task.labels or ()) if head else None)
    largest = rows_like(encoded, min(settings.optimisation.batch_size, len(rows.train)), head=head)
    if device == "cpu" and planner.stores_rows:
        some = rows.train[:: max(1, len(rows.train) // _SPREAD)]
        stored = _stored(planner, [options[-1].encode(row) for row in some], len(rows.train))
        largest = replace(largest, stored=stored)
    memory = machine_memory(device)
    if device == "cpu":  # the processes of a machine share it
        memory //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    training = planner.training(largest)
    if not ignore_memory:
        refuse_what_cannot_fit(settings, largest, training.peak, device=device, memory=memory)
    return RunPlan(planner, largest, training, memory)


def _stored(planner: Planner, some: Sequence[Encoded], number: int) -> int:
    """Bytes of the frozen layers' output for all rows, as these few are long; 0 where it is too much to be kept."""
    tokens = number * sum(len(row.input_ids) for row in some) // len(some)
    size = tokens * planner.bytes_per_token
    return 0 if size > LARGEST else size


def _characters(row: Any) -> int:
    """How much text a row has, of any kind."""
    return len(str(row))
