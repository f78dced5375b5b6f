"""The adapter that is to be made Bayesian, checked before anything heavy is imported."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalabl.adapter_file import CONFIG
from scalabl.errors import UserError
from scalabl.rows import with_labels
from scalabl.run_directory import ADAPTER, RECORD, classifier_record
from scalabl.tasks import Example, Task, load_task

# ways of drawing A and B that take the draw out of the base's weights: the adapter fits no base that can be loaded
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# options that say nothing about the finished weights
_INERT = {
    "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A plain LoRA on disk.

    Attributes:
        directory: `adapter_config.json` and `adapter_model.safetensors`.
        config: the former's content.
        record: the run's record, where `scalabl train` made it.
        model: the base model, a directory or a name.
    """

    directory: Path
    config: dict[str, Any]
    record: dict[str, Any] | None
    model: str


def read_source(directory: Path, model: str | None = None) -> Source:
    """Check an adapter directory.

    Args:
        directory: made by PEFT's `save_pretrained`, or a finished run of plain LoRA.
        model: the base model; by default the one that the run or the adapter names.

    Raises:
        UserError: files are missing, altered or not finished; it is no plain LoRA; its base model is not named.
    """
    for name in (CONFIG, ADAPTER):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no {name}; give a directory made by PEFT's save_pretrained.")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{directory / CONFIG} is not readable JSON; restore the file.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind == "SCALABL":
        raise UserError(f"{directory} has a posterior already; give a plain LoRA (its mean/ is one).")
    if kind != "LORA":
        raise UserError(f"{directory} holds an adapter of type {kind}, but only a plain LoRA can be made Bayesian.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{directory} was trained for {config['task_type']}, but only CAUSAL_LM is supported.")
    if config.get("use_dora"):
        raise UserError(f"{directory} is a DoRA, whose norms depend on the weights; only a plain LoRA is supported.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"{directory} was started with init_lora_weights={start!r}, which changes the base model's weights; "
            "convert it to a plain LoRA first (path_initial_model_for_weight_conversion of save_pretrained)."
        )
    record = classifier_record(directory) if (directory / RECORD).is_file() else None
    named = model or (record["recipe"]["model"] if record else config.get("base_model_name_or_path"))
    if not named:
        raise UserError(f"{directory / CONFIG} does not name the base model; give it with --model.")
    if named.startswith((".", "/", "~")) and not Path(named).expanduser().is_dir():
        raise UserError(f"There is no model directory {named}; give the base model with --model.")
    return Source(directory, config, record, named)


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse options of LoRA that a ScalaBL adapter cannot carry, where they are set.

    Raises:
        UserError: the first of them.
    """
    for name, value in options.items():
        if value and name not in _INERT:
            raise UserError(f"The adapter uses LoRA's option {name}, which cannot be made Bayesian; train without it.")


def rows_for(
    source: Source, data: str, train_rows: int | None = None
) -> tuple[Task, tuple[Example, ...], tuple[Example, ...]]:
    """The task, the rows that the posterior is fitted on, and the held-out rows (perhaps none).

    Args:
        source: the adapter; a run's class words become the rows' choices.
        data: a benchmark's name, a JSONL file, or a directory of them; its train split, or all rows where it has none.
        train_rows: take so many, the same ones every time.

    Raises:
        UserError: no such data, bad rows, or other labels than the run's.
    """
    if train_rows is not None and train_rows < 1:
        raise UserError(f"--train-rows is {train_rows}; it must be at least 1.")
    task = load_task(data)
    labels = source.record["task"]["labels"] if source.record else task.labels
    every = [row for rows in task.splits.values() for row in rows]
    rows = with_labels(task.splits.get("train", tuple(every)), labels, data)
    held_out = with_labels(task.splits.get("validation", ()), labels, data)
    if any(row.answer is None for row in rows):
        raise UserError(f"{data} has rows without an answer; a posterior is fitted on labelled rows.")
    if train_rows is not None and train_rows < len(rows):
        rows = random.Random(0).sample(rows, train_rows)
    return task, tuple(rows), tuple(held_out)


def require_free(output: Path) -> None:
    """Refuse an output directory that is not empty or cannot be written.

    Raises:
        UserError: so it is.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; choose another --output.")
    existing = output.resolve().parent
    while not existing.exists():
        existing = existing.parent
    probe = existing / f".{output.name}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another --output.") from error
